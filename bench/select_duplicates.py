"""How many copies are selected: pairwise against top utility, on a pool with 20 % exact copies.

The pool: samples of the demo's six tasks. Worth is the relevance to 32 held-out examples of one
task (RDS+), likeness the cosine of whitened hidden states, both of the demo's base.

    python -m deltaserve.bench.select_duplicates --out bench/results/select_duplicates.json
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from deltaserve.bench.record import record
from deltaserve.demo.tasks import TASKS, Example
from deltaserve.demo.train import HELD_OUT_SEED, build_family
from deltaserve.select.pool import Pool
from deltaserve.select.selector import Selector

TARGETS = 32
SHARE = 0.1
ALPHAS = (0.9, 0.7, 0.5)


def measure(base: Path, size: int, target: str, seed: int) -> dict[str, Any]:
    """Shares of copies among the selected tenth, and f of the sets."""
    rng = random.Random(f"copies/{seed}")
    copies = size // 5
    each = (size - copies) // len(TASKS)
    unique = [e for task in TASKS.values() for e in task.examples("train", each, seed)]
    everything = [*unique, *rng.choices(unique, k=copies)]
    wanted = TASKS[target].examples("held_out", TARGETS, HELD_OUT_SEED)
    k, row = round(SHARE * len(everything)), {"target": target, "seed": seed}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "pool.jsonl", rng.sample(everything, len(everything)))
        write(folder / "target.jsonl", wanted)
        pool = Pool(folder / "pool.jsonl")
        for alpha in ALPHAS:
            selector = Selector(
                k,
                alpha=alpha,
                utility="relevance",
                target=folder / "target.jsonl",
                embed=str(base),
                dedup=None,
                work=folder / "work",
                seed=seed,
            ).fit(pool)
            row[f"pairwise, alpha {alpha}"] = repeated(pool, selector.rows_)
            ready = selector.receipt_["baselines"]["top utility"]
            row[f"score of top utility, alpha {alpha}"] = ready["score"]
            row["top utility"] = repeated(pool, selector.baselines_["top utility"])
    return row


def repeated(pool: Pool, rows: np.ndarray) -> float:
    """The share of selected samples whose text was selected already."""
    return 1 - len(set(pool.contents[rows].tolist())) / len(rows)


def write(path: Path, examples: list[Example]) -> None:
    with path.open("w") as file:
        for example in examples:
            turns = (("user", example.prompt), ("assistant", example.answer))
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=6000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--targets", default="reverse,extract", help="tasks, comma-separated")
    parser.add_argument("--out", type=Path, help="write a JSON file as well")
    args = parser.parse_args()
    base = build_family().base
    results = []
    for target in args.targets.split(","):
        for seed in range(args.seeds):
            results.append(measure(base, args.size, target, seed))
            print(results[-1])
    if args.out:
        command = (
            f"python -m deltaserve.bench.select_duplicates --size {args.size} "
            f"--seeds {args.seeds} --targets {args.targets}"
        )
        record(args.out, command, results)


if __name__ == "__main__":
    main()
