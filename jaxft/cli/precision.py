"""What few bits cost, as tables: a line for each layer, a column for each of its weights in order of execution."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxft.border.errors import ConfigError
from jaxft.cli import target
from jaxft.cli.target import Target
from jaxft.config import changed
from jaxft.data import Examples, Loader
from jaxft.models.decoder import Execution
from jaxft.quant import chosen, errors
from jaxft.quant.errors import Merged, Product
from jaxft.rollout import score
from jaxft.training import prefetch

BATCHES = 4
"""Of the data, that products are compared on."""


def table(title: str, rows: Sequence[Any], value: Callable[[Any], float]) -> Table:
    """``value(row)`` of every layer, as a percentage."""
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        layer = re.search(r"\.(\d+)\.", row.module)
        cells.setdefault(layer[1] if layer else "", {})[row.module.rpartition(".")[2]] = f"{100 * value(row):.3g}"
    columns = list(dict.fromkeys(name for line in cells.values() for name in line))
    made = Table("layer", *columns, title=title, title_justify="left")
    for layer, line in cells.items():
        made.add_row(layer, *(line.get(name, "") for name in columns))
    return made


def shares(*rows: Merged) -> dict[str, float | None]:
    """Errors, and the size of the update, of one layer or several together, as shares of their norm."""
    packing = None if any(row.packing is None for row in rows) else errors.total(rows, "packing")
    return {"update": errors.total(rows, "update"), "rounding": errors.total(rows, "rounding"), "packing": packing}


def show_merged(rows: Sequence[Merged], packed: bool) -> None:
    """Prints what was lost, or would be, in merging."""
    console, whole = Console(highlight=False), shares(*rows)
    which, what = ("packing", "error of storing") if packed else ("rounding", "error of rounding")
    console.print(table(f"{what} merged weights, %", rows, lambda row: shares(row)[which] or 0.0))
    console.print(
        f"In all, of the norm of the merged weights: the update {whole['update']:.2%}, its rounding "
        f"{whole['rounding']:.3%}"
        + ("" if whole["packing"] is None else f"; stored as the base was, another {whole['packing']:.2%}")
    )


def show_products(rows: Sequence[Product]) -> None:
    """Prints the error of every product."""
    console = Console(highlight=False)
    console.print(table("error of x @ w against the model that is not quantised, %", rows, lambda r: r.error))
    console.print(f"In all: {errors.total(rows, 'squared'):.3%}")


def products(found: Target, examples: Examples, how: Execution) -> list[Product]:
    """The error of every product of the target's base in few bits, on its data. Raises ConfigError."""
    if chosen(found.config.quant) is None:
        raise ConfigError("--products: the target is not quantised while it is loaded; say how: quant.method=int8")
    plain = changed(found.config, ["quant.method=none"])
    (packed, _), (dense, _) = (target.load(Target(config, None), how.mesh) for config in (found.config, plain))
    scored = score.make_score(dense.config, dtype=dense.params["embed"]["tokens"].dtype, execution=how)
    batches = Loader(examples, found.config.data, batch_rows=found.config.train.batch)
    rows = (prefetch.split(batches.batch(i), 1) for i in range(min(BATCHES, batches.batches_per_epoch)))
    return errors.products(
        dense.params,
        packed.params,
        dense.names,
        ({name: value[0] for name, value in batch.items()} for batch in rows),
        lambda params, batch: scored("policy", params, batch)["logp"],
    )
