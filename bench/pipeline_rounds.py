"""Coordinated rounds against consumers that bucket on their own: how long synchronous steps take.

A step takes as long as its slowest consumer. Each padded shape is timed once, forward and backward
of a small Llama on this machine; the times of steps are put together from these.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from deltaserve.bench.pipeline_service_plans import random_lengths
from deltaserve.pipeline import Plan
from deltaserve.pipeline.iterator import Pipeline, prepare
from deltaserve.pipeline.service.ledger import JobSpec
from deltaserve.pipeline.service.program import (
    HostedOptions,
    Program,
    ShardExecutor,
    hosted_elements,
)
from deltaserve.pipeline.service.rounds import Cost

CONSUMERS, BATCH, ROOM = 8, 8, 4096
BOUNDARIES = (32, 64, 128, 256, 512, 1024)


def measure_padded(folder: Path) -> dict[str, Any]:
    plan = random_lengths(folder, 16_000)
    padded = plan.bucket(BOUNDARIES).batch(BATCH, pad=0)
    together = [_lengths(round_) for round_ in _rounds(padded, Cost())]
    alone = _independent(padded)
    return {
        "consumers": CONSUMERS,
        "rows of a batch": BATCH,
        "lengths": "lognormal, median 200, sigma 1.0, 16 to 2048",
        "steps": [len(together), len(alone)],
        "measured seconds of all steps, coordinated": round(_seconds(together), 2),
        "measured seconds of all steps, own buckets": round(_seconds(alone), 2),
        "times faster, measured": round(_seconds(alone) / _seconds(together), 2),
        "times faster, if cost were linear": round(
            sum(map(max, alone)) / sum(map(max, together)), 2
        ),
    }


def measure_packed(folder: Path, rows: int = 40_000) -> dict[str, Any]:
    """Counted, not timed: the dearest row of a round against the mean of its rows."""
    plan = random_lengths(folder, rows, longest=ROOM).pack(ROOM)
    return {
        "consumers": CONSUMERS,
        "lengths": f"lognormal, median 200, sigma 1.0, 16 to {ROOM}, packed in {ROOM}",
        "max/mean cost of a round": {
            f"attention at {share} of the linear work of a full row": _packed(plan, share)
            for share in (0.25, 0.5, 1.0)
        },
    }


def _rounds(plan: Plan, cost: Cost) -> list[list[Any]]:
    options = HostedOptions(cost=cost).text()
    program = Program.of(plan)
    spec = JobSpec("bench", program.stream, "rounds", consumers=CONSUMERS, options=options)
    return list(hosted_elements(program, spec, 0))


def _lengths(round_: list[Any]) -> list[int]:
    return [int(batch["input_ids"].shape[1]) for batch in round_]


def _independent(plan: Plan) -> list[list[int]]:
    """Each consumer with its share of the rows, in buckets of its own."""
    prepared = prepare(plan)
    streams = [
        Pipeline(prepared, "", ShardExecutor(member, CONSUMERS), None, None)
        for member in range(CONSUMERS)
    ]
    # As long as all have one; the ends differ by a few.
    return [_lengths(list(step)) for step in zip(*streams, strict=False)]


def _seconds(steps: list[list[int]]) -> float:
    return sum(max(_step_seconds(-(-length // 64) * 64) for length in step) for step in steps)


@cache
def _step_seconds(length: int) -> float:
    import torch

    model = _model()
    ids = torch.ones(BATCH, length, dtype=torch.long)
    times = []
    for _ in range(2):
        began = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        times.append(time.perf_counter() - began)
    return min(times)


@cache
def _model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _packed(plan: Plan, share: float) -> dict[str, float]:
    cost = Cost(1.0, share / ROOM)

    def ratio(rounds: list[list[Any]]) -> float:
        costs = [[cost.of(row["seq_lengths"]) for row in round_] for round_ in rounds]
        return round(float(np.mean([max(each) / np.mean(each) for each in costs])), 4)

    with Pipeline(prepare(plan), "", ShardExecutor(0, 1), None, None) as pipeline:
        rows = list(pipeline)
    plain = [rows[at : at + CONSUMERS] for at in range(0, len(rows) - CONSUMERS + 1, CONSUMERS)]
    return {"as packed": ratio(plain), "coordinated": ratio(_rounds(plan, cost))}
