"""The tokenizer that lies beside the weights, through `transformers` (never torch, never the repository's own code)."""

import shutil
from pathlib import Path
from typing import Any

from jaxft.checkpoint.errors import CheckpointError

# Any of these makes a directory one with a tokenizer.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
FILES = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATES = "additional_chat_templates"


def load(directory: Path) -> Any:
    """The directory's tokenizer (a `transformers` one), or None if it holds none. Raises CheckpointError if its files
    cannot be read."""
    if not any((directory / name).exists() for name in VOCABULARIES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError) as error:
        remedy = "Copy the model's tokenizer.json and tokenizer_config.json here, or give a tokenizer of your own."
        raise CheckpointError(directory, f"a tokenizer that does not load ({error})", "one", remedy) from error


def copy(source: Path, target: Path) -> None:
    """Copies every tokenizer file there is, unchanged."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, target / TEMPLATES)
