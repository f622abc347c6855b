"""What the embedded model learns of a domain and forgets of what it knew, by what is done about it: the table of
docs/forgetting.md. Run `python -m scripts.tiny.forgetting`; a run that is there already is not repeated.

Each run is `configs/domain.yaml`, shortened, with the settings of its row. What is replayed, and what the Fisher
information is measured on, are documents like those that the model was pretrained on, made here: none of them, and no
exercise in them, is in the general held-out set.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

OUT = Path("runs/forgetting")
GENERAL = OUT / "general.jsonl"
DOCUMENTS = 250
SHORT = ("train.batch=4", "train.steps=32", "eval.batches=8", "log.progress=false")
LORA = ("peft.method=lora", "peft.alpha=32", "optim.lr=3e-3")
TASK = "{path: assets/data/domain_train.jsonl, eval_path: assets/data/domain_heldout.jsonl, weight: 3}"
REPLAY = (
    'data.path=""', "data.eval_path=null",
    f"data.sources={{domain: {TASK}, general: {{path: {GENERAL}, weight: 1}}}}",
)  # fmt: skip
ROWS = {
    "full": (),
    "full, a third of the rate": ("optim.lr=3e-4",),
    "full, optim.l2_start=0.01": ("optim.l2_start=0.01",),
    "full, optim.ewc=10": ("optim.ewc=10", f"optim.ewc_data={GENERAL}", "optim.ewc_examples=64"),
    "full, objective.kl_to_start=0.1": ("objective.kl_to_start=0.1",),
    "full, a quarter of replay": REPLAY,
    "full, a quarter of replay, objective.kl_to_start=1 on it": (
        *REPLAY, "objective.kl_to_start=1", "objective.kl_sources=[1]",
    ),
    "LoRA, rank 16": LORA,
    "LoRA, rank 2": (*LORA, "peft.rank=2", "peft.alpha=4"),
}  # fmt: skip
METRICS = ("eval_perplexity", "eval_general_perplexity")


def folder(name: str, seed: int) -> Path:
    """Where a row's run of one seed is."""
    return OUT / f"{''.join(c if c.isalnum() else '-' for c in name)}-{seed}"


def evaluations(run: Path) -> list[dict[str, float]]:
    """The lines of a finished run that hold held-out metrics: the first before training, the last at its end."""
    if not (run / "model").exists() and not (run / "adapter").exists():
        return []
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if METRICS[0] in line]


def train(name: str, seed: int) -> None:
    """One run, unless it is there."""
    run = folder(name, seed)
    if evaluations(run):
        return
    words = [*SHORT, *ROWS[name], f"train.seed={seed}", f"data.seed={seed}", f"run_dir={run}", "resume=true"]
    subprocess.run([sys.executable, "-m", "jaxft", "train", "configs/domain.yaml", *words], check=True)


def cell(values: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def table(names: list[str], seeds: list[int]) -> str:
    """Perplexity on both held-out sets after each row's runs, in Markdown."""
    ends = {name: [found[-1] for seed in seeds if (found := evaluations(folder(name, seed)))] for name in names}
    begun = next(found for name in names for seed in seeds if (found := evaluations(folder(name, seed))))[0]
    lines = [["", "domain", "general"], ["---"] * 3, ["before", *(f"{begun[m]:.4g}" for m in METRICS)]]
    lines += [[name, *(cell([end[m] for end in ends[name]]) for m in METRICS)] for name in names if ends[name]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME")
    args = parser.parse_args()
    if not GENERAL.exists():
        OUT.mkdir(parents=True, exist_ok=True)
        corpus = OUT / "corpus.jsonl"
        making = ["scripts.tiny.make_data", "--corpus", str(corpus), "--mb", "1", "--seed", "1"]
        subprocess.run([sys.executable, "-m", *making], check=True)
        some = corpus.read_text(encoding="utf-8").splitlines(keepends=True)[:DOCUMENTS]
        GENERAL.write_text("".join(some), encoding="utf-8")
    for seed in args.seeds:
        for name in args.rows:
            train(name, seed)
    print(table(args.rows, args.seeds))


if __name__ == "__main__":
    main()
