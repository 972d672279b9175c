"""Deterministic mode: the same bits alone and in a crowd, in chunks, and after preemption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.compress.plan import make_plan
from deltaserve.compress.run import compress
from deltaserve.engine.core import Engine
from deltaserve.engine.deterministic import DeterministicRunner
from deltaserve.engine.model import KVCache
from deltaserve.engine.types import EngineRequest, SamplingParams, TokenEvent
from deltaserve.errors import ConfigError
from tests.engine_helpers import BASE, greedy, make_engine, prompts, reference, run
from tests.families import VOCAB, make_base, make_fine_tune

CODECS = {"raw": ("raw", {}), "int2": ("int", {"bits": 2, "group_size": 32}),
          "lowrank": ("lowrank", {"rank": 8})}  # fmt: skip
DTYPES = ("float32", "bfloat16")
FAMILIES = ("llama-tied", "qwen3", "gemma2")


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Path]]:
    """A base and a delta of each codec, one of them with added tokens."""
    root = tmp_path_factory.mktemp(request.param)
    base = make_base(request.param, root / "base")
    deltas = {}
    for seed, (label, (codec, params)) in enumerate(CODECS.items(), start=1):
        tune = make_fine_tune(base, root / f"{label}-tune", seed=seed, added_tokens=3 * (seed == 1))
        deltas[label] = root / label
        compress(base, tune, deltas[label], make_plan(codec=codec, params=params))
    return base, deltas


def requests_of(models: list[str]) -> list[EngineRequest]:
    """One for each model: greedy and seeded ones, some that report logprobs."""
    found = []
    for i, (model, prompt) in enumerate(
        zip(models, prompts(len(models), vocab=VOCAB), strict=True)
    ):
        temperature = 0.0 if i % 2 else 1.2
        params = SamplingParams(
            max_tokens=8, temperature=temperature, seed=i, top_p=0.9, logprobs=2 if i % 3 else None
        )
        found.append(EngineRequest(f"r{i}", model, tuple(prompt), params))
    return found


def tight(base: Path, dtype: str) -> dict[str, object]:
    """Steps of five tokens, and room for two or three requests."""
    per_token = KVCache.bytes_per_token(Checkpoint.open(base).hf_config, getattr(torch, dtype))
    return {
        "max_num_batched_tokens": 5, "max_num_seqs": 4, "block_size": 4, "max_model_len": 48,
        "kv_cache_memory_bytes": 60 * per_token,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_chunks_and_preemption_do_not_change_a_bit(family, dtype: str) -> None:
    base, deltas = family
    requests = requests_of([BASE, *deltas, BASE, "int2"])
    options = {"dtype": dtype, "deterministic": True}
    together = run(make_engine(base, deltas, **options), requests)
    lonely = make_engine(base, deltas, max_num_seqs=1, **options)
    small = make_engine(base, deltas, **options, **tight(base, dtype))
    squeezed = run(small, requests)
    assert small.stats().preemptions > 0
    for request in requests:
        name = request.request_id
        alone = run(lonely, [request])
        assert together.tokens[name] == squeezed.tokens[name] == alone.tokens[name]
        bits = torch.stack(alone.logits[name])
        assert torch.equal(torch.stack(together.logits[name]), bits)
        assert torch.equal(torch.stack(squeezed.logits[name]), bits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cached_prompt_and_logprobs_are_the_same_bits(family, dtype: str) -> None:
    base, deltas = family
    prompt = tuple(prompts(1, vocab=VOCAB, seed=9)[0]) * 2
    engine = make_engine(base, deltas, dtype=dtype, deterministic=True, block_size=4)
    params = SamplingParams(max_tokens=6, temperature=0.0, logprobs=3)
    request = EngineRequest("first", "int2", prompt, params)
    first = finish(engine, [request])["first"]
    crowd = [replace(request, request_id=f"crowd{i}", model=BASE) for i in range(3)]
    again = finish(engine, [replace(request, request_id="again"), *crowd])["again"]
    assert again[0].num_cached > 0
    assert [event.logprobs for event in again] == [event.logprobs for event in first]


def finish(engine: Engine, requests: list[EngineRequest]) -> dict[str, list[TokenEvent]]:
    events: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work():
        for event in engine.step():
            events[event.request_id].append(event)
    return events


def test_it_is_the_same_model(family) -> None:
    """Tokens and logits are those of transformers, as without the mode."""
    base, deltas = family
    engine = make_engine(base, deltas, deterministic=True)
    requests = [greedy(f"r{i}", BASE, p, 10) for i, p in enumerate(prompts(3, vocab=VOCAB))]
    trace = run(engine, requests)
    for request in requests:
        tokens, logits = reference(base, list(request.prompt_ids), 10)
        assert trace.tokens[request.request_id] == tokens
        served = torch.stack(trace.logits[request.request_id])
        torch.testing.assert_close(served, logits, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    root = tmp_path_factory.mktemp("llama")
    base = make_base("llama", root / "base")
    tune = make_fine_tune(base, root / "tune", seed=1)
    compress(base, tune, root / "delta", make_plan(codec="int", params={"bits": 4}))
    return base, {"tune": root / "delta"}


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 70), st.sampled_from([BASE, "tune"])), max_size=7),
    budget=st.integers(8, 40),
    own=st.integers(1, 70),
)
def test_random_crowds_do_not_change_a_bit(llama, lengths, budget: int, own: int) -> None:
    base, deltas = llama
    options = {"deterministic": True, "dtype": "bfloat16", "max_model_len": 96}
    ids = (prompts(1, vocab=VOCAB, seed=4, longest=80)[0] * 70)[:own]
    request = greedy("own", "tune", ids, 8)
    crowd = [
        greedy(f"r{i}", model, (ids * 70)[i : i + length], 5)
        for i, (length, model) in enumerate(lengths)
    ]
    alone = run(make_engine(base, deltas, **options), [request])
    crowded = run(
        make_engine(base, deltas, **options, max_num_batched_tokens=budget, max_num_seqs=8),
        [*crowd[::2], request, *crowd[1::2]],
    )
    assert alone.tokens["own"] == crowded.tokens["own"]
    assert torch.equal(torch.stack(alone.logits["own"]), torch.stack(crowded.logits["own"]))


def test_a_machine_that_cannot_is_told_at_the_start(llama, monkeypatch) -> None:
    decode = DeterministicRunner.decode

    def uneven(self: DeterministicRunner, *args: torch.Tensor) -> torch.Tensor:
        hidden = decode(self, *args)
        hidden[-1] += 1e-4
        return hidden

    monkeypatch.setattr(DeterministicRunner, "decode", uneven)
    with pytest.raises(ConfigError, match="deterministic mode is not possible here"):
        make_engine(llama[0], {}, deterministic=True)
