"""What KV cache and deltas get, what is refused, and what happens when memory runs out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaserve.compress.plan import make_plan
from deltaserve.compress.run import compress
from deltaserve.config import EngineConfig
from deltaserve.engine import memory
from deltaserve.engine.memory import MemoryPlan, plan_memory, step_bytes
from deltaserve.engine.scheduler import StepPlan
from deltaserve.engine.types import EngineRequest, FinishReason, SamplingParams, TokenEvent
from deltaserve.errors import ConfigError
from tests.engine_helpers import greedy, make_engine, reference, run
from tests.families import make_base, make_fine_tune

GIB = 1 << 30
FREE, TOTAL = 60 * GIB, 80 * GIB


class Llama8B:
    """What of its configuration matters here."""

    hidden_size, intermediate_size, vocab_size = 4096, 14336, 128256
    num_hidden_layers, num_attention_heads, num_key_value_heads = 32, 32, 8
    head_dim, max_position_embeddings, rope_parameters = 128, 131072, None


def plan(
    monkeypatch: pytest.MonkeyPatch, *, device: str = "cuda", sizes: Any = (), **knobs: Any
) -> MemoryPlan:
    monkeypatch.setattr(memory, "free_memory", lambda _: FREE)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (FREE, TOTAL))
    config = EngineConfig(base="llama", **{"max_model_len": 8192, **knobs})
    return plan_memory(config, Llama8B(), torch.bfloat16, device, sizes)


def kv_bytes(found: MemoryPlan) -> int:
    return found.num_blocks * 16 * 32 * 2 * 8 * 128 * 2


def test_all_that_is_left_beside_the_largest_step_is_divided(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    found = plan(monkeypatch, sizes=[GIB] * 15)
    config = EngineConfig(base="llama", max_model_len=8192)
    step = step_bytes(config, Llama8B(), torch.bfloat16)
    assert GIB // 4 < step < 2 * GIB
    budget = FREE - int(TOTAL * (1 - config.gpu_memory_utilization)) - memory.GPU_RESERVE - step
    assert found.limits.device_bytes == 15 * GIB
    assert 0 <= budget - 15 * GIB - kv_bytes(found) < 16 * 32 * 2 * 8 * 128 * 2
    assert f"as much as {GIB // (32 * 2 * 8 * 128 * 2)} tokens of KV cache" in caplog.text
    assert "15 of that size fit at once" in caplog.text


def test_deltas_get_a_quarter_to_a_half(monkeypatch: pytest.MonkeyPatch) -> None:
    none, many = plan(monkeypatch), plan(monkeypatch, sizes=[GIB] * 99)
    assert kv_bytes(none) == pytest.approx(3 * none.limits.device_bytes, rel=0.01)
    assert kv_bytes(many) == pytest.approx(many.limits.device_bytes, rel=0.01)


def test_deltas_get_what_the_cache_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(monkeypatch, max_num_seqs=2, max_model_len=1024)
    assert kv_bytes(found) == 2 * 1024 * 32 * 2 * 8 * 128 * 2
    assert found.limits.device_bytes > 45 * GIB


def test_the_other_side_gets_what_one_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    given = plan(monkeypatch, kv_cache_memory_bytes=8 * GIB)
    assert kv_bytes(given) == 8 * GIB
    assert 41 * GIB < given.limits.device_bytes < 44 * GIB
    given = plan(monkeypatch, delta_memory_bytes=20 * GIB)
    assert given.limits.device_bytes == 20 * GIB
    assert 29 * GIB < kv_bytes(given) < 32 * GIB


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize(("kv", "deltas"), [(70, 1), (1, 70), (31, 31)])
def test_what_does_not_fit_is_refused_with_the_numbers(
    device: str, kv: int, deltas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs = {"kv_cache_memory_bytes": kv * GIB, "delta_memory_bytes": deltas * GIB}
    with pytest.raises(ConfigError, match=rf"{kv * GIB} bytes.*{deltas * GIB} bytes.*{FREE}"):
        plan(monkeypatch, device=device, **knobs)


def test_a_share_of_the_gpu_may_be_kept_free(monkeypatch: pytest.MonkeyPatch) -> None:
    all_, half = (plan(monkeypatch, gpu_memory_utilization=share) for share in (1.0, 0.5))
    gone = sum(kv_bytes(p) + p.limits.device_bytes for p in (all_,))
    gone -= kv_bytes(half) + half.limits.device_bytes
    assert gone == pytest.approx(40 * GIB, rel=0.01)
    with pytest.raises(ConfigError, match="gpu_memory_utilization is"):
        EngineConfig(base="llama", gpu_memory_utilization=1.5)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    ],
)
def test_out_of_memory_ends_the_largest_request_and_no_other(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what was half done in the step that failed is done once: here a prompt's logprobs."""
    base = make_base("llama", tmp_path / "base")
    compress(base, make_fine_tune(base, tmp_path / "f", seed=1), tmp_path / "d", make_plan())
    engine = make_engine(base, {"tune": tmp_path / "d"})
    prompt = [5, 6, 7, 8]
    scored = SamplingParams(max_tokens=4, temperature=0.0, prompt_logprobs=1)
    large = greedy("large", "base", list(range(3, 60)), 4)
    requests = [EngineRequest("small", "base", tuple(prompt), scored), large]
    logits = engine.runner.logits

    def tight(hidden: torch.Tensor, routing: Any) -> torch.Tensor:
        """No room for the logits that are drawn from, as long as the large prompt is there."""
        if len(engine.scheduler.running) > 1 and len(hidden) == 2:
            raise error
        return logits(hidden, routing)

    monkeypatch.setattr(engine.runner, "logits", tight)
    ends: list[TokenEvent] = []
    for request in requests:
        engine.add(request)
    tokens: list[int] = []
    while engine.has_work():
        for event in engine.step():
            tokens += event.token_ids if event.request_id == "small" else []
            ends += [event] if event.finish_reason else []
    failed = next(event for event in ends if event.request_id == "large")
    assert failed.finish_reason is FinishReason.ERROR
    assert failed.error is not None
    assert "out of memory: of the step's 61 tokens 57 were" in failed.error
    assert tokens == reference(base, prompt, 4)[0]
    small = next(event for event in ends if event.request_id == "small")
    assert small.finish_reason is FinishReason.LENGTH
    monkeypatch.undo()
    again = run(engine, [greedy("again", "tune", prompt, 3)])
    assert len(again.tokens["again"]) == 3
    engine.close()


def test_other_errors_are_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(make_base("llama", tmp_path / "base"), {})

    def broken(plan: StepPlan, sizes: dict[int, int]) -> Any:
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(engine.runner, "execute", broken)
    engine.add(greedy("a", "base", [5], 1))
    with pytest.raises(RuntimeError, match="device-side assert"):
        engine.step()
    engine.close()
