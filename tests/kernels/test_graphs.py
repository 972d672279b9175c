"""Captured decode steps, run uncaptured: the same buffers, padding and launches as on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deltaserve.compress.export import export
from deltaserve.compress.plan import make_plan
from deltaserve.compress.run import compress
from deltaserve.engine import graphs
from deltaserve.engine.graphs import DecodeGraphs, Replay, Shape, sizes_up_to
from deltaserve.kernels.attention import dispatch as attention_dispatch
from deltaserve.kernels.attention import launch
from deltaserve.kernels.delta_matmul import dispatch
from tests.engine_helpers import BASE, greedy, make_engine, reference, run
from tests.families import FAMILIES, make_base, make_fine_tune

TOKENS = 3


def uncaptured(work: Replay) -> Replay:
    """In place of a CUDA graph: what it would replay, launch by launch."""
    return work


def small_engine(tmp_path: Path, family: str, codec: str, params: dict[str, object]):  # type: ignore[no-untyped-def]
    base = make_base(family, tmp_path / "base")
    tune = make_fine_tune(base, tmp_path / "full", seed=1)
    plan = make_plan(codec=codec, params=params, vocabulary_codec="rows", vocabulary_params={})
    compress(base, tune, tmp_path / "delta", plan)
    export(base, tmp_path / "delta", tmp_path / "tune")
    knobs = {"max_num_seqs": 4, "max_model_len": 48, "merge_memory_bytes": 0}
    engine = make_engine(base, {"tune": tmp_path / "delta"}, **knobs)
    return engine, {BASE: base, "tune": tmp_path / "tune"}


@pytest.mark.parametrize("family", ["llama-tied", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_a_captured_step_gives_the_models_answers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base and delta, three rows of four: biases, norms, grouped and shared projections."""
    monkeypatch.setattr(dispatch, "has_kernels", lambda name, base: True)
    monkeypatch.setattr(attention_dispatch, "pick", lambda *_: launch)
    monkeypatch.setitem(FAMILIES[family][1], "num_hidden_layers", 1)
    monkeypatch.setitem(FAMILIES[family][1], "layer_types", ["sliding_attention"])
    if family == "llama-tied":
        del FAMILIES[family][1]["layer_types"]
    engine, checkpoints = small_engine(tmp_path, family, "int", {"bits": 2, "group_size": 32})
    engine.runner.use_graphs(uncaptured, max_rows=4, max_model_len=48)
    captured = engine.runner.graphs
    assert isinstance(captured, DecodeGraphs)
    requests = [
        greedy("a", BASE, [5, 6, 7], TOKENS),
        greedy("b", "tune", [8, 9, 10, 11], TOKENS),
        greedy("c", "tune", [12], TOKENS),
    ]
    trace = run(engine, requests)
    assert captured.replays == 2 * (TOKENS - 1)  # the helper computes each step twice
    for request in requests:
        tokens, logits = reference(checkpoints[request.model], list(request.prompt_ids), TOKENS)
        served = torch.stack(trace.logits[request.request_id])
        torch.testing.assert_close(served, logits, atol=1e-4, rtol=0)
        assert trace.tokens[request.request_id] == tokens
    engine.close()


def test_rows_that_no_kernel_serves_run_uncaptured(tmp_path: Path) -> None:
    """On a CPU no delta has kernels: rows of the base replay, those of the delta do not."""
    engine, checkpoints = small_engine(tmp_path, "llama", "int", {"bits": 8})
    engine.runner.use_graphs(uncaptured, max_rows=4, max_model_len=48)
    captured = engine.runner.graphs
    assert captured is not None
    for model, replays in ((BASE, 2 * (TOKENS - 1)), ("tune", 0)):
        before = captured.replays
        trace = run(engine, [greedy("a", model, [5, 6, 7], TOKENS)])
        assert captured.replays - before == replays
        assert trace.tokens["a"] == reference(checkpoints[model], [5, 6, 7], TOKENS)[0]
    engine.close()


def test_what_was_captured_is_captured_again_once_tables_stop_changing(tmp_path: Path) -> None:
    engine, _ = small_engine(tmp_path, "llama", "int", {"bits": 8})
    made: list[Replay] = []

    def counting(work: Replay) -> Replay:
        made.append(work)
        return work

    engine.runner.use_graphs(counting, max_rows=4, max_model_len=48)
    captured, step = engine.runner.graphs, engine.runner.step
    assert captured is not None
    assert len(made) == 2 * len(captured.sizes)
    step.eager.clear()
    assert captured.choose([0, 1, 1]) == Shape(4, True)
    step.changes += 1
    waited = [captured.choose([0, 1, 1]) for _ in range(graphs.SETTLE_STEPS + 1)]
    assert waited == [None] * graphs.SETTLE_STEPS + [Shape(4, True)]
    assert captured.choose([0]) == Shape(1, False)
    with torch.inference_mode():
        captured.run(Shape(4, True), torch.zeros(3, 64))
        assert len(made) == 2 * len(captured.sizes) + 1
        captured.run(Shape(1, False), torch.zeros(1, 64))
        assert len(made) == 2 * len(captured.sizes) + 1
    assert captured.choose([0] * 5) is None
    step.eager.add(2)
    assert captured.choose([0, 2]) is None
    engine.close()


def test_sizes_end_with_the_largest_batch() -> None:
    assert sizes_up_to(1) == [1]
    assert sizes_up_to(6) == [1, 2, 4, 6]
    assert sizes_up_to(64) == [1, 2, 4, 8, 16, 32, 48, 64]
