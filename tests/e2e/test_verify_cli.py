"""verify and diff as typed: exit codes, tables, JSON, LoRA adapters, grown vocabularies."""

from __future__ import annotations

import json

import pytest

from deltaserve.artifact.reader import Delta
from deltaserve.cli.main import dispatch
from tests.families import make_base, make_fine_tune, make_lora

TEXT = ["--samples", "6", "--seq-len", "24", "--continued", "8"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("verify")
    make_base("llama", root / "base")
    make_fine_tune(root / "base", root / "tuned", seed=1, added_tokens=3)
    make_lora(root / "base", root / "adapter", root / "merged")
    for name, extra in (("tuned", ["--bits", "2"]), ("adapter", [])):
        argv = ["compress", str(root / "base"), str(root / name), "-o", str(root / f"{name}.d")]
        assert dispatch([*argv, *extra]) == 0
    return root


def verify(models, name, *options):
    argv = ["verify", str(models / "base"), str(models / f"{name}.d"), "--model"]
    return dispatch([*argv, str(models / name), *TEXT, *options])


def test_thresholds_decide_the_exit_code(models, capsys):
    assert verify(models, "tuned", "--max-kl", "1e-6") == 1
    assert "MISSED: KL" in capsys.readouterr().out
    assert verify(models, "tuned", "--max-kl", "50", "--min-agreement", "0.01") == 0
    out = capsys.readouterr().out
    assert "passed: KL" in out
    assert "perplexity of base + delta" in out
    assert dispatch(["inspect", str(models / "tuned.d"), "--verify"]) == 0
    assert "KL of the next token" in capsys.readouterr().out


def test_an_adapter_is_exact(models, capsys):
    assert verify(models, "adapter", "--max-kl", "1e-6", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["agreement"] == 1
    assert report == Delta.open(models / "adapter.d").manifest.quality.to_json()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-kl", "-1"], "--max-kl must be 0 or more"),
        (["--min-agreement", "2"], "--min-agreement must lie in 0 to 1"),
        (["--data", "absent.jsonl"], "needs a tokenizer"),
        (["--seq-len", "1000"], "beyond the model's 256 tokens"),
    ],
)
def test_bad_options_are_one_line(models, capsys, options, message):
    assert verify(models, "tuned", *options) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err


def test_diff(models, capsys):
    assert dispatch(["diff", str(models / "base"), str(models / "tuned"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"name", "norm", "effective_rank", "unchanged"} <= found[0].keys()
    assert dispatch(["diff", str(models / "base"), str(models / "tuned")]) == 0
    assert "0 of 30 parameters are unchanged" in capsys.readouterr().out
