"""PEFT adapters: compared with peft's own merge; what is not plain LoRA is refused."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deltaserve.artifact.reader import Delta
from deltaserve.compress.export import export
from deltaserve.compress.plan import make_plan
from deltaserve.compress.run import compress
from deltaserve.errors import CheckpointError, CompatibilityError, ConfigError

LINEARS = ["q_proj", "v_proj", "up_proj"]


@pytest.fixture
def adapter(tmp_path, new_model):
    """adapter(**LoraConfig) -> a saved adapter with random factors, and peft's merged model."""

    def make(*, tied=False, **settings):
        torch.manual_seed(3)
        base = new_model(dtype=torch.float32, tie_word_embeddings=tied)
        base.save_pretrained(tmp_path / "base")
        config = peft.LoraConfig(
            **({"r": 4, "lora_alpha": 6, "target_modules": LINEARS} | settings)
        )
        model = peft.get_peft_model(base, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", model

    return make


def served(tmp_path, path):
    manifest = compress(tmp_path / "base", path, tmp_path / "d")
    export(tmp_path / "base", tmp_path / "d", tmp_path / "out")
    return manifest, AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.mlp.up_proj": 3}},
        {"modules_to_save": ["lm_head", "norm"]},
        {"target_modules": [*LINEARS, "embed_tokens"]},
        {"target_modules": [*LINEARS, "lm_head"], "tied": True},
        {"modules_to_save": ["embed_tokens"], "tied": True},
    ],
)
def test_adapters_compute_what_peft_computes(tmp_path, adapter, settings):
    path, model = adapter(**settings)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        manifest, exported = served(tmp_path, path)
        assert torch.allclose(exported(tokens).logits, expected, atol=1e-5)
    assert manifest.source.kind == "lora"
    assert {e.error for e in manifest.tensors.values()} == {0.0}
    assert manifest.sizes.full.total == sum(
        t.numel() * 4 for t in load_file(tmp_path / "base" / "model.safetensors").values()
    )


def test_factors_are_kept_exactly(tmp_path, adapter):
    path, _ = adapter()
    compress(tmp_path / "base", path, tmp_path / "d")
    enc = Delta.open(tmp_path / "d").encoded("model.layers.1.self_attn.q_proj.weight")
    stored = load_file(path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    assert enc.codec == "lowrank"
    assert enc.params == {"rank": 4, "scale": 1.5}
    assert torch.equal(enc.tensors["u"], stored[f"{prefix}.lora_B.weight"])
    assert torch.equal(enc.tensors["v"], stored[f"{prefix}.lora_A.weight"])


def test_a_saved_copy_of_the_embedding_costs_nothing(tmp_path, adapter):
    path, _ = adapter(target_modules=["embed_tokens"])
    assert any("base_layer" in n for n in load_file(path / "adapter_model.safetensors"))
    manifest = compress(tmp_path / "base", path, tmp_path / "d")
    assert {n: e.codec for n, e in manifest.tensors.items()} == {
        "model.embed_tokens.weight": "lowrank"
    }


def test_a_tied_head_stays_the_bases_unless_peft_ties_it(tmp_path, adapter):
    path, _ = adapter(target_modules=["embed_tokens"], tied=True)
    manifest = compress(tmp_path / "base", path, tmp_path / "d")
    assert manifest.tensors["lm_head.weight"].params == {"bits": 0, "rows": 0}
    edit(path, ensure_weight_tying=True)
    manifest = compress(tmp_path / "base", path, tmp_path / "d2")
    assert "lm_head.weight" not in manifest.tensors


def edit(path, **changes):
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_what_is_more_than_lora_is_refused_with_the_reason(tmp_path, adapter, changes, words):
    path, _ = adapter()
    edit(path, **changes)
    with pytest.raises(CompatibilityError, match=words):
        compress(tmp_path / "base", path, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_adapters_for_another_base_are_refused(tmp_path, adapter, new_model):
    path, _ = adapter()
    new_model(hidden_size=48).save_pretrained(tmp_path / "wide")
    with pytest.raises(CompatibilityError, match="does not fit wide"):
        compress(tmp_path / "wide", path, tmp_path / "d")
    new_model(num_hidden_layers=1).save_pretrained(tmp_path / "short")
    with pytest.raises(CompatibilityError, match=r"layers\.1\..*short does not have"):
        compress(tmp_path / "short", path, tmp_path / "d")


def test_broken_adapters_are_refused(tmp_path, adapter):
    path, _ = adapter()
    with pytest.raises(ConfigError, match="always kept exactly"):
        compress(tmp_path / "base", path, tmp_path / "d", make_plan("int"))
    file = path / "adapter_model.safetensors"
    factors = load_file(file)
    name = next(n for n in factors if "lora_A" in n)
    save_file({n: t for n, t in factors.items() if n != name}, file)
    with pytest.raises(CheckpointError, match="only one of its two factors"):
        compress(tmp_path / "base", path, tmp_path / "d")
    save_file(factors | {name: factors[name] * float("nan")}, file)
    with pytest.raises(CheckpointError, match="NaN"):
        compress(tmp_path / "base", path, tmp_path / "d")
    save_file(factors | {"base_model.model.x.lora_magnitude_vector": torch.ones(1)}, file)
    with pytest.raises(CompatibilityError, match="not a plain LoRA tensor"):
        compress(tmp_path / "base", path, tmp_path / "d")
    shutil.move(file, path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        compress(tmp_path / "base", path, tmp_path / "d")
