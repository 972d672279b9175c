"""What the engine refuses at start, and with which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForMaskedLM

from deltaserve.compress.run import compress
from deltaserve.engine.families import context_limit
from deltaserve.engine.projections import part_of
from deltaserve.errors import (
    ArtifactError,
    BaseMismatchError,
    ConfigError,
    UnsupportedModelError,
)
from tests.engine_helpers import BASE, greedy, make_engine, reference, run
from tests.families import COMMON, make_base, make_fine_tune


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base("llama", tmp_path_factory.mktemp("start") / "base")


@pytest.fixture(scope="module")
def delta(base: Path) -> Path:
    tune = make_fine_tune(base, base.parent / "tune", seed=1)
    compress(base, tune, base.parent / "delta")
    return base.parent / "delta"


def test_unsupported_architecture_names_itself_and_the_list(tmp_path: Path) -> None:
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=16,
        vocab_size=32,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"BertForMaskedLM.*LlamaForCausalLM.*Phi3"):
        make_engine(tmp_path, {})


def test_a_delta_for_another_base_shows_both_digests(
    base: Path, delta: Path, tmp_path: Path
) -> None:
    other = make_base("llama", tmp_path / "other", seed=9)
    with pytest.raises(BaseMismatchError, match=r"sha256:\w+.*sha256:\w+"):
        make_engine(other, {"tune": delta})


def test_a_truncated_delta_is_named(base: Path, delta: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in delta.iterdir():
        data = file.read_bytes()
        cut = len(data) - 100 if file.suffix == ".safetensors" else len(data)
        (broken / file.name).write_bytes(data[:cut])
    with pytest.raises(ArtifactError, match=r"delta\.safetensors"):
        make_engine(base, {"tune": broken})


def test_a_changed_byte_is_noticed(base: Path, delta: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in delta.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "delta.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 0x01
    weights.write_bytes(data)
    with pytest.raises(ArtifactError, match="digest"):
        make_engine(base, {"tune": broken})


def test_a_parameter_that_no_layer_has_is_named_and_nothing_stays(base: Path, delta: Path) -> None:
    engine = make_engine(base, {})
    modules = engine.residency.maker.modules
    norm = modules.pop("model.norm")
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight"):
        engine.register("tune", str(delta))
    assert [model.name for model in engine.models()] == [BASE]
    assert not any(part_of(module)[0].weights for module in [*modules.values(), norm])


def test_sizes_that_cannot_work_are_refused_with_numbers(base: Path) -> None:
    with pytest.raises(ConfigError, match="99"):
        make_engine(base, {}, max_model_len=99999)
    with pytest.raises(ConfigError, match=r"kv_cache_memory_bytes to \d+"):
        make_engine(base, {}, max_model_len=256, kv_cache_memory_bytes=1000)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            make_engine(base, {}, device="cuda")


def test_the_context_shrinks_to_the_cache_unless_asked_for(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(base, {}, kv_cache_memory_bytes=64 * 3 * 2 * 2 * 16 * 4)
    assert engine.max_model_len == 64
    assert "reduced from 256 to 64" in caplog.text


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [3.0] * 8,
    "original_max_position_embeddings": 64,
    "factor": 4.0,
}


def test_batch_dependent_rotary_scaling_is_held_to_its_original_context(tmp_path: Path) -> None:
    """longrope picks its frequencies by the longest position in the batch: past 64 tokens one
    tenant's prompt would change another's answer."""
    config = AutoConfig.for_model(
        "phi3", **COMMON, rope_parameters=LONGROPE, original_max_position_embeddings=64
    )
    assert context_limit(config) == 64
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    engine = make_engine(tmp_path, {})
    assert engine.max_model_len == 64
    prompt = list(range(3, 40))
    trace = run(engine, [greedy("long", BASE, prompt, 20), greedy("short", BASE, prompt[:3], 20)])
    for name, tokens in (("long", prompt), ("short", prompt[:3])):
        assert trace.tokens[name] == reference(tmp_path, tokens, 20)[0]


def test_models_lists_bytes_and_parents(base: Path, delta: Path) -> None:
    engine = make_engine(base, {"tune": delta, "again": delta})
    first, *others = engine.models()
    manifest = json.loads((delta / "delta.json").read_text())
    assert (first.name, first.parent, first.vocab_size) == (BASE, None, 96)
    assert [(m.name, m.parent) for m in others] == [("tune", BASE), ("again", BASE)]
    assert others[0].digest == manifest["digest"]
    assert others[0].resident_bytes == manifest["sizes"]["resident"]["total"] < first.full_bytes
