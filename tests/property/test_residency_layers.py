"""Real layers, files and threads: whatever is registered, swapped and evicted meanwhile, each
request gets the answer of the very version that it was bound to."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.artifact.reader import Delta
from deltaserve.compress.plan import Plan, make_plan
from deltaserve.compress.run import compress
from deltaserve.engine.core import Engine
from deltaserve.engine.projections import part_of
from deltaserve.engine.types import EngineRequest, FinishReason
from deltaserve.errors import ConfigError, UnknownModelError
from tests.engine_helpers import greedy, make_engine, run
from tests.families import make_base, make_fine_tune, make_lora

PROMPTS = [[7, 9, 11, 40, 41], [7, 9, 11, 50], [60] * 20]
TOKENS = 8
NAMES = "abcd"
PLANS: list[Plan | None] = [
    None,
    make_plan("nm24"),
    make_plan("int", {"bits": 8}),
    make_plan("int", {"bits": 4}),
]
LARGEST = 110_000
"""Bytes of the largest delta's operands."""
LORA, BROKEN = len(PLANS), len(PLANS) + 1

delta = st.integers(0, LORA)
name = st.sampled_from(NAMES)
action = st.one_of(
    st.tuples(st.just("register"), name, st.integers(0, BROKEN), st.booleans()),
    st.tuples(st.just("unregister"), name),
    st.tuples(st.just("rollback"), name),
    st.tuples(st.just("pin"), name, st.booleans()),
    *[st.tuples(st.just("ask"), name, st.sampled_from(PROMPTS))] * 3,
    st.tuples(st.just("abort"), st.integers(0, 5)),
    *[st.tuples(st.just("step"), st.integers(1, 6))] * 3,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base, and deltas of several codecs: packed, sparse, low rank, damaged."""
    root = tmp_path_factory.mktemp("layers")
    base = make_base("llama-tied", root / "base")
    deltas = [root / f"delta{i}" for i in range(BROKEN + 1)]
    for i, plan in enumerate(PLANS):
        compress(base, make_fine_tune(base, root / f"tune{i}", seed=i + 1), deltas[i], plan)
    compress(base, make_lora(base, root / "adapter", root / "merged")[0], deltas[LORA])
    shutil.copytree(deltas[0], deltas[BROKEN])
    weights = deltas[BROKEN] / "delta.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    return base, deltas


@pytest.fixture(scope="module")
def answers(models: tuple[Path, list[Path]]) -> dict[tuple[Path, int], list[int]]:
    """What each delta answers to each prompt when nothing else is there."""
    base, deltas = models
    found = {}
    for path in deltas[:BROKEN]:
        alone = make_engine(base, {"m": path}, enable_prefix_caching=False)
        asked = {f"r{p}": greedy(f"r{p}", "m", text, TOKENS) for p, text in enumerate(PROMPTS)}
        tokens = run(alone, list(asked.values())).tokens
        found |= {(path, p): tokens[f"r{p}"] for p in range(len(PROMPTS))}
        alone.close()
    assert len({tuple(answer) for answer in found.values()}) == len(found)
    return found


class Customers:
    """Asks an engine, and knows which answer each request must get."""

    def __init__(self, engine: Engine, deltas: list[Path]) -> None:
        self.engine = engine
        self.deltas = deltas
        self.bound: dict[str, tuple[Path, int]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, tuple[FinishReason, str | None]] = {}
        self._numbers = itertools.count()

    def perform(self, what: tuple) -> None:
        engine = self.engine
        match what:
            case "register", model, index, pinned:
                engine.register(model, str(self.deltas[index]), pinned)
            case "unregister", model:
                engine.unregister(model)
            case "rollback", model:
                engine.rollback(model)
            case "pin", model, pinned:
                engine.pin(model, pinned)
            case "ask", model, prompt:
                self.ask(model, prompt)
            case "abort", index if open_ := [r for r in self.bound if r not in self.ended]:
                request_id = open_[index % len(open_)]
                event = engine.abort(request_id)
                assert event is not None
                self.ended[request_id] = FinishReason.ABORT, None
            case "step", count:
                for _ in range(count):
                    self.step()

    def ask(self, model: str, prompt: list[int]) -> None:
        request: EngineRequest = greedy(f"r{next(self._numbers)}", model, prompt, TOKENS)
        self.engine.check(request)
        version = self.engine.residency.current(model)
        self.engine.add(request)
        self.bound[request.request_id] = Path(version.path), PROMPTS.index(prompt)

    def step(self) -> None:
        for event in self.engine.step():
            assert event.request_id not in self.ended, "a token after the end"
            self.tokens.setdefault(event.request_id, []).extend(event.token_ids)
            if event.finish_reason is not None:
                self.ended[event.request_id] = event.finish_reason, event.error


@settings(max_examples=30, deadline=None)
@given(
    first=st.lists(delta, min_size=4, max_size=4),
    actions=st.lists(action, min_size=10, max_size=50),
    room=st.sampled_from([1.1, 2.2, 9.0]),
    merge=st.booleans(),
)
def test_each_request_gets_the_answer_of_its_version(
    models: tuple[Path, list[Path]],
    answers: dict[tuple[Path, int], list[int]],
    first: list[int],
    actions: list[tuple],
    room: float,
    merge: bool,
) -> None:
    base, deltas = models
    engine = make_engine(
        base,
        {name: deltas[index] for name, index in zip(NAMES, first, strict=True)},
        delta_memory_bytes=int(room * LARGEST),
        host_memory_bytes=LARGEST,
        merge_memory_bytes=2 * LARGEST if merge else 0,
        max_num_seqs=6,
        max_num_batched_tokens=24,
    )
    customers = Customers(engine, deltas)
    for what in actions:
        with contextlib.suppress(UnknownModelError, ConfigError):
            customers.perform(what)
    for _ in range(3000):
        if not engine.has_work():
            break
        customers.step()
    assert not engine.has_work(), "somebody waits for ever"
    assert customers.ended.keys() == customers.bound.keys()
    for request_id, (path, prompt) in customers.bound.items():
        reason, error = customers.ended[request_id]
        if path == deltas[BROKEN]:
            assert reason in (FinishReason.ERROR, FinishReason.ABORT)
        elif reason is FinishReason.ABORT:
            assert answers[path, prompt][: len(customers.tokens.get(request_id, []))] == (
                customers.tokens.get(request_id, [])
            )
        else:
            assert error is None
            assert customers.tokens[request_id] == answers[path, prompt]
    assert engine.stats().kv_blocks_used == 0
    _leaves_nothing(engine)
    engine.close()


def _leaves_nothing(engine: Engine) -> None:
    for served in list(engine.residency.catalogue.served):
        engine.unregister(served)
    for _ in range(3000):
        if not engine.has_work():
            break
        engine.step()
    layers = {part_of(m)[0] for m in engine.residency.maker.modules.values()}  # type: ignore[attr-defined]
    assert not any(layer.weights for layer in layers)
    stats = engine.stats().residency
    assert (stats.device_bytes, stats.host_bytes, stats.merged_bytes) == (0, 0, 0)


def test_the_largest_delta_is_as_large_as_the_property_says(
    models: tuple[Path, list[Path]],
) -> None:
    base, deltas = models
    engine = make_engine(base, {"m": deltas[0]})
    sizes = [engine.residency.maker.needs(Delta.open(d)).device_bytes for d in deltas]  # type: ignore[attr-defined]
    assert 0.9 * LARGEST < max(sizes) <= LARGEST
    engine.close()
