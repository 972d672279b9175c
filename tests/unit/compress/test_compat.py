"""Which fine-tunes belong to which bases."""

from __future__ import annotations

import json

import pytest

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.compress.compat import check_compatible
from deltaserve.errors import CompatibilityError


@pytest.fixture
def models(tmp_path, new_model):
    """models(family, **config) -> base and fine-tune, opened; the second with the config."""

    def make(family="llama", base_family="llama", **config):
        new_model(base_family).save_pretrained(tmp_path / "base")
        new_model(family, **config).save_pretrained(tmp_path / "tuned")
        return Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "tuned")

    return make


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_hidden_layers": 1}, r"parameter model\.layers\.1\..* is in base but not in tuned"),
        ({"num_hidden_layers": 3}, r"parameter model\.layers\.2\..* is in tuned but not in base"),
        ({"intermediate_size": 40}, r"mlp\.down_proj\.weight is \[32, 48\].*\[32, 40\]"),
        ({"hidden_size": 24}, r"lm_head\.weight is \[80, 32\] in base but \[80, 24\] in tuned"),
        ({"attention_bias": True}, r"bias is in tuned"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps is 1e-06 in base but 0.001 in tuned"),
        ({"hidden_act": "gelu"}, "hidden_act is 'silu' in base but 'gelu' in tuned"),
        ({"rope_theta": 5e5}, "rope_parameters"),
    ],
)
def test_the_first_difference_is_named_with_both_values(models, config, words):
    with pytest.raises(CompatibilityError, match=words):
        check_compatible(*models(**config))


def test_same_shapes_but_other_heads_are_refused(models):
    config = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
    with pytest.raises(CompatibilityError, match="head_dim is 8 in base but 4 in tuned"):
        check_compatible(*models(**config))


def test_other_architectures_are_refused(models):
    with pytest.raises(CompatibilityError, match=r"LlamaForCausalLM.*Qwen2ForCausalLM"):
        check_compatible(*models("qwen2"))


def test_what_does_not_change_the_computation_is_ignored(models, tmp_path):
    base, _ = models(
        max_position_embeddings=99,
        use_cache=False,
        eos_token_id=7,
        attention_dropout=0.5,
        initializer_range=0.5,
    )
    path = tmp_path / "tuned" / "config.json"
    notes = {"unsloth_version": "1", "torch_dtype": "float16", "transformers_version": "4.40"}
    path.write_text(json.dumps(json.loads(path.read_text()) | notes))
    assert check_compatible(base, Checkpoint.open(tmp_path / "tuned")) == base.names()
