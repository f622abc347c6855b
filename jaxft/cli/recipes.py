"""`jaxft recipes`: the shipped configs, each with its first line and its command; with a name, that config's text."""

import argparse

from rich.console import Console
from rich.table import Table

from jaxft import recipes


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds an optional recipe name."""
    parser.add_argument("name", nargs="?", help="print this config: `jaxft recipes sft_lora > my.yaml` makes your own")


def command(args: argparse.Namespace) -> int:
    """Prints the table, or one recipe."""
    if args.name:
        print(recipes.find(args.name).read_text(encoding="utf-8"), end="")
        return 0
    table = Table("recipe", "what it does", "command", box=None, pad_edge=False, header_style="bold")
    for recipe in recipes.every():
        what = [
            recipe.title,
            *(f"{fact}: {recipe.facts[fact]}" for fact in ("hardware", "time", "score") if fact in recipe.facts),
        ]
        table.add_row(recipe.name, "\n".join(what), recipe.facts.get("command", f"jaxft train {recipe.name}"))
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, 200)
    console.print(table)
    return 0
