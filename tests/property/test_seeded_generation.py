"""A seeded request draws the same tokens whatever else the engine has to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.compress.plan import make_plan
from deltaserve.compress.run import compress
from deltaserve.engine.core import Engine
from deltaserve.engine.model import KVCache
from deltaserve.engine.types import EngineRequest, SamplingParams
from tests.engine_helpers import BASE, make_engine
from tests.families import make_base, make_fine_tune

PROMPT = tuple(range(10, 33))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    root = tmp_path_factory.mktemp("seeded")
    base = make_base("llama", root / "base")
    tune = make_fine_tune(base, root / "tune", seed=1)
    compress(base, tune, root / "delta", make_plan(codec="raw"))
    return base, {"tune": root / "delta"}


def drawn(engine: Engine, requests: list[EngineRequest]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work():
        for event in engine.step():
            tokens[event.request_id] += event.token_ids
    return tokens


sampling = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.6, 1.0, 1.5]),
        "top_k": st.sampled_from([0, 1, 7, 200]),
        "top_p": st.sampled_from([1.0, 0.9, 0.4]),
        "min_p": st.sampled_from([0.0, 0.05]),
        "presence_penalty": st.sampled_from([0.0, 0.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.2]),
    }
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    own=sampling,
    others=st.lists(st.tuples(st.integers(1, 40), sampling), max_size=5),
    budget=st.integers(4, 40),
    room=st.integers(48, 90),
    seed=st.integers(0, 2**62),
)
def test_neighbours_chunking_and_preemption_do_not_change_it(
    models, own, others, budget: int, room: int, seed: int
) -> None:
    base, deltas = models
    request = EngineRequest("own", "tune", PROMPT, SamplingParams(max_tokens=16, seed=seed, **own))
    alone = drawn(make_engine(base, deltas), [request])["own"]
    per_token = KVCache.bytes_per_token(Checkpoint.open(base).hf_config, torch.float32)
    crowded = make_engine(
        base,
        deltas,
        block_size=4,
        max_model_len=44,
        max_num_seqs=4,
        max_num_batched_tokens=budget,
        kv_cache_memory_bytes=room * per_token,
    )
    crowd = [
        EngineRequest(
            f"r{i}",
            (BASE, "tune")[i % 2],
            PROMPT[:length],
            SamplingParams(max_tokens=min(12, 44 - len(PROMPT[:length])), **params),
        )
        for i, (length, params) in enumerate(others)
    ]
    assert drawn(crowded, [*crowd[::2], request, *crowd[1::2]])["own"] == alone
