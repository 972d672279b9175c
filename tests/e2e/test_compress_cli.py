"""compress, inspect and export as typed: results, bad input, interruption, a full disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from deltaserve.cli.main import dispatch

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def save(path, config, change=0.0, shards="5GB"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(change * torch.randn_like(parameter))
    model.save_pretrained(path, max_shard_size=shards)
    return path


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save(root / "base", LlamaConfig(**SHAPE))
    save(root / "tuned", LlamaConfig(**SHAPE), 0.01)
    save(root / "sharded", LlamaConfig(**SHAPE), 0.01, "40KB")
    save(root / "qwen", Qwen2Config(**SHAPE), 0.01)
    return root


@pytest.fixture
def at(tmp_path, originals):
    """The models copied into a directory that may be damaged; ``at`` makes paths in it."""
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    return lambda name: str(tmp_path / name)


@pytest.fixture
def refused(capsys, tmp_path):
    """Run a command that must fail: exit code 2, one line on stderr, nothing left behind."""

    def run(*argv, leaves=()):
        before = {p.name for p in tmp_path.iterdir()}
        capsys.readouterr()
        code = dispatch(list(argv))
        out, err = capsys.readouterr()
        assert code == 2, err
        assert out == ""
        assert err.count("\n") == 1, err
        assert err.startswith("deltaserve: error: ")
        assert {p.name for p in tmp_path.iterdir()} == before | set(leaves)
        return err

    return run


def test_compress_inspect_export(at, capsys):
    assert dispatch(["compress", at("base"), at("tuned"), "-o", at("delta"), "--codec", "int"]) == 0
    out = capsys.readouterr().out
    assert "smaller in memory" in out
    assert dispatch(["inspect", at("delta"), "--json", "--verify"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["format"] == "deltaserve/1"
    assert manifest["sizes"]["disk"]["total"] == os.path.getsize(at("delta/delta.safetensors"))
    assert dispatch(["inspect", at("delta")]) == 0
    table = capsys.readouterr().out
    assert manifest["digest"] in table
    assert "model.layers.1.post_attention_layernorm.weight" in table
    assert "int 2-bit g64" in table
    assert dispatch(["export", at("base"), at("delta"), "-o", at("out")]) == 0
    assert at("out") in capsys.readouterr().out
    config = LlamaConfig.from_pretrained(at("out"))
    assert config.architectures == ["LlamaForCausalLM"]
    exact, merged = (load_file(at(n) + "/model.safetensors") for n in ("tuned", "out"))
    assert merged.keys() == exact.keys()
    for name, value in exact.items():
        assert torch.allclose(merged[name].float(), value.float(), atol=0.05), name


def test_options_and_patterns_reach_the_codecs(at, capsys, tmp_path):
    (tmp_path / "plan.yaml").write_text("- match: '*.down_proj.*'\n  codec: nf4\n")
    options = [
        "--codec",
        "int",
        "--bits",
        "1",
        "--scale-axis",
        "row",
        "--planes",
        "2",
        "--asymmetric",
        "--clip",
        "absmax",
        "--embedding-codec",
        "raw",
        "--config",
        at("plan.yaml"),
    ]
    argv = ["compress", at("base"), at("sharded"), "-o", at("delta"), *options]
    assert dispatch(argv) == 0
    tensors = json.loads((tmp_path / "delta" / "delta.json").read_text())["tensors"]
    assert tensors["model.layers.0.mlp.down_proj.weight"]["codec"] == "nf4"
    assert tensors["lm_head.weight"]["codec"] == "raw"
    assert tensors["model.layers.0.self_attn.q_proj.weight"]["params"] == {
        "bits": 1,
        "group_size": 64,
        "scale_axis": "row",
        "symmetric": False,
        "planes": 2,
        "clip": "absmax",
    }


def test_wrong_options_are_refused(at, refused):
    start = ["compress", at("base"), at("tuned"), "-o", at("d")]
    assert "bits must be one of" in refused(*start, "--bits", "5")
    assert "rank does not fit codec int" in refused(*start, "--rank", "4")
    assert "unknown codec" in refused(*start, "--codec", "zip")
    assert "cannot be read" in refused(*start, "--config", at("absent.yaml"))
    assert "out" in refused("compress", at("base"), at("tuned"))


def test_models_that_do_not_belong_together(at, refused):
    error = refused("compress", at("base"), at("qwen"), "-o", at("d"))
    assert "LlamaForCausalLM" in error
    assert "Qwen2ForCausalLM" in error
    save(at("wide"), LlamaConfig(**SHAPE | {"intermediate_size": 80}))
    error = refused("compress", at("base"), at("wide"), "-o", at("d"))
    assert "[64, 96]" in error
    assert "[64, 80]" in error


def test_damaged_models(at, refused, tmp_path):
    argv = ["compress", at("base"), at("tuned"), "-o", at("d")]
    assert "neither a local" in refused("compress", at("base"), "no/such", "-o", at("d"))
    assert "does not exist" in refused("compress", at("absent"), at("tuned"), "-o", at("d"))
    weights = tmp_path / "tuned" / "model.safetensors"
    tensors, data = load_file(weights), weights.read_bytes()
    for bad in (float("nan"), float("-inf")):
        name = "model.layers.1.mlp.up_proj.weight"
        broken = tensors[name].clone()
        broken[2, 2] = bad
        save_file(tensors | {name: broken}, weights)
        assert f"{name} holds NaN or infinite values" in refused(*argv)
    weights.write_bytes(data[:-100])
    assert "model.safetensors is truncated" in refused(*argv)
    weights.rename(tmp_path / "tuned" / "pytorch_model.bin")
    assert "pickle" in refused(*argv)
    shard = next((tmp_path / "sharded").glob("model-00002*"))
    shard.unlink()
    assert f"{shard.name} is missing" in refused(
        "compress", at("base"), at("sharded"), "-o", at("d")
    )


def test_output_that_is_not_empty(at, refused):
    assert "not empty" in refused("compress", at("base"), at("tuned"), "-o", at("base"))
    assert dispatch(["compress", at("base"), at("tuned"), "-o", at("d"), "--codec", "int"]) == 0
    assert "not empty" in refused("export", at("base"), at("d"), "-o", at("tuned"))


def test_a_delta_for_another_base_and_damaged_deltas(at, refused, tmp_path):
    assert dispatch(["compress", at("base"), at("tuned"), "-o", at("d"), "--codec", "int"]) == 0
    manifest = json.loads((tmp_path / "d" / "delta.json").read_text())
    error = refused("export", at("tuned"), at("d"), "-o", at("out"))
    assert manifest["base"]["digest"] in error
    assert manifest["source"]["digest"] in error
    weights = tmp_path / "d" / "delta.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "is damaged" in refused("inspect", at("d"), "--verify")
    weights.write_bytes(data[:-5])
    assert "delta.safetensors is truncated" in refused("inspect", at("d"))
    assert "truncated" in refused("export", at("base"), at("d"), "-o", at("out"))
    assert "has no delta.json" in refused("inspect", at("base"))


@pytest.mark.parametrize("command", ["compress", "export"])
def test_a_full_disk(at, refused, monkeypatch, command):
    assert dispatch(["compress", at("base"), at("tuned"), "-o", at("d"), "--codec", "int"]) == 0

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("deltaserve.artifact.safetensors_io.os.fsync", full)
    second = at("tuned") if command == "compress" else at("d")
    assert "no space left" in refused(command, at("base"), second, "-o", at("new"))


SLOW = """
import time
import deltaserve.compress.change as change
exact = change.encode_measured
def slow(*args):
    print("working", flush=True)
    time.sleep(0.2)
    return exact(*args)
change.encode_measured = slow
from deltaserve.cli.main import main
main()
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_compress_leaves_nothing_and_a_second_run_succeeds(at, tmp_path, sent):
    argv = ["compress", at("base"), at("tuned"), "-o", at("out/delta"), "--codec", "int"]
    before = sorted(p.name for p in tmp_path.iterdir())
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *argv],
        cwd="/",
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    time.sleep(0.1)
    assert next((tmp_path / "out").iterdir()).name.endswith(".partial")
    process.send_signal(sent)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err in ("", "deltaserve: interrupted\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert dispatch(argv) == 0
    assert (tmp_path / "out" / "delta" / "delta.json").is_file()


@pytest.mark.parametrize("command", ["compress", "inspect", "export"])
def test_help_teaches_with_an_example(command):
    result = subprocess.run(
        [sys.executable, "-m", "deltaserve", command, "--help"],
        capture_output=True,
        text=True,
        cwd="/",
        check=True,
    )
    assert f"Example: deltaserve {command} ./" in result.stdout
