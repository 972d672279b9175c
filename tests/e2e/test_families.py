"""A mixed batch gives every model's own answer, for every family and every codec."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.compress.export import export
from deltaserve.compress.plan import make_plan
from deltaserve.compress.run import compress
from deltaserve.engine.core import Engine
from deltaserve.engine.model import KVCache
from tests.engine_helpers import BASE, greedy, make_engine, prompts, reference, run
from tests.families import FAMILIES, VOCAB, make_base, make_fine_tune, make_lora

MAX_TOKENS = 16
RAW = make_plan(codec="raw")


def check_against_reference(
    base: Path,
    deltas: dict[str, Path],
    checkpoints: dict[str, Path],
    exact_bytes: bool = True,
    **knobs: object,
) -> Engine:
    """Two prompts per model in one batch; tokens equal, logits within 1e-4.

    exact_bytes: what is predicted to be held is held. Kernels pad operands of so few columns.
    """
    engine = make_engine(base, deltas, **knobs)
    names = [BASE, *deltas] * 2
    requests = [
        greedy(f"{name}-{i}", name, prompt, MAX_TOKENS)
        for i, (name, prompt) in enumerate(
            zip(names, prompts(len(names), vocab=VOCAB), strict=True)
        )
    ]
    trace = run(engine, requests)
    assert engine.stats().mixed_steps > 0
    for version in engine.residency.catalogue.versions():
        assert version.operands is not None
        assert version.operands.num_bytes == version.needs.device_bytes or not exact_bytes
    for request in requests:
        tokens, logits = reference(checkpoints[request.model], list(request.prompt_ids), MAX_TOKENS)
        served = torch.stack(trace.logits[request.request_id])
        assert served.shape == logits.shape
        torch.testing.assert_close(served, logits, atol=1e-4, rtol=0)
        assert trace.tokens[request.request_id] == tokens
    return engine


@pytest.mark.parametrize("family", FAMILIES)
def test_raw_deltas_equal_the_fine_tunes(family: str, tmp_path: Path) -> None:
    base = make_base(family, tmp_path / "base")
    checkpoints = {BASE: base}
    deltas = {}
    for i, grown in enumerate((0, 3, 0), start=1):
        name = f"tune{i}"
        model = make_fine_tune(base, tmp_path / name, seed=i, added_tokens=grown)
        compress(base, model, tmp_path / f"{name}.delta", RAW)
        deltas[name], checkpoints[name] = tmp_path / f"{name}.delta", model
    check_against_reference(base, deltas, checkpoints)


TERMS = [
    {"codec": "int", "bits": 1, "group_size": 32},
    {"codec": "int", "bits": 1, "group_size": 0},
    {"codec": "lowrank", "rank": 4, "bits": 4},
    {"codec": "lowrank", "rank": 2},
]
LOSSY = {
    "int1": ("int", {"bits": 1, "planes": 2, "group_size": 32}),
    "int2": ("int", {"bits": 2, "group_size": 32}),
    "int3": ("int", {"bits": 3, "scale_axis": "row"}),
    "int4": ("int", {"bits": 4, "symmetric": False}),
    "int8": ("int", {"bits": 8, "scale_axis": "column"}),
    "nm24": ("nm24", {"bits": 4}),
    "lowrank": ("lowrank", {"rank": 8}),
    "sum": ("sum", {"terms": TERMS}),
    "nf4": ("nf4", {}),
    "xor": ("xor", {}),
    "rows": ("rows", {}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family_with_tunes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Path]]:
    """Three fine-tunes of each family, one of them with added tokens."""
    root = tmp_path_factory.mktemp(request.param)
    base = make_base(request.param, root / "base")
    tunes = [
        make_fine_tune(base, root / f"tune{i}", seed=i, added_tokens=grown)
        for i, grown in enumerate((0, 3, 0), start=1)
    ]
    return base, tunes


@pytest.mark.parametrize("codec", LOSSY)
def test_lossy_deltas_equal_their_exported_checkpoints(
    codec: str, family_with_tunes: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, tunes = family_with_tunes
    name, params = LOSSY[codec]
    vocabulary = (
        {} if name in ("xor", "sum") else {"vocabulary_codec": name, "vocabulary_params": params}
    )
    deltas, checkpoints = {}, {BASE: base}
    for tune in tunes:
        delta = tmp_path / f"{tune.name}.delta"
        compress(base, tune, delta, make_plan(codec=name, params=params, **vocabulary))
        export(base, delta, tmp_path / tune.name)
        deltas[tune.name], checkpoints[tune.name] = delta, tmp_path / tune.name
    check_against_reference(base, deltas, checkpoints)


def test_all_codecs_share_one_batch(
    family_with_tunes: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, tunes = family_with_tunes
    deltas, checkpoints = {}, {BASE: base}
    for i, (label, (name, params)) in enumerate(LOSSY.items()):
        delta = tmp_path / f"{label}.delta"
        compress(base, tunes[i % 3], delta, make_plan(codec=name, params=params))
        export(base, delta, tmp_path / label)
        deltas[label], checkpoints[label] = delta, tmp_path / label
    check_against_reference(base, deltas, checkpoints)
    # Some merged with the base, some packed, in one batch.
    engine = check_against_reference(base, deltas, checkpoints, merge_memory_bytes=600_000)
    merged = {model.name for model in engine.models() if model.merged}
    assert set() < merged < set(deltas)
    assert "xor" not in merged


def test_small_steps_and_preemption_change_nothing(
    family_with_tunes: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """Chunked prefill (7 tokens a step) and a cache too small for all rows at once."""
    base, tunes = family_with_tunes
    compress(base, tunes[0], tmp_path / "delta", RAW)
    deltas, checkpoints = {"tune": tmp_path / "delta"}, {BASE: base, "tune": tunes[0]}
    model_config = Checkpoint.open(base).hf_config
    engine = check_against_reference(
        base,
        deltas,
        checkpoints,
        max_num_batched_tokens=7,
        max_num_seqs=4,
        block_size=4,
        max_model_len=48,
        kv_cache_memory_bytes=48 * KVCache.bytes_per_token(model_config, torch.float32),
    )
    assert engine.stats().preemptions > 0
    assert engine.stats().kv_blocks_used == 0


def test_a_lora_adapter_runs_beside_full_deltas(
    family_with_tunes: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, tunes = family_with_tunes
    adapter, merged = make_lora(base, tmp_path / "adapter", tmp_path / "merged")
    deltas, checkpoints = {}, {BASE: base, "adapter": merged, "tune": tunes[1]}
    for name, model in (("adapter", adapter), ("tune", tunes[1])):
        compress(base, model, tmp_path / f"{name}.delta", None if model is adapter else RAW)
        deltas[name] = tmp_path / f"{name}.delta"
    check_against_reference(base, deltas, checkpoints)
