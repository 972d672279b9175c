"""Calibrated compression of whole models: every family, repeatable, better than rounding."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.artifact.reader import Delta
from deltaserve.compress.layers import LayerWalk
from deltaserve.compress.plan import make_plan
from deltaserve.compress.run import compress
from deltaserve.compress.text import Sample
from deltaserve.compress.textsource import TextOptions
from deltaserve.compress.verify import verify
from deltaserve.compress.weights import Table
from deltaserve.errors import CheckpointError, CompatibilityError, ConfigError
from tests.families import FAMILIES, make_base, make_fine_tune

TEXT = TextOptions(samples=24, seq_len=32)
UNSEEN = TextOptions(samples=12, seq_len=32, seed=1)
ONE_BIT = make_plan("int", {"bits": 1})


def samples(vocab=90):
    generator = torch.Generator().manual_seed(0)
    lengths = (20, 3, 31)
    return tuple(
        Sample(tuple(torch.randint(3, vocab, (n,), generator=generator).tolist()), 1)
        for n in lengths
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_walk_through_the_layers_is_the_model_itself(family, tmp_path):
    model = Checkpoint.open(make_base(family, tmp_path / "base"))
    embedding = Table(None, model.tensor("model.embed_tokens.weight"))
    walk = LayerWalk(model, [samples()], embedding, tmp_path / "walk", "cpu")
    seen: dict[str, int] = {}
    for layer in range(len(walk)):
        names = [name for name in model.names() if name.startswith(walk.prefix(layer))]
        weights = {name: model.tensor(name).float() for name in names}
        walk.observe(layer, weights, lambda m, x: seen.update({m: seen.get(m, 0) + len(x)}))
        walk.advance(layer, weights)
    norm = model.tensor("model.norm.weight")
    out = [walk.final(number, norm) for number in range(len(walk.batches))]
    whole = AutoModelForCausalLM.from_pretrained(
        model.path, dtype=torch.float32, attn_implementation="eager"
    )
    ordered = sorted(samples(), key=lambda s: len(s.tokens))
    with torch.no_grad():
        expected = [whole.model(torch.tensor([s.tokens])).last_hidden_state[0] for s in ordered]
    assert torch.allclose(torch.cat(out), torch.cat(expected), atol=1e-4)
    linears = [n for n in model.names() if "proj" in n and n.endswith("weight")]
    assert set(seen) == set(linears)
    assert set(seen.values()) == {54}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3", "phi3"])
def test_calibration_beats_rounding_on_unseen_text(family, tmp_path):
    base = make_base(family, tmp_path / "base")
    tuned = make_fine_tune(base, tmp_path / "tuned", seed=1, added_tokens=2)
    divergences = []
    for name, text in (("plain", None), ("ours", TEXT)):
        manifest = compress(base, tuned, tmp_path / name, ONE_BIT, calibration=text)
        assert (manifest.calibration is None) == (text is None)
        report = verify(base, tmp_path / name, tuned, UNSEEN)
        divergences.append((report.kl_mean, manifest.sizes.resident.total))
    (plain, plain_bytes), (ours, our_bytes) = divergences
    assert our_bytes == plain_bytes
    assert ours < 0.9 * plain


def test_the_same_inputs_and_seed_give_the_same_digest(talking_pair, tmp_path):
    digests = []
    for run, seed in enumerate((0, 0, 5)):
        text = TextOptions(samples=8, seq_len=16, seed=seed)
        manifest = compress(*talking_pair, tmp_path / str(run), ONE_BIT, calibration=text)
        digests.append(manifest.digest)
        Delta.open(tmp_path / str(run)).verify_digest()
    assert digests[0] == digests[1] != digests[2]
    manifest = Delta.open(tmp_path / "0").manifest
    assert (manifest.calibration.sequences, manifest.quality.text.sequences) == (8, 2)


def test_a_file_calibrates_too_and_joint_sparsity(talking_pair, tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text('{"text": "to be"}\n{"messages": [{"role": "user", "content": "hi"}]}\n')
    text = TextOptions(data)
    plan = make_plan("nm24", {"bits": 2})
    manifest = compress(*talking_pair, tmp_path / "d", plan, calibration=text)
    assert manifest.calibration.source == "d.jsonl"
    assert manifest.tensors["model.layers.1.mlp.up_proj.weight"].codec == "nm24"


def test_layers_without_a_change_and_models_without_any(pair, tmp_path):
    base, tuned, _ = pair(only="layers.1.mlp", vocab_size=90)
    manifest = compress(base, tuned, tmp_path / "d", ONE_BIT, calibration=TEXT)
    assert len(manifest.tensors) == 3
    assert compress(base, base, tmp_path / "e", ONE_BIT, calibration=TEXT).tensors == {}


def test_damaged_models_and_bad_text_are_refused_before_anything_is_written(
    talking_pair, tmp_path, pair
):
    base, tuned = talking_pair
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="holds no text"):
        compress(base, tuned, tmp_path / "d", calibration=TextOptions(tmp_path / "empty.jsonl"))
    other, damaged, model = pair()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(damaged)
    with pytest.raises(CheckpointError, match="holds NaN"):
        compress(other, damaged, tmp_path / "d", calibration=TEXT)
    (tmp_path / "d.jsonl").write_text('{"text": "zzzzz"}\n')
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (damaged / file).write_bytes((tuned / file).read_bytes())
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    model.save_pretrained(damaged)
    with pytest.raises(CompatibilityError, match="the model only 80 tokens"):
        compress(other, damaged, tmp_path / "d", calibration=TextOptions(tmp_path / "d.jsonl"))
    assert not (tmp_path / "d").exists()
