"""Flags and file become one configuration; what is wrong is said in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deltaserve.config import (
    DeltaSource,
    EngineConfig,
    ServerConfig,
    hash_key,
)
from deltaserve.config_sources import load_config, parse_deltas
from deltaserve.errors import ConfigError

ROOT = Path(__file__).parents[3]


def config_of(tmp_path: Path, text: str, **flags: object) -> ServerConfig:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    return load_config(flags, file)


def test_the_defaults():
    config = load_config({"base": "some/llama", "port": None})
    assert config == ServerConfig(EngineConfig("some/llama"))
    assert config.engine.served_model_name == "llama"
    assert config.api_key_sha256 is None


def test_flags_win_over_the_file(tmp_path):
    text = (
        "base: org/m\nmax-num-seqs: 3\nblock_size: 8\ndeltas: {a: one, b: two}\napi-key: s3cr3t\n"
    )
    flags = {"block_size": 32, "deltas": parse_deltas(["b=mine", "c=/x=y"])}
    config = config_of(tmp_path, text, **flags)
    assert (config.engine.max_num_seqs, config.engine.block_size) == (3, 32)
    assert config.engine.base == "org/m"
    assert config.engine.deltas == (
        DeltaSource("a", str(tmp_path / "one")),
        DeltaSource("b", "mine"),
        DeltaSource("c", "/x=y"),
    )
    assert config.api_key_sha256 == hash_key("s3cr3t")
    assert "s3cr3t" not in repr(config)


def test_paths_in_a_file_start_at_the_file(tmp_path):
    (tmp_path / "llama").mkdir()
    config = config_of(tmp_path, "base: llama\ndeltas: [a=sub/one, b=/abs]\n")
    assert config.engine.base == str(tmp_path / "llama")
    assert [d.path for d in config.engine.deltas] == [str(tmp_path / "sub/one"), "/abs"]


def test_durations_may_be_whole_numbers(tmp_path):
    config = config_of(tmp_path, "base: m\nmax-wait-s: 60\nslo_tpot_ms: 12.5")
    assert (config.engine.max_wait_s, config.engine.slo_tpot_ms) == (60, 12.5)


def test_management_in_a_file(tmp_path):
    text = (
        "base: org/m\nadmin-key: s3cr3t\ntenants: tenants.yaml\nstate-dir: state\n"
        "delta-roots: [deltas, /abs]\n"
    )
    config = config_of(tmp_path, text)
    assert config.admin_key_sha256 == hash_key("s3cr3t")
    assert config.managed
    assert config.tenants == str(tmp_path / "tenants.yaml")
    assert config.state_dir == str(tmp_path / "state")
    assert config.delta_roots == (str(tmp_path / "deltas"), "/abs")
    assert "s3cr3t" not in repr(config)
    flags = load_config({"base": "m", "admin_key": "x", "state_dir": "s", "delta_roots": ["d"]})
    assert flags.delta_roots == ("d",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("admin-key: x", "need state_dir"),
        ("tenants: t.yaml", "need state_dir"),
        ("state-dir: s", "no use without"),
        ("delta-roots: [a]", "no use without admin_key"),
        ("delta-roots: a\nadmin-key: x\nstate-dir: s", "must be a list"),
        ("delta-roots: [5]\nadmin-key: x\nstate-dir: s", "must be a list"),
        ("admin-key: 'a b'\nstate-dir: s", "visible ASCII"),
        ("admin-key: a\napi-key: b\nstate-dir: s", "make a tenant for it"),
        ("tenants: 5\nstate-dir: s", "tenants is 5, but must be text"),
    ],
)
def test_management_that_makes_no_sense(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, f"base: m\n{text}\n")


def test_the_example_is_valid():
    config = load_config({}, ROOT / "configs" / "serve.yaml")
    assert config.engine.served_model_name == "base"
    assert len(config.engine.deltas) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: m\nmax-num-seq: 3", "unknown key 'max-num-seq'; did you mean max_num_seqs"),
        ("base: m\ndelta: {a: b}", "did you mean deltas"),
        ("base: m\nport: '80'", "port is '80', but must be a whole number"),
        ("base: m\nport: true", "must be a whole number"),
        ("base: m\nport: 70000", "between 0 and 65535"),
        ("base: 5", "base is 5, but must be text"),
        ("base: m\ndtype: int8", "must be one of auto, float32"),
        ("base: m\nblock-size: 0", "block_size is 0, but must be at least 1"),
        ("base: m\nmax-num-seqs: 64\nmax-num-batched-tokens: 8", "must be at least max_num_seqs"),
        ("base: m\nport: 1\nport: 2", "'port' is given twice"),
        ("base: m\nblock-size: 1\nblock_size: 2", "block_size is given twice"),
        ("base: m\ndeltas: {a: x, a: y}", "'a' is given twice"),
        ("base: m\ndeltas: [a=x, a=y]", "two deltas are called 'a'"),
        ("base: m\ndeltas: {a: 5}", "path of delta 'a'"),
        ("base: m\ndeltas: 5", "must be a mapping of names to paths"),
        ("base: m\ndeltas: {'-a': x}", "cannot be a model's name"),
        ("base: m\ndeltas: {'a b': x}", "cannot be a model's name"),
        ("base: m\ndeltas: {m: x}", "names both the base and a delta"),
        ("base: my model", "--served-model-name"),
        ("base: m\napi-key: 'a b'", "visible ASCII"),
        ("base: m\napi-key: ''", "visible ASCII"),
        ("port: 5", "no base model"),
        ("[1, 2]", "must hold a mapping"),
        ("base: [", "not valid YAML"),
        ("base: m\nhost: ''", "host is empty"),
        ("base: m\nscheduling-policy: lottery", "must be one of fcfs, priority, vtc"),
        ("base: m\nmax-queued-requests: 0", "max_queued_requests is 0, but must be at least 1"),
        ("base: m\nmax-queued-tokens: -5", "max_queued_tokens is -5, but must be at least 1"),
        ("base: m\nslo-tpot-ms: 0", "slo_tpot_ms is 0, but must be a number above 0"),
        ("base: m\nslo-tpot-ms: fast", "slo_tpot_ms is 'fast', but must be a number"),
        ("base: m\nmax-wait-s: .inf", "max_wait_s is inf, but must be a number above 0"),
        ("base: m\nmax-wait-s: .nan", "max_wait_s is nan, but must be a number above 0"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, text)
    assert message in str(caught.value)


@pytest.mark.parametrize("source", ["", "a", "a=", "=b"])
def test_malformed_deltas(source):
    with pytest.raises(ConfigError, match="NAME=PATH"):
        parse_deltas([source])


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_config({}, tmp_path / "none.yaml")


def test_it_loads_without_yaml():
    code = "import sys; sys.modules['yaml'] = None; import deltaserve.config"
    subprocess.run([sys.executable, "-c", code], check=True)
