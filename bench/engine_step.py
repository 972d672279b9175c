"""What a decode step costs, and how much of it is the engine's own: ``python -m
deltaserve.bench.engine_step``.

One process, no HTTP: 32 rows of a 30 M-parameter bf16 Llama with random weights decode together,
on the base alone, on one fine-tune and on eight, packed and merged. The share outside the model's
forward (plan, tensors of the step, sampling, commit) is the engine's overhead.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from deltaserve.bench.peer_models import VOCAB, PeerModels, build
from deltaserve.bench.record import record
from deltaserve.config import DeltaSource, EngineConfig
from deltaserve.engine.core import Engine
from deltaserve.engine.routing import Routing
from deltaserve.engine.runner import StepInput
from deltaserve.engine.types import EngineRequest, SamplingParams

PROMPT_TOKENS = 64
MERGE_BYTES = 4 << 30


@dataclass(frozen=True)
class StepCost:
    """Milliseconds of one decode step; ``forward_ms`` of them inside the model."""

    deltas: str
    num_models: int
    rows: int
    median_ms: float
    best_ms: float
    forward_ms: float

    @property
    def overhead(self) -> float:
        return 1 - self.forward_ms / self.median_ms


def measure(models: PeerModels, rows: int, tokens: int) -> list[StepCost]:
    found = []
    for label, merge in (("packed", 0), ("merged", MERGE_BYTES)):
        engine = Engine(_config(models, rows, merge))
        names = [delta.stem for delta in models.deltas]
        loads = [("none", ["base"])] if not merge else []
        loads += [(label, names[:1]), (label, names)]
        for deltas, served in loads:
            _decode(engine, served, rows, 4)  # warm up
            found.append(_cost(engine, deltas, served, rows, tokens))
    return found


def _config(models: PeerModels, rows: int, merge: int) -> EngineConfig:
    return EngineConfig(
        base=str(models.base),
        served_model_name="base",
        deltas=tuple(DeltaSource(delta.stem, str(delta)) for delta in models.deltas),
        max_num_seqs=rows,
        max_num_batched_tokens=rows * PROMPT_TOKENS,
        merge_memory_bytes=merge,
    )


def _cost(engine: Engine, deltas: str, served: Sequence[str], rows: int, tokens: int) -> StepCost:
    runner, inside = engine.runner, []
    forward, logits = runner.forward, runner.logits

    def timed_forward(inputs: StepInput) -> torch.Tensor:
        start = time.perf_counter()
        hidden = forward(inputs)
        inside.append(time.perf_counter() - start)
        return hidden

    def timed_logits(hidden_SD: torch.Tensor, routing: Routing) -> torch.Tensor:
        start = time.perf_counter()
        found = logits(hidden_SD, routing)
        inside[-1] += time.perf_counter() - start
        return found

    runner.forward, runner.logits = timed_forward, timed_logits  # type: ignore[method-assign]
    steps = _decode(engine, served, rows, tokens)
    runner.forward, runner.logits = forward, logits  # type: ignore[method-assign]
    return StepCost(
        deltas,
        len(served),
        rows,
        median_ms=1e3 * statistics.median(steps),
        best_ms=1e3 * min(steps),
        forward_ms=1e3 * statistics.median(inside[1:]),
    )


def _decode(engine: Engine, served: Sequence[str], rows: int, tokens: int) -> list[float]:
    """Seconds of each step in which all rows decode."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0)
    for i in range(rows):
        prompt = tuple((i * 997 + j * 31) % VOCAB for j in range(PROMPT_TOKENS))
        engine.add(EngineRequest(f"r{i}", served[i % len(served)], prompt, params))
    steps = []
    engine.step()  # the prompts
    while engine.has_work():
        start = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - start)
    return steps


def show(results: Sequence[StepCost]) -> None:
    print(f"{'deltas':<10}{'models':>7}{'rows':>6}{'median ms':>11}{'best ms':>9}{'tokens/s':>10}"
          f"{'outside forward':>17}")  # fmt: skip
    for r in results:
        rate = 1e3 * r.rows / r.median_ms
        print(
            f"{r.deltas:<10}{r.num_models:>7}{r.rows:>6}{r.median_ms:>11.1f}{r.best_ms:>9.1f}"
            f"{rate:>10.0f}{r.overhead:>17.1%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, help="keep the models here (default: temporary)")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, help="write a JSON file as well")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        results = measure(build(args.dir or Path(scratch), 8), args.rows, args.tokens)
    show(results)
    if args.out:
        command = (
            f"python -m deltaserve.bench.engine_step --rows {args.rows} --tokens {args.tokens}"
        )
        record(args.out, command, [asdict(r) | {"overhead": r.overhead} for r in results])


if __name__ == "__main__":
    main()
