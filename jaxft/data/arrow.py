"""What needs `datasets`: parquet files, directories it saved, and the hub. It is imported when one of them is asked
for.
"""

from pathlib import Path
from typing import Any

from jaxft.data.errors import DataError


def is_saved(place: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote this directory."""
    return (place / "dataset_dict.json").is_file() or (place / "state.json").is_file()


def load_saved(place: Path, split: str) -> Any:
    """A directory written by `save_to_disk`."""
    import datasets

    table = datasets.load_from_disk(str(place))
    if not isinstance(table, datasets.DatasetDict):
        return table
    if split not in table:
        raise DataError(
            str(place), "data.split", repr(split), f"one of {', '.join(map(str, table))}", "Set data.split."
        )
    return table[split]


def load_parquet(path: str) -> Any:
    """One parquet file, memory-mapped by way of the `datasets` cache."""
    import datasets
    import pyarrow
    from datasets.exceptions import DatasetGenerationError

    try:
        return datasets.Dataset.from_parquet(path)
    except (pyarrow.ArrowInvalid, DatasetGenerationError) as error:
        got = str(error.__cause__ or error)
        raise DataError(path, "", got, "a whole parquet file", "Copy or write it again.") from error


def load_hub(name: str, subset: str | None, split: str) -> Any:
    """A data set of the Hugging Face hub, from its cache when it is there."""
    import datasets

    try:
        return datasets.load_dataset(name, name=subset, split=split)
    except (OSError, ValueError) as error:
        remedy = (
            "Not a local path, so it was taken for a hub name. Check the spelling, data.subset and data.split; "
            "offline, a data set must be in the cache already (run once online) or saved to a directory."
        )
        raise DataError(name, "data.path", f"{type(error).__name__}: {error}", "a data set", remedy) from error


def read(table: Any, start: int, stop: int) -> list[dict[str, Any]]:
    """Rows `start` to `stop` as dicts, without null fields."""
    columns = table[start:stop]
    size = min(stop, len(table)) - start
    return [{name: denull(values[i]) for name, values in columns.items() if values[i] is not None} for i in range(size)]


def denull(value: Any) -> Any:
    """Drop null fields of nested structs: Arrow gives every struct of a column the union of all keys."""
    if isinstance(value, dict):
        return {name: denull(item) for name, item in value.items() if item is not None}
    return [denull(item) for item in value] if isinstance(value, list) else value
