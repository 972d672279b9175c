"""The scheduler's promises where a real model runs: siblings, refusals, tenants, timings."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace
from pathlib import Path

import pytest

from deltaserve.compress.run import compress
from deltaserve.engine.core import Engine
from deltaserve.engine.local import LocalClient
from deltaserve.engine.observe import StepCounters, UsageCounters
from deltaserve.engine.types import EngineRequest, FinishReason, SamplingParams
from deltaserve.errors import QueueFullError, RequestError
from tests.engine_helpers import BASE, greedy, make_engine, prompts, run
from tests.families import make_base, make_fine_tune

PROMPT = [7, 9, 11, 40, 41, 42, 43, 44, 45, 46]
TOKENS = 8


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("scheduling")
    base = make_base("llama", root / "base")
    compress(base, make_fine_tune(base, root / "tune", seed=1), root / "delta")
    return base, root / "delta"


def sampled(name: str, seed: int, fork_of: str | None = None) -> EngineRequest:
    params = SamplingParams(max_tokens=TOKENS, seed=seed)
    return EngineRequest(name, "tune", tuple(PROMPT), params, fork_of=fork_of)


@pytest.mark.parametrize("caching", [False, True])
def test_siblings_answer_as_if_they_were_alone(models: tuple[Path, Path], caching: bool) -> None:
    base, delta = models
    options = {"block_size": 4, "enable_prefix_caching": caching}
    family = [sampled(f"s{n}", n, "s0" if n else None) for n in range(4)]
    together = make_engine(base, {"tune": delta}, **options)
    answers = run(together, family).tokens
    for request in family:
        alone = make_engine(base, {"tune": delta}, **options)
        single = replace(request, fork_of=None)
        assert run(alone, [single]).tokens[request.request_id] == answers[request.request_id]
    assert len({tuple(answer) for answer in answers.values()}) > 1
    stats = together.stats()
    assert stats.cached_tokens == 3 * 8, "two full blocks for each but the first"
    assert stats.kv_blocks_used == 0
    together.scheduler.pool.check([])


def test_tenants_share_prefixes_only_where_it_is_configured(models: tuple[Path, Path]) -> None:
    for shared, cached in [(False, 8), (True, 16)]:
        engine = make_engine(models[0], {}, block_size=4, share_prefixes_between_tenants=shared)
        for name, tenant in [("a", "one"), ("b", "one"), ("c", "two")]:
            run(engine, [replace(greedy(name, BASE, PROMPT, 1), tenant=tenant)])
        assert engine.stats().cached_tokens == cached
        assert {name: row.requests for name, row in engine.stats().tenants.items()} == {
            "one": 2, "two": 1,
        }  # fmt: skip


def test_what_cannot_run_is_refused_by_name(models: tuple[Path, Path]) -> None:
    engine = make_engine(models[0], {}, max_model_len=16, max_queued_requests=1)
    fits = greedy("a", BASE, PROMPT[:1] * 15, 1)
    engine.check(fits)
    engine.add(fits)
    for change, message in [
        ({"request_id": "b"}, "the queue is full: 1 requests wait"),
        ({}, "'a' is in use"),
        ({"prompt_ids": ()}, "the prompt is empty"),
        ({"prompt_ids": (5,) * 16}, "maximum context length is 16"),
        ({"weight": 0.0}, "weight is 0.0, but must be positive"),
        ({"weight": float("nan")}, "weight is nan"),
    ]:
        with pytest.raises(RequestError, match=message):
            engine.check(replace(fits, **change))
    with pytest.raises(QueueFullError):
        engine.add(replace(fits, request_id="b"))
    while engine.has_work():
        engine.step()
    assert engine.stats().generation_tokens == 1, "a prompt up to the last token of the context"


def test_an_engine_with_an_objective_measures_its_bandwidth(models: tuple[Path, Path]) -> None:
    engine = make_engine(models[0], {"tune": models[1]}, slo_tpot_ms=1e-9)
    run(engine, [greedy("first", BASE, PROMPT, TOKENS)])
    assert (engine.stats().bytes_per_s or 0) > engine.base.num_bytes
    run(engine, [greedy(f"r{n}", ("tune", BASE)[n % 2], PROMPT, TOKENS) for n in range(4)])
    stats = engine.stats()
    assert stats.mixed_steps == 0, "once measured, one at a time is all that such an objective gets"
    assert stats.generation_tokens == 5 * TOKENS
    assert stats.execute_s > stats.plan_s + stats.commit_s > 0


def test_a_burst_of_submissions_is_refused_before_the_engine_sees_it(
    models: tuple[Path, Path],
) -> None:
    async def main() -> None:
        client = LocalClient(make_engine(models[0], {}, max_num_seqs=1, max_queued_requests=3))
        accepted = []
        for number in range(20):
            with contextlib.suppress(QueueFullError):
                client.submit(greedy(f"r{number}", BASE, PROMPT, 40))
                accepted.append(f"r{number}")
        assert 3 <= len(accepted) <= 6, "some may have been admitted meanwhile"
        for name in accepted:
            reasons = [event.finish_reason async for event in client.stream(name)]
            assert reasons[-1] is FinishReason.LENGTH
        client.submit(greedy("later", BASE, PROMPT, 1))
        assert [event async for event in client.stream("later")]
        await asyncio.to_thread(client.close)

    asyncio.run(main())


def test_watching_costs_little_of_a_step(models: tuple[Path, Path]) -> None:
    """At 32 rows; CPU time of the counting alone beside that of whole steps."""
    base, delta = models
    engine = make_engine(base, {"tune": delta}, max_num_seqs=32)
    for number, prompt in enumerate(prompts(32, vocab=90, longest=8)):
        request = greedy(f"r{number}", ("tune", BASE)[number % 2], prompt, 60)
        engine.add(replace(request, tenant=f"t{number % 8}"))
    while len(engine.scheduler.running) < 32 or engine.scheduler.plan().num_tokens > 32:
        engine.step()
    steps = 20
    start = time.process_time()
    for _ in range(steps):
        engine.step()
    stepping = time.process_time() - start
    plan = engine.scheduler.plan()
    assert len(plan.rows) == 32
    start = time.process_time()
    for _ in range(steps):
        watch(engine, plan.rows)
        StepCounters().count(plan, 0.0, 0.0, 0.0)
    watching = time.process_time() - start
    print(f"watching takes {watching / stepping:.2%} of a step of {stepping / steps * 1e3:.2f} ms")
    assert watching <= 0.02 * stepping


def watch(engine: Engine, rows: tuple) -> None:
    """All that is done per step only to know what happened."""
    for _ in range(4):
        time.perf_counter()
    for row in rows:
        UsageCounters.drew(row.seq)
