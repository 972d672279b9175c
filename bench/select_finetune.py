"""Does selection pay? A polluted pool, a tenth of it, a fine-tune of the demo's base.

The pool of a task: 60 % samples once, 20 % copies of those, 20 % with the answer of another
sample. What is selected from is text alone; which samples are polluted is only counted
afterwards. A selection's utility is the loss of the base less that of a proxy (RHO-loss):
the base tuned on a random tenth of the *other* half of the same polluted pool, so that no
clean data is used and no proxy scores what it has seen.

    random            what everybody does first
    top utility       the highest losses beyond the proxy's, and nothing else
    selected          Selector with that utility: copies removed, worth less likeness
    clean (oracle)    a random tenth of the unpolluted samples, by looking at the marks

    python -m deltaserve.bench.select_finetune --out bench/results/select_finetune.json
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deltaserve.bench.record import record
from deltaserve.demo.family import load_base
from deltaserve.demo.fit import fit
from deltaserve.demo.recipe import Recipe, Schedule
from deltaserve.demo.score import exact_match
from deltaserve.demo.tasks import TASKS, Example
from deltaserve.demo.train import HELD_OUT_SEED, build_family
from deltaserve.select.pool import Pool
from deltaserve.select.selector import Selector
from deltaserve.select.tokens import ModelOptions
from deltaserve.select.utility import score_samples

SHARE = 0.1
CLEAN, COPY, NOISE = 0, 1, 2
HELD_OUT = 256


@dataclass(frozen=True)
class Polluted:
    """examples [n] and what each is (CLEAN, COPY, NOISE); marks are for counting only."""

    examples: list[Example]
    marks: np.ndarray


def pollute(task: str, size: int, seed: int) -> Polluted:
    """60 % once, 20 % copies of those, 20 % with another's answer, in random order."""
    rng = random.Random(f"pool/{task}/{seed}")
    fifth = size // 5
    unique = TASKS[task].examples("train", size - fifth, seed)
    clean, wrong = unique[fifth:], unique[:fifth]
    noise = [Example(e.prompt, _other_answer(e, unique, rng)) for e in wrong]
    examples = [*clean, *rng.choices(clean, k=fifth), *noise]
    marks = np.repeat([CLEAN, COPY, NOISE], [len(clean), fifth, fifth])
    order = rng.sample(range(size), size)
    return Polluted([examples[i] for i in order], marks[order])


def _other_answer(example: Example, others: Sequence[Example], rng: random.Random) -> str:
    while (answer := rng.choice(others).answer) == example.answer:
        pass
    return answer


def tune(base: Path, examples: Sequence[Example], schedule: Schedule, seed: int) -> Any:
    """The base, tuned on the examples: epoch after epoch in random order."""
    model, tokenizer = load_base(base)
    fit(model, tokenizer, _epochs(examples, seed), schedule, lambda done: None)
    return model, tokenizer


def _epochs(examples: Sequence[Example], seed: int) -> Iterator[Example]:
    rng = random.Random(f"epochs/{seed}")
    while True:
        yield from rng.sample(examples, len(examples))


def utilities(base: Path, pool: Pool, polluted: Polluted, schedule: Schedule, seed: int) -> Any:
    """Loss of the base less that of a proxy that has not seen the sample: float64 [n]."""
    n, rng = len(pool), np.random.default_rng(seed)
    half = rng.permutation(n) < n // 2
    proxy_loss = np.empty(n)
    for side in (False, True):
        rows = rng.permutation(np.flatnonzero(half == side))[: round(SHARE * n)]
        proxy = tune(base, [polluted.examples[i] for i in rows], schedule, seed)
        proxy_loss[half != side] = losses(pool, *proxy)[half != side]
    return losses(pool, *load_base(base)) - proxy_loss


def losses(pool: Pool, model: Any, tokenizer: Any) -> np.ndarray:
    options = ModelOptions("in memory", batch_tokens=4096)
    return score_samples(pool.samples(), len(pool), model, tokenizer, options)["loss"]


def selections(
    base: Path, pool: Pool, polluted: Polluted, utility: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """Rows of each way to choose a tenth."""
    k, rng = round(SHARE * len(pool)), np.random.default_rng(seed + 1000)
    order = rng.permutation(len(pool))
    selector = Selector(k, utility=utility, embed=str(base), seed=seed).fit(pool)
    return {
        "random": order[:k],
        "top utility": np.argsort(-utility, kind="stable")[:k],
        "selected": selector.rows_,
        "clean (oracle)": order[polluted.marks[order] == CLEAN][:k],
    }


def run_seed(base: Path, task: str, size: int, schedule: Schedule, seed: int) -> dict[str, Any]:
    polluted = pollute(task, size, seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pool.jsonl"
        path.write_text("".join(_line(example) for example in polluted.examples))
        pool = Pool(path)
        utility = utilities(base, pool, polluted, schedule, seed)
        chosen = selections(base, pool, polluted, utility, seed)
    held_out = TASKS[task].examples("held_out", HELD_OUT, HELD_OUT_SEED)
    results = {}
    for name, rows in chosen.items():
        model, tokenizer = tune(base, [polluted.examples[i] for i in rows], schedule, seed)
        results[name] = {
            "exact_match": exact_match(model, tokenizer, held_out),
            "noise": float((polluted.marks[rows] == NOISE).mean()),
            "repeated": 1 - len(set(pool.contents[rows].tolist())) / len(rows),
        }
        print(f"{task} seed {seed} {name}: {results[name]}", file=sys.stderr)
    return results


def _line(example: Example) -> str:
    turns = (("user", example.prompt), ("assistant", example.answer))
    messages = [{"role": role, "content": content} for role, content in turns]
    return json.dumps({"messages": messages}) + "\n"


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and spreads over seeds; the margin over random, seed by seed."""
    rows: dict[str, Any] = {}
    for name in runs[0]:
        scores = [run[name]["exact_match"] for run in runs]
        margins = [run[name]["exact_match"] - run["random"]["exact_match"] for run in runs]
        rows[name] = {
            "exact_match": scores,
            "mean": statistics.fmean(scores),
            "sd": statistics.stdev(scores) if len(scores) > 1 else None,
            "margin_over_random": margins,
            "margin_mean": statistics.fmean(margins),
            "margin_sd": statistics.stdev(margins) if len(margins) > 1 else None,
            "noise": statistics.fmean(run[name]["noise"] for run in runs),
            "repeated": statistics.fmean(run[name]["repeated"] for run in runs),
        }
    return rows


def show(task: str, size: int, seeds: int, rows: dict[str, Any]) -> None:
    print(f"\n{task}: {size} samples, a tenth selected, {seeds} seeds")
    print(f"{'':<22}{'exact match':>14}{'over random':>16}{'noise':>8}{'repeated':>10}")
    for name, row in rows.items():
        print(
            f"{name:<22}{row['mean']:>8.1%} ±{row['sd'] or 0:>4.1%}"
            f"{row['margin_mean']:>+9.1%} ±{row['margin_sd'] or 0:>4.1%}"
            f"{row['noise']:>8.1%}{row['repeated']:>10.1%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tasks", default="add,reverse", help="comma-separated")
    parser.add_argument("--size", type=int, default=6000, help="samples in the pool (default 6000)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write a JSON file as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = build_family().base
    schedules = {member.task: member.schedule for member in Recipe().members}
    tasks, start = args.tasks.split(","), time.perf_counter()
    runs: dict[str, list[dict[str, Any]]] = {task: [] for task in tasks}
    # Seed by seed over all tasks: an interrupted run leaves as many seeds of each.
    for seed in range(args.seeds):
        for task in tasks:
            runs[task].append(run_seed(base, task, args.size, schedules[task], seed))
        results = {task: summary(found) for task, found in runs.items()}
        if args.out:
            command = (
                f"python -m deltaserve.bench.select_finetune --tasks {args.tasks} "
                f"--size {args.size} --seeds {seed + 1}"
            )
            record(args.out, command, results)
    for task, rows in results.items():
        show(task, args.size, args.seeds, rows)
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
