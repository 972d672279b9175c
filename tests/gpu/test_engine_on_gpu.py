"""The whole engine on a GPU: kernels, captured decode steps, deltas that come and go.

The bodies take the device, so that a CPU tries them, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deltaserve.compress.export import export
from deltaserve.compress.plan import make_plan
from deltaserve.compress.run import compress
from deltaserve.engine.core import Engine
from tests.engine_helpers import BASE, greedy, make_engine, prompts, reference, run
from tests.families import VOCAB, make_base, make_fine_tune

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
TERMS = [
    {"codec": "int", "bits": 1, "group_size": 0},
    {"codec": "int", "bits": 1, "group_size": 0},
    {"codec": "lowrank", "rank": 4, "bits": 4},
    {"codec": "lowrank", "rank": 4},
]
CODECS: dict[str, tuple[str, dict[str, Any]]] = {
    "int2": ("int", {"bits": 2, "group_size": 32}),
    "nm24": ("nm24", {"bits": 4, "group_size": 64}),
    "lowrank": ("lowrank", {"rank": 8}),
    "sum": ("sum", {"terms": TERMS}),
    "column": ("int", {"bits": 1, "scale_axis": "column"}),  # by the reference
}
TOKENS = 8
ROUNDED = 0.08
"""Of the largest logit; three layers of random weights in bfloat16 differ by up to 0.04."""


class Family:
    """A base, a fine-tune of each codec, and the checkpoints that they stand for."""

    def __init__(self, root: Path, family: str) -> None:
        base = make_base(family, root / "base")
        self.base, self.checkpoints, self.deltas = base, {BASE: base}, {}
        for seed, (name, (codec, params)) in enumerate(CODECS.items()):
            tune = make_fine_tune(base, root / f"{name}.full", seed=seed)
            delta = root / f"{name}.delta"
            plan = make_plan(
                codec=codec, params=params, vocabulary_codec="rows", vocabulary_params={}
            )
            compress(base, tune, delta, plan)
            export(base, delta, root / name)
            self.deltas[name], self.checkpoints[name] = delta, root / name

    def engine(self, device: str, **knobs: Any) -> Engine:
        knobs = {"dtype": "bfloat16", "max_model_len": 96, "merge_memory_bytes": 0} | knobs
        return make_engine(self.base, self.deltas, device=device, **knobs)


@pytest.fixture(
    scope="module", params=["llama-tied", pytest.param("gemma2", marks=pytest.mark.slow)]
)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp(request.param), request.param)


def everything(family: Family, tokens: int, seed: int = 0) -> list[Any]:
    """Two requests for each fine-tune and the base."""
    models = [*family.checkpoints, *family.checkpoints]
    texts = prompts(len(models), vocab=VOCAB, seed=seed)
    return [
        greedy(f"{model}.{i}", model, text, tokens)
        for i, (model, text) in enumerate(zip(models, texts, strict=True))
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_a_mixed_batch_has_the_models_logits(family: Family, device: str) -> None:
    """Within the rounding of bfloat16, against float32 of transformers."""
    engine = family.engine(device)
    requests = everything(family, 1)
    trace = run(engine, requests)
    for request in requests:
        (served,) = trace.logits[request.request_id]
        for model, checkpoint in (
            (request.model, family.checkpoints[request.model]),
            (BASE, family.base),
        ):
            _, expected = reference(checkpoint, list(request.prompt_ids), 1)
            error = (served.float().cpu() - expected[0]).abs().max() / expected.abs().max()
            assert (error < ROUNDED) == (model == request.model), f"{request.request_id}: {error}"
    engine.close()


@pytest.mark.parametrize("device", DEVICES)
def test_captured_steps_give_the_tokens_of_launched_ones(family: Family, device: str) -> None:
    """Most of them: a library's matmul may round otherwise for the padded rows, and where two
    tokens are as good as equal, one goes over to the other."""
    captured, launched = family.engine(device), family.engine(device, enforce_eager=True)
    requests = everything(family, TOKENS)
    found, expected = run(captured, requests).tokens, run(launched, requests).tokens
    assert sum(found[r.request_id] == expected[r.request_id] for r in requests) > 0.7 * len(
        requests
    )
    if device == "cuda":
        assert captured.runner.graphs is not None
        assert captured.runner.graphs.replays > 0
        assert launched.runner.graphs is None
    captured.close()
    launched.close()


@pytest.mark.parametrize("device", DEVICES)
def test_deltas_come_and_go(family: Family, device: str) -> None:
    """Room for half of them: from disk at first, from host memory later, the same tokens."""
    # The same launches each time, so that not a bit may differ.
    same = {"enforce_eager": True, "enable_prefix_caching": False}
    whole = family.engine(device, **same)
    sizes = [version.needs.device_bytes for version in whole.residency.catalogue.versions()]
    requests = everything(family, TOKENS)
    expected = [run(whole, [request]).tokens for request in requests]
    whole.close()
    engine = family.engine(device, delta_memory_bytes=sum(sizes) // 2, **same)
    for _ in range(3):
        assert [run(engine, [request]).tokens for request in requests] == expected
    assert engine.stats().residency.evictions > len(CODECS)
    engine.close()
