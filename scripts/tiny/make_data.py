"""Write the data sets of the embedded default, all from seeds: run `python -m scripts.tiny.make_data --help`.

Two outputs:

`--corpus FILE` writes the pretraining corpus, `{"text": ...}` a line, of about `--mb` megabytes. It is not
committed. The bytes depend on the seed and the size alone, not on `--workers`.

`--assets DIR` (assets/data) writes the small, committed sets. Each `_train` has a `_heldout` whose exercises are
disjoint from it and from the corpus, by instance (see task.py):

    quickstart_*.jsonl   {"messages"}: one question, one answer, of the tasks that the quickstart teaches
    chat_*.jsonl         {"messages"}: all tasks, one to three turns, some with greetings or a system prompt
    preference_*.jsonl   {"prompt", "chosen", "rejected"}: messages; rejected is wrong, wordy, or no answer
    steps_*.jsonl        {"prompt", "completions", "labels"}: an answer item by item, right up to the first slip
    prompts_*.jsonl      {"prompt", "answer", "task"}: messages; the completion, stripped, must equal answer
    domain_*.jsonl       {"text"}: the pilot's log, the second domain (sea.py)
    general_heldout.jsonl  {"text"}: documents like the corpus's, on held-out exercises: to measure forgetting
    skills_heldout.jsonl   {"prompt", "answer", "task"}: a worksheet line as text up to the answer: what the base can do

Provenance: every line is made by this folder's grammars and word lists, and is under the repository's licence.
"""

import argparse
import functools
import json
import multiprocessing
import pathlib
import random
from collections.abc import Callable, Iterator

from scripts.tiny import chats, documents, sea
from scripts.tiny.tasks import QUICKSTART, TASKS

CHUNK_BYTES = 1_000_000
ALL = tuple(TASKS.values())
QUICKSTART_TASKS = tuple(TASKS[name] for name in QUICKSTART)
LISTS = tuple(TASKS[name] for name in ("sort_numbers", "reverse_words", "remove_word", "replace_word"))


def corpus_chunk(seed: int, limit: int, index: int) -> str:
    """About `limit` bytes of documents, as jsonl: chunk `index` of the corpus."""
    rng = random.Random(f"corpus {seed} {index}")
    lines, size = [], 0
    while size < limit:
        lines.append(json.dumps({"text": documents.document(rng)}))
        size += len(lines[-1]) + 1
    return "\n".join(lines) + "\n"


def write_corpus(path: pathlib.Path, *, megabytes: float, seed: int = 0, workers: int = 1) -> None:
    """The pretraining corpus in one jsonl file; chunks in order, whatever the number of workers."""
    limit = min(CHUNK_BYTES, int(megabytes * 1_000_000))
    chunks = max(1, round(megabytes * 1_000_000 / limit))
    path.parent.mkdir(parents=True, exist_ok=True)
    make = functools.partial(corpus_chunk, seed, limit)
    with path.open("w") as file:
        if workers == 1:
            file.writelines(map(make, range(chunks)))
        else:
            with multiprocessing.get_context("spawn").Pool(workers) as pool:
                file.writelines(pool.imap(make, range(chunks)))


def distinct(make: Callable[[random.Random], chats.Row], rng: random.Random) -> Iterator[chats.Row]:
    """Rows without repetition."""
    seen = set()
    while True:
        row = make(rng)
        line = json.dumps(row)
        if line not in seen:
            seen.add(line)
            yield row


def asset_rows(scale: float = 1.0, seed: int = 0) -> dict[str, list[chats.Row]]:
    """Every committed set by file name; `scale` shortens them all, for tests."""
    makers = {
        "quickstart": (functools.partial(chats.chat, QUICKSTART_TASKS), 5000, 480),
        "chat": (functools.partial(chats.conversation, ALL), 4000, 400),
        "preference": (functools.partial(chats.preference, ALL), 2500, 300),
        "steps": (functools.partial(chats.stepwise, LISTS), 2500, 300),
        "prompts": (functools.partial(chats.verifiable, ALL), 4000, 620),
    }
    plan: dict[str, tuple[Callable[[random.Random], chats.Row], int]] = {}
    for name, (make, train, held) in makers.items():
        plan[f"{name}_train"] = (functools.partial(make, held=False), train)
        plan[f"{name}_heldout"] = (functools.partial(make, held=True), held)
    plan["domain_train"] = (lambda rng: {"text": sea.log(rng)}, 500)
    plan["domain_heldout"] = (lambda rng: {"text": sea.log(rng)}, 60)
    plan["general_heldout"] = (lambda rng: {"text": documents.document(rng, held=True)}, 200)
    plan["skills_heldout"] = (functools.partial(chats.skill, ALL, held=True), 620)
    rows = {}
    for name, (make, count) in plan.items():
        source = distinct(make, random.Random(f"{name} {seed}"))
        rows[name] = [next(source) for _ in range(max(1, int(count * scale)))]
    return rows


def write_assets(folder: pathlib.Path, *, scale: float = 1.0, seed: int = 0) -> None:
    """The committed sets, one jsonl file each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in asset_rows(scale, seed).items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=pathlib.Path, help="write the pretraining corpus to this file")
    parser.add_argument("--mb", type=float, default=200, help="size of the corpus in megabytes (default 200)")
    parser.add_argument("--assets", type=pathlib.Path, help="write the small sets to this folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes that write the corpus")
    args = parser.parse_args()
    if args.corpus is None and args.assets is None:
        parser.error("nothing to do: give --corpus FILE, --assets DIR or both")
    if args.corpus is not None:
        write_corpus(args.corpus, megabytes=args.mb, seed=args.seed, workers=args.workers)
    if args.assets is not None:
        write_assets(args.assets, seed=args.seed)


if __name__ == "__main__":
    main()
