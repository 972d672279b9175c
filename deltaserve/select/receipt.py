"""The receipt of a selection: what was asked, of what, with what, and how good the answer is."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import numpy as np

from deltaserve import __version__
from deltaserve.select.policies import Choice
from deltaserve.select.prepare import Prepared
from deltaserve.select.settings import Settings
from deltaserve.select.solve import Problem, Selection
from deltaserve.select.store import digest

FORMAT = "deltaserve-selection/1"
LIBRARIES = ("numpy", "numba", "faiss-cpu", "pyarrow", "torch", "transformers")


def make_receipt(
    settings: Settings,
    ready: Prepared,
    choice: Choice,
    solved: Selection | None,
    compared: dict[str, Any],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """For receipt.json. solved: None if a policy chose."""
    pool = ready.pool
    return {
        "format": FORMAT,
        "settings": settings.to_json(),
        "pool": {
            "inputs": [source.name for source in pool.inputs],
            "samples": len(pool),
            "candidates": len(ready.rows),
            "digest": pool.digest,
        },
        **ready.facts,
        "problem": ready.problem.digest,
        "selected": len(choice.rows),
        "selection": digest(ready.rows[choice.rows]),
        **compared,
        "bounded": solved.bounded if solved else None,
        "monotone share": monotone_share(ready.problem),
        "log": solved.log if solved else [],
        "explanation": explain(settings, ready, solved, compared),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    found = {"deltaserve": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # faiss has several distributions
            found[name] = "unknown"
    return found


def monotone_share(problem: Problem) -> float:
    """Share of samples that add something even to all others: alpha u >= beta sum of s. Where it
    is 1, f is monotone, and greedy is within 1 - 1/e of the best set."""
    assert problem.beta is not None
    good = 0
    for shard in problem.graph.shards:
        rows = np.repeat(np.arange(shard.stop - shard.start), np.diff(shard.indptr))
        sums = np.bincount(rows, weights=shard.weights, minlength=shard.stop - shard.start)
        worth = problem.alpha * problem.utility[shard.start : shard.stop]
        good += int((worth >= problem.beta * sums).sum())
    return good / problem.graph.num_points


def explain(
    settings: Settings, ready: Prepared, solved: Selection | None, compared: dict[str, Any]
) -> list[str]:
    """Sentences for people."""
    lines = []
    facts, count = ready.facts, len(ready.rows)
    removed = facts.get("duplicates", {}).get("removed", 0)
    if removed:
        lines.append(
            f"{removed:,} duplicates were removed ({facts['duplicates']['by']}); {count:,} "
            "candidates remain."
        )
    recall = facts["graph"].get("recall", 1.0)
    lines.append(
        f"Neighbours by {facts['embeddings']['from']}: {facts['graph']['edges']:,} pairs, recall "
        f"{recall:.1%} on {facts['graph'].get('recall_on', 0):,} samples."
    )
    if recall < 0.9:
        lines.append("The recall is low: --index flat compares all pairs.")
    if solved is not None:
        lines.append(_bounding(settings, solved, count))
        lines += _cautions(settings, ready)
    score = compared["score"]
    if score is not None:
        lowest = min(compared["baselines"], key=lambda n: compared["baselines"][n]["objective"])
        lines.append(
            f"Score {score:.1f}: 0 is the lowest baseline ({lowest}), 100 centralised greedy."
        )
    return lines


def _bounding(settings: Settings, solved: Selection, count: int) -> str:
    if solved.bounded is None:
        skipped = [e for e in solved.log if e["verb"] == "bounding skipped"]
        return f"Bounding was skipped: {skipped[0]['reason']}." if skipped else "No bounding."
    inside, outside = solved.bounded["included"], solved.bounded["excluded"]
    share = (inside + outside) / count
    if not inside + outside:
        return (
            "Bounding decided nothing: what a sample adds depends on the others throughout. That "
            "is usual where similarity weighs much (alpha of 0.5 or less), where all are worth the "
            "same, or where half of the pool is asked for; the solver decided everything."
        )
    surely = "are in every best set" if settings.bounding == "exact" else "were taken"
    never = "in none" if settings.bounding == "exact" else "left out, by an estimate"
    return (
        f"Bounding decided {share:.1%} of the candidates: {inside:,} {surely}, {outside:,} "
        f"{never}; the solver chose among the other {solved.bounded['undecided']:,}."
    )


def _cautions(settings: Settings, ready: Prepared) -> list[str]:
    found = []
    k, count = ready.problem.limits.k, ready.problem.graph.num_points
    if settings.solver == "partition" and settings.partitions >= 8 and 2 * k >= count:
        found.append(
            "Partition greedy loses much when half of the pool or more is selected with 8 "
            "partitions or more; the solver dominance does not."
        )
    if settings.bounding == "approximate" and settings.alpha <= 0.5:
        found.append("Bounding hardly ever decides anything at alpha of 0.5 or less.")
    return found
