"""Pooled states agree with transformers', for the base and its fine-tunes in one batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from deltaserve.compress.plan import make_plan
from deltaserve.compress.run import compress
from deltaserve.engine.types import EngineRequest, SamplingParams
from tests.engine_helpers import BASE, make_engine, prompts
from tests.families import VOCAB, make_base, make_fine_tune


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("embedding")
    base = make_base("llama", root / "base")
    return {BASE: base, "tune": make_fine_tune(base, root / "tune", seed=1)}


def states(path: Path, prompt: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model.get_decoder()(torch.tensor([prompt])).last_hidden_state[0]


@pytest.mark.parametrize("knobs", [{}, {"max_num_batched_tokens": 8, "max_num_seqs": 4}])
def test_vectors_are_those_of_the_checkpoints(
    checkpoints: dict[str, Path], tmp_path: Path, knobs: dict[str, int]
) -> None:
    delta = tmp_path / "tune.delta"
    compress(checkpoints[BASE], checkpoints["tune"], delta, make_plan(codec="raw"))
    engine = make_engine(checkpoints[BASE], {"tune": delta}, **knobs)
    shared = [9] * 20  # the second time it is in the prefix cache
    texts = [shared, shared, *prompts(3, vocab=VOCAB)]
    expected, found = {}, {}
    for turn, prompt in enumerate(texts):
        for model, path in checkpoints.items():
            for pooling in ("last", "mean"):
                name = f"{model}/{pooling}/{turn}"
                hidden = states(path, prompt)
                expected[name] = hidden[-1] if pooling == "last" else hidden.mean(0)
                params = SamplingParams(max_tokens=0, pooling=pooling)  # type: ignore[arg-type]
                engine.add(EngineRequest(name, model, tuple(prompt), params))
    params = SamplingParams(max_tokens=5, temperature=0.0)
    engine.add(EngineRequest("words", "tune", (5, 6), params))  # they share the batch
    words = []
    while engine.has_work():
        for event in engine.step():
            if event.request_id == "words":
                words += event.token_ids
                assert event.embedding is None
            elif event.finish_reason is not None:
                assert event.token_ids == ()
                found[event.request_id] = torch.tensor(event.embedding)
    assert len(words) == 5
    assert found.keys() == expected.keys()
    for name, vector in expected.items():
        torch.testing.assert_close(found[name], vector, atol=2e-4, rtol=1e-4)
    engine.close()
