"""Choosing codecs: defaults, options, patterns; what does not fit is refused."""

from __future__ import annotations

import pytest
import torch

from deltaserve.compress.classify import classify
from deltaserve.compress.plan import load_rules, make_plan
from deltaserve.errors import ConfigError

LINEAR = torch.zeros(64, 64).bfloat16()
MLP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("lm_head.weight", (9, 4), "head"),
        ("model.embed_tokens.weight", (9, 4), "embedding"),
        ("transformer.wte.weight", (9, 4), "embedding"),
        (MLP, (9, 4), "linear"),
        ("model.layers.0.self_attn.q_proj.bias", (9,), "bias"),
        ("model.layers.0.self_attn.q_norm.weight", (9,), "norm"),
        ("model.layers.0.input_layernorm.weight", (9,), "norm"),
        ("transformer.h.0.ln_1.weight", (9,), "norm"),
        ("model.layers.0.mixer.A_log", (9,), "other"),
    ],
)
def test_classes(name, shape, kind):
    assert classify(name, shape) == kind


def test_the_default_plan():
    plan = make_plan()
    assert plan.choose(MLP, "linear", LINEAR, LINEAR).codec == "int"
    assert plan.choose("n", "norm", torch.ones(64), torch.ones(64)).codec == "raw"
    assert plan.choose("t", "linear", torch.ones(4, 4), torch.ones(4, 4)).codec == "raw"
    assert plan.choose("i", "linear", LINEAR.long(), LINEAR.long()).codec == "raw"


@pytest.mark.parametrize(
    ("changed", "codec"), [(1, "rows"), (16, "rows"), (18, "int"), (64, "int")]
)
def test_vocabulary_rows_while_they_are_smaller_than_four_bits(changed, codec):
    tuned = LINEAR.clone()
    tuned[:changed] = 1
    choice = make_plan().choose("model.embed_tokens.weight", "embedding", tuned, LINEAR)
    assert choice.codec == codec
    assert choice.params.get("bits", 4) == 4


def test_factors_larger_than_the_matrix_are_not_made():
    plan = make_plan("lowrank", {"rank": 31})
    assert plan.choose(MLP, "linear", LINEAR, LINEAR).codec == "lowrank"
    plan = make_plan("lowrank", {"rank": 32})
    assert plan.choose(MLP, "linear", LINEAR, LINEAR).codec == "raw"


def test_lossless_codecs_apply_to_everything_but_embeddings_may_differ():
    plan = make_plan("xor")
    for kind in ("linear", "norm", "embedding", "head"):
        assert plan.choose("x", kind, LINEAR, LINEAR).codec == "xor"
    plan = make_plan("xor", vocabulary_codec="rows")
    assert plan.choose("x", "embedding", LINEAR, LINEAR).codec == "rows"
    plan = make_plan(vocabulary_params={"bits": 8})
    assert plan.choose("x", "head", LINEAR, LINEAR).params == {"bits": 8}


@pytest.mark.parametrize(
    ("codec", "params", "words"),
    [
        ("raw", {"bits": 2}, "bits does not fit codec raw"),
        ("xor", {"group_size": 2}, "group_size does not fit codec xor"),
        ("nf4", {"bits": 4}, "bits does not fit codec nf4"),
        ("int", {"rank": 2}, r"rank does not fit codec int.*rank fits: lowrank"),
        ("nm24", {"planes": 2}, "planes does not fit"),
        ("nm24", {"symmetric": False}, "symmetric does not fit"),
        ("sparse", {"bits": 2}, "bits does not fit"),
        ("int", {"bits": 5}, "bits must be one of"),
        ("int", {"scale_axis": "diagonal"}, "scale_axis must be one of"),
        ("int", {"scale_axis": "row", "group_size": 64}, "only fits scale_axis group"),
        ("rows", {"group_size": 64}, "needs bits"),
        ("gzip", {}, "unknown codec 'gzip'"),
    ],
)
def test_options_that_do_not_fit_are_refused(codec, params, words):
    with pytest.raises(ConfigError, match=words):
        make_plan(codec, params)


def test_patterns_first_match_wins(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(
        "- match: '*.mlp.*'\n  codec: int\n  bits: 4\n"
        "- match: '*.layers.0.*'\n  codec: nm24\n  group_size: 32\n"
    )
    plan = make_plan(rules=load_rules(path))
    assert plan.choose(MLP, "linear", LINEAR, LINEAR).params == {"bits": 4}
    other = plan.choose("model.layers.0.self_attn.q_proj.weight", "linear", LINEAR, LINEAR)
    assert (other.codec, other.params) == ("nm24", {"group_size": 32})
    last = plan.choose("model.layers.1.self_attn.q_proj.weight", "linear", LINEAR, LINEAR)
    assert (last.codec, last.params) == ("int", {})
    plan.check_rules([MLP])
    with pytest.raises(ConfigError, match=r"'\*\.mlp\.\*' matches no parameter"):
        plan.check_rules(["model.norm.weight"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("codec: int", "must hold a list"),
        ("- 3", "pattern 1: not a mapping"),
        ("- codec: int", "needs match"),
        ("- match: x\n  codec: int\n  colour: red", "pattern 1: colour does not fit"),
        ("- match: x\n  codec: zip", "pattern 1: unknown codec"),
        ("- match: x\n  codec: int\n  bits: two", "bits must be int"),
    ],
)
def test_wrong_pattern_files_are_explained(tmp_path, text, words):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_rules(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_rules(tmp_path / "absent.yaml")


def test_the_example_is_valid():
    from pathlib import Path

    example = Path(__file__).parents[3] / "configs" / "compress.yaml"
    assert len(load_rules(example)) >= 2
