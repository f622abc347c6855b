"""Exact match per task of a model on the held-out exercises: `python -m scripts.tiny.score assets/tiny`.

Two sets: `skills` (worksheet lines, continued as text: what the base has learnt) and `prompts` (the same kinds of
exercise asked in a chat). On a worksheet the first line of the continuation counts, without a full stop, since a base
model goes on with the next exercise; in a chat the whole reply counts, and its end.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence

import jaxft
from scripts.tiny import task as tasklib
from scripts.tiny.tasks import EASY, TASKS

DATA = pathlib.Path(__file__).resolve().parents[2] / "assets" / "data"
MAX_NEW_TOKENS = 20  # the longest answer has 17


def first_line(continuation: str) -> str:
    """What a worksheet's continuation answers: its first line that is not empty, without a full stop."""
    return continuation.strip().partition("\n")[0].strip().removesuffix(".")


def score(rows: Sequence[dict], completions: Sequence[str]) -> dict[str, float]:
    """Share of right answers per task."""
    right: dict[str, list[bool]] = {}
    for row, said in zip(rows, completions, strict=True):
        said = first_line(said) if isinstance(row["prompt"], str) else said
        right.setdefault(row["task"], []).append(tasklib.correct(said, row["answer"]))
    return {name: sum(right[name]) / len(right[name]) for name in TASKS if name in right}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model's folder")
    parser.add_argument("--set", choices=("skills", "prompts"), default="skills")
    parser.add_argument("--limit", type=int, help="score so many rows only")
    args = parser.parse_args()
    rows = [json.loads(line) for line in (DATA / f"{args.set}_heldout.jsonl").read_text().splitlines()][: args.limit]
    model = jaxft.load(args.model, dtype="float32")
    prompts = [row["prompt"] for row in rows]
    shares = score(rows, model.generate(model.params, prompts, max_new_tokens=MAX_NEW_TOKENS, temperature=0.0))
    for name, share in shares.items():
        print(f"{name:16} {share:6.1%}{'  (easy)' if name in EASY else ''}")
    print(f"{'mean':16} {sum(shares.values()) / len(shares):6.1%}")


if __name__ == "__main__":
    main()
