"""Opening Hugging Face checkpoints, sound and broken ones."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.artifact.digest import checkpoint_digest
from deltaserve.errors import CheckpointError

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 6,
    "tie_word_embeddings": True,
}
EMBED = "model.embed_tokens.weight"


def weights():
    return {
        EMBED: torch.arange(24.0).view(6, 4),
        "model.norm.weight": torch.ones(4).bfloat16(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }


def save(path, tensors, config=CONFIG, shards=1):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    index = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        file = f"model-{i + 1:05d}-of-{len(tensors):05d}.safetensors"
        save_file({name: tensor}, path / file)
        index[name] = file
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return path


def test_single_and_sharded_are_the_same_model(tmp_path):
    single = Checkpoint.open(save(tmp_path / "one", weights()))
    sharded = Checkpoint.open(save(tmp_path / "many", weights(), shards=3))
    for model in (single, sharded):
        assert model.names() == [EMBED, "model.norm.weight"]
        assert model.shape(EMBED) == (6, 4)
        assert model.dtype("model.norm.weight") == torch.bfloat16
        assert torch.equal(model.tensor(EMBED), weights()[EMBED])
        assert model.num_bytes == 24 * 4 + 4 * 2
        assert model.architecture == "LlamaForCausalLM"
    assert single.name == "one"
    assert checkpoint_digest(single) == checkpoint_digest(sharded)


def test_digest_sees_every_change(tmp_path):
    seen = {checkpoint_digest(Checkpoint.open(save(tmp_path / "a", weights())))}
    for i, change in enumerate(
        (
            {EMBED: weights()[EMBED] + 1},
            {EMBED: weights()[EMBED].view(4, 6)},
            {EMBED: weights()[EMBED].to(torch.float64)},
            {"model.extra.weight": torch.ones(1)},
        )
    ):
        path = save(tmp_path / f"changed{i}", weights() | change)
        seen.add(checkpoint_digest(Checkpoint.open(path)))
    assert len(seen) == 5


def test_tied_heads(tmp_path):
    tied = Checkpoint.open(save(tmp_path / "tied", weights()))
    assert tied.tied
    assert torch.equal(tied.tensor("lm_head.weight"), weights()[EMBED])
    assert "lm_head.weight" not in tied.names()
    head = {"lm_head.weight": torch.zeros(6, 4)}
    assert not Checkpoint.open(save(tmp_path / "stored", weights() | head)).tied
    copy = {"lm_head.weight": weights()[EMBED].clone()}
    assert Checkpoint.open(save(tmp_path / "copy", weights() | copy)).tied
    untied = Checkpoint.open(
        save(tmp_path / "untied", weights(), CONFIG | {"tie_word_embeddings": False})
    )
    assert not untied.tied
    assert not untied.has("lm_head.weight")


def test_broken_checkpoints_are_explained(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint.open(tmp_path / "absent")
    path = save(tmp_path / "m", weights())
    with pytest.raises(CheckpointError, match="is a file"):
        Checkpoint.open(path / "config.json")
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-7])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        Checkpoint.open(path)
    (path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or not"):
        Checkpoint.open(path)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safe_serialization=True"):
        Checkpoint.open(path)
    (path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        Checkpoint.open(path)
    (path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        Checkpoint.open(path)
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        Checkpoint.open(path)


def test_a_missing_shard_is_named(tmp_path):
    path = save(tmp_path / "m", weights(), shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is missing"):
        Checkpoint.open(path)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_cannot_leave_its_directory(tmp_path, file):
    path = save(tmp_path / "m", weights(), shards=3)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {EMBED: file}}))
    with pytest.raises(CheckpointError, match="points outside"):
        Checkpoint.open(path)


def test_quantised_and_unknown_models_are_refused(tmp_path):
    config = CONFIG | {"quantization_config": {"bits": 4}}
    with pytest.raises(CheckpointError, match="quantised already"):
        Checkpoint.open(save(tmp_path / "q", weights(), config))
    odd = Checkpoint.open(save(tmp_path / "odd", weights(), CONFIG | {"model_type": "zebra"}))
    with pytest.raises(CheckpointError, match="not understood"):
        assert odd.hf_config


def test_a_hub_id_that_cannot_be_had_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="neither a local directory nor"):
        Checkpoint.open("deltaserve-tests/no-such-model")
