"""The times of a system's steps, from a run of ``deltaserve bench serve`` on DeltaServe.

Two kinds of numbers hide in a run. What a step costs is a straight line through the server's own
counters, which tell between any two looks at them how many steps there were, how long they took,
and what was in them. What lies outside of steps (HTTP, messages between processes) nobody counts:
the run is simulated a few times, and what its median TPOT and TTFT lack is added.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltaserve.bench.load.result import document
from deltaserve.bench.load.workload import Workload, make_workload
from deltaserve.bench.simulate.simulate import simulate
from deltaserve.bench.simulate.system import Measured, System
from deltaserve.errors import ConfigError

ROUNDS = 6
FEWEST = 8
"""Looks at the server with steps between them, of which a line can be made."""
COUNTERS = (
    "steps",
    "plan_s",
    "execute_s",
    "commit_s",
    "prompt_tokens",
    "cached_tokens",
    "generation_tokens",
    "delta_segments",
)


@dataclass(frozen=True)
class Calibration:
    """The system with its times; explained: share of the variance of the steps' time that the
    line has. ttft, tpot, throughput: simulated over measured, of this very run."""

    system: System
    explained: float
    ttft: float
    tpot: float
    throughput: float

    def lines(self) -> Iterator[str]:
        found = self.system.measured
        assert found is not None
        yield (
            f"a step takes {1e3 * found.step:.2f} ms, + {1e3 * found.delta:.2f} for each delta, "
            f"+ {1e3 * found.drawn_token:.3f} for each row, "
            f"+ {1e3 * found.prompt_token:.3f} for each token of a prompt"
        )
        yield f"that explains {self.explained:.1%} of what differs between the steps' times"
        yield (
            f"outside of steps: {1e3 * self.system.request_s:.1f} ms for a request, "
            f"{1e3 * self.system.between_s:.2f} ms between two steps"
        )
        yield (
            f"this run simulated, over measured: TTFT p50 {self.ttft:.2f}, TPOT p50 "
            f"{self.tpot:.2f}, tokens/s {self.throughput:.2f}"
        )


def calibrate(system: System, result: Mapping[str, Any]) -> Calibration:
    """Raises ConfigError: the result has not what is needed, or is of another system."""
    line, explained = fit_steps(result)
    workload = _workload(result)
    wanted = _medians(result["summary"])
    system = dataclasses.replace(system, measured=line, request_s=0.0, between_s=0.0)
    system = _between_steps(system, workload, wanted[1])
    found = _medians(_simulated(system, workload))
    if found[0] < wanted[0]:
        system = dataclasses.replace(system, request_s=wanted[0] - found[0])
        found = _medians(_simulated(system, workload))
    ratios = [a / b for a, b in zip(found, wanted, strict=True)]
    return Calibration(system, explained, *ratios)


def _between_steps(system: System, workload: Workload, tpot: float) -> System:
    """With the time between two steps that gives this median TPOT, found by bisection: where
    requests queue, a little more of it makes TPOT much longer."""
    low, high = 0.0, tpot - _medians(_simulated(system, workload))[1]
    if high <= 0:
        return system
    for _ in range(ROUNDS):
        middle = dataclasses.replace(system, between_s=(low + high) / 2)
        if _medians(_simulated(middle, workload))[1] < tpot:
            low = middle.between_s
        else:
            high = middle.between_s
    return dataclasses.replace(system, between_s=(low + high) / 2)


def fit_steps(result: Mapping[str, Any]) -> tuple[Measured, float]:
    """(seconds of a step as a line, share of the variance that it explains)."""
    features, seconds = _windows(result)
    if len(seconds) < FEWEST:
        raise ConfigError(
            f"the result has {len(seconds)} looks at a busy server, {FEWEST} are needed: measure "
            "for longer, or look more often (scrape: 0.25)"
        )
    weights, rest = _least_squares(features, seconds)
    spread = float(((seconds - seconds.mean()) ** 2).sum())
    return Measured(*weights.tolist()), 1 - rest / spread if spread else 1.0


def _windows(result: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """([windows, 4] steps, prompt tokens, rows of one token, deltas; [windows] seconds)."""
    over_time = result["server"]["over_time"]
    values = over_time["values"]
    if missing := [name for name in COUNTERS if f"stats.{name}" not in values]:
        raise ConfigError(
            f"the result has no stats.{missing[0]}: only a run on this version of DeltaServe can "
            "calibrate"
        )
    counted = np.array([values[f"stats.{name}"] for name in COUNTERS], dtype=float)
    looked = ~np.isnan(counted).any(axis=0)
    counted, times = counted[:, looked], np.array(over_time["seconds"])[looked]
    steps, *spent, prompt, cached, drawn, deltas = np.diff(counted, axis=1)
    # A prompt's last token draws one as well: that row is counted with the prompt.
    begun, _ = np.histogram(result["requests"]["first"], bins=times) if len(times) > 1 else ((), 0)
    features = np.stack([steps, prompt - cached, np.maximum(drawn - begun, 0), deltas], axis=1)
    busy = steps > 0
    return features[busy], sum(spent)[busy]


def _least_squares(features: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, float]:
    """(weights, none of them negative; what is left, squared). Of four features, all 15 subsets
    are tried: the best that has no negative weight."""
    count = features.shape[1]
    best, least = np.zeros(count), float((wanted**2).sum())
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            weights, *_ = np.linalg.lstsq(features[:, chosen], wanted, rcond=None)
            rest = float(((features[:, chosen] @ weights - wanted) ** 2).sum())
            if (weights >= 0).all() and rest < least:
                best, least = np.zeros(count), rest
                best[list(chosen)] = weights
    return best, least


def _workload(result: Mapping[str, Any]) -> Workload:
    content = dict(result["workload"]) | {"alone": False, "thresholds": []}
    return make_workload(content, "the result's workload")


def _simulated(system: System, workload: Workload) -> Mapping[str, Any]:
    return document(simulate(system, workload, lambda name, run: None))["summary"]


def _medians(summary: Mapping[str, Any]) -> tuple[float, float, float]:
    """TTFT, TPOT, tokens per second."""
    if not summary["ttft"] or not summary["tpot"]:
        raise ConfigError("the run has no answers of several tokens: nothing to calibrate with")
    return summary["ttft"]["p50"], summary["tpot"]["p50"], summary["output_throughput"]
