"""Compress and export whole models: every codec, family, dtype; exactness; memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.artifact.codecs import get_codec
from deltaserve.artifact.reader import Delta
from deltaserve.compress.export import export
from deltaserve.compress.plan import make_plan
from deltaserve.compress.run import compress
from deltaserve.errors import CheckpointError, CodecError

CODECS = [
    ("int", {"bits": 2}),
    ("int", {"bits": 1, "scale_axis": "row", "planes": 2}),
    ("int", {"bits": 4, "group_size": 16, "symmetric": False}),
    ("nm24", {"bits": 4}),
    ("lowrank", {"rank": 4}),
    ("nf4", {}),
    ("rows", {}),
    ("xor", {}),
    ("raw", {}),
]


def exact(path, model):
    """The checkpoint at ``path`` loads in transformers and equals ``model`` bit for bit."""
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=model.dtype)
    mine, theirs = model.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(("codec", "params"), CODECS)
def test_export_is_base_plus_delta(pair, tmp_path, codec, params):
    base, tuned, model = pair()
    manifest = compress(base, tuned, tmp_path / "delta", make_plan(codec, params))
    export(base, tmp_path / "delta", tmp_path / "out")
    delta, origin = Delta.open(tmp_path / "delta"), Checkpoint.open(base)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    state = loaded.state_dict()
    for name in origin.names():
        assert torch.equal(delta.decode(name, origin.tensor(name)), state[name]), name
    entry = manifest.tensors["model.layers.0.mlp.up_proj.weight"]
    assert entry.codec == codec
    if codec in ("raw", "xor"):
        assert exact(tmp_path / "out", model)
        assert {e.codec for e in manifest.tensors.values()} == {codec}
    else:
        assert entry.error < 0.95
        assert manifest.tensors["model.norm.weight"].codec == "raw"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_families_and_dtypes_are_exact_with_xor(pair, tmp_path, family, dtype):
    base, tuned, model = pair(family, dtype=dtype)
    manifest = compress(base, tuned, tmp_path / "delta", make_plan("xor"))
    assert manifest.sizes.full.total == Checkpoint.open(tuned).num_bytes
    export(base, tmp_path / "delta", tmp_path / "out")
    assert exact(tmp_path / "out", model)


def test_sharded_checkpoints_in_and_out(pair, tmp_path):
    base, tuned, model = pair(max_shard_size="10KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    compress(base, tuned, tmp_path / "delta", make_plan("raw"), max_shard_bytes=10_000)
    export(base, tmp_path / "delta", tmp_path / "out", max_shard_bytes=10_000)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert exact(tmp_path / "out", model)


def test_unchanged_parameters_cost_nothing(pair, tmp_path):
    base, tuned, model = pair(only="layers.1.mlp")
    manifest = compress(base, tuned, tmp_path / "delta")
    assert len(manifest.tensors) == 3
    assert all("layers.1.mlp" in name for name in manifest.tensors)
    export(base, tmp_path / "delta", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for name, value in model.state_dict().items():
        if "layers.1.mlp" not in name:
            assert torch.equal(value, loaded.state_dict()[name])


def test_identical_models_make_an_empty_delta(pair, tmp_path):
    base, _, _ = pair()
    manifest = compress(base, base, tmp_path / "delta")
    assert manifest.tensors == {}
    assert Delta.open(tmp_path / "delta").names() == []
    export(base, tmp_path / "delta", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("base_tied", [True, False])
@pytest.mark.parametrize("model_tied", [True, False])
def test_tied_and_untied_heads_in_any_combination(tmp_path, new_model, tune, base_tied, model_tied):
    new_model(tie_word_embeddings=base_tied).save_pretrained(tmp_path / "base")
    model = tune(new_model(tie_word_embeddings=model_tied))
    model.save_pretrained(tmp_path / "tuned")
    manifest = compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "d", make_plan("raw"))
    assert ("lm_head.weight" in manifest.tensors) == (not (base_tied and model_tied))
    assert manifest.sizes.full.total == Checkpoint.open(tmp_path / "tuned").num_bytes
    export(tmp_path / "base", tmp_path / "d", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] == (base_tied and model_tied)
    assert exact(tmp_path / "out", model)


def test_an_untied_head_that_stayed_is_not_mistaken_for_a_tied_one(tmp_path, new_model, tune):
    new_model(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model = new_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    tune(model, only="embed_tokens").save_pretrained(tmp_path / "tuned")
    manifest = compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "d", make_plan("raw"))
    assert manifest.tensors["lm_head.weight"].params == {"bits": 0, "rows": 0}
    export(tmp_path / "base", tmp_path / "d", tmp_path / "out")
    assert exact(tmp_path / "out", model)


@pytest.mark.parametrize("vocab", [83, 77])
@pytest.mark.parametrize("tied", [True, False])
def test_added_and_removed_tokens(tmp_path, new_model, tune, vocab, tied):
    model = new_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(vocab, mean_resizing=False)
    tune(model, only="layers").save_pretrained(tmp_path / "tuned")
    manifest = compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "d")
    entry = manifest.tensors["model.embed_tokens.weight"]
    assert (entry.codec, entry.params["rows"]) == ("rows", max(0, vocab - 80))
    assert (tmp_path / "d" / "config.json").is_file()
    export(tmp_path / "base", tmp_path / "d", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for get in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(loaded, get)().weight, getattr(model, get)().weight)


def test_models_of_different_dtypes(tmp_path, new_model, tune):
    model = new_model()
    model.save_pretrained(tmp_path / "base")
    tuned = tune(model.float(), only="q_proj")
    tuned.save_pretrained(tmp_path / "tuned")
    manifest = compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "d")
    assert len(manifest.tensors) == 2
    with pytest.raises(CodecError, match=r"q_proj.*equal dtypes"):
        compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "x", make_plan("xor"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("which", ["base", "tuned"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_models_that_are_not_finite_are_refused(tmp_path, new_model, tune, which, bad):
    for name in ("base", "tuned"):
        model = new_model() if name == "base" else tune(new_model())
        if name == which:
            with torch.no_grad():
                model.model.layers[1].mlp.up_proj.weight[3, 4] = bad
        model.save_pretrained(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "d")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "tuned"]


def test_only_files_that_differ_travel(pair, tmp_path):
    base, tuned, _ = pair()
    for path, text in ((base, "{}"), (tuned, "{}")):
        (path / "tokenizer_config.json").write_text(text)
    (tuned / "chat_template.jinja").write_text("{{ messages }}")
    compress(base, tuned, tmp_path / "d")
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "delta.json",
        "delta.safetensors",
    ]
    card = (tmp_path / "d" / "README.md").read_text()
    assert "deltaserve serve BASE --delta NAME=PATH" in card
    export(base, tmp_path / "d", tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()


def test_recorded_errors_and_sizes_are_true(pair, tmp_path):
    base, tuned, _ = pair()
    seen = []
    manifest = compress(base, tuned, tmp_path / "d", progress=lambda *a: seen.append(a))
    origin, model = Checkpoint.open(base), Checkpoint.open(tuned)
    delta = Delta.open(tmp_path / "d")
    for name, entry in manifest.tensors.items():
        enc = delta.encoded(name)
        assert entry.resident_bytes == get_codec(enc.codec).resident_bytes(enc)
        exact_delta = model.tensor(name).float() - origin.tensor(name).float()
        codec = get_codec(enc.codec)
        stored = codec.delta(enc) if codec.additive else exact_delta
        error = float((stored - exact_delta).norm() / exact_delta.norm())
        assert entry.error == pytest.approx(error, abs=1e-5)
    assert {phase for phase, _, _ in seen} == {"write", "hash base", "hash model"}
    assert all(done <= total for _, done, total in seen)
    assert [a for a in seen if a[0] == "write"][-1][1] == model.num_bytes


MEASURE = """
import sys, threading, time
import torch
from deltaserve.compress.run import compress
from deltaserve.artifact.checkpoint import Checkpoint
Checkpoint.open(sys.argv[1]).hf_config  # imports are not what is measured
torch.set_num_threads(1)

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

start, peak, stop = anonymous(), [0], threading.Event()

def watch():
    while not stop.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.004)

thread = threading.Thread(target=watch)
thread.start()
compress(sys.argv[1], sys.argv[2], sys.argv[3])
stop.set()
thread.join()
print(peak[0] - start)
"""


def save_deep(model, path, layers):
    """The one-layer ``model`` with its layer repeated: a large checkpoint made quickly."""
    model.config.num_hidden_layers = layers
    model.config.layer_types = None
    model.config.save_pretrained(path)
    state = {}
    for name, tensor in model.state_dict().items():
        for i in range(layers if ".layers.0." in name else 1):
            state[name.replace(".layers.0.", f".layers.{i}.")] = tensor.clone()
    save_file(state, path / "model.safetensors")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_a_few_tensors_not_a_model(tmp_path, new_model, tune):
    shape = {"hidden_size": 512, "intermediate_size": 4096, "head_dim": 128}
    model = new_model(num_hidden_layers=1, **shape)
    save_deep(model, tmp_path / "base", 14)
    save_deep(tune(model), tmp_path / "tuned", 14)
    largest = 4096 * 512 * 2
    total = Checkpoint.open(tmp_path / "tuned").num_bytes
    command = [sys.executable, "-c", MEASURE, *(str(tmp_path / n) for n in ("base", "tuned", "d"))]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    peak = int(result.stdout)
    assert total > 45 * largest
    # Measured: 5 tensors, and 75 MB that do not grow (thread pools, chunks, allocator).
    assert peak < 7 * largest + 100_000_000, f"{peak:,} of {total:,}"
    assert peak < total * 2 / 3, f"{peak:,} of {total:,}"
