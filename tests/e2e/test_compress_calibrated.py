"""Calibrated compression as typed, and served: the engine needs to know nothing of it."""

from __future__ import annotations

import json

import pytest

from deltaserve.artifact.reader import Delta
from deltaserve.cli.main import dispatch
from deltaserve.compress.models import load_tokenizer
from deltaserve.demo.tokenizer import build_tokenizer
from tests.families import make_base, make_fine_tune


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("calibrated")
    make_base("llama", root / "base")
    make_fine_tune(root / "base", root / "tuned", seed=1)
    return root


def compress(models, out, *options):
    argv = ["compress", str(models / "base"), str(models / "tuned"), "-o", str(out), *options]
    return dispatch(argv)


def test_own_words_calibrate(models, tmp_path, capsys):
    options = ["--bits", "1", "--calibrate", "--samples", "8", "--seq-len", "16", "--seed", "3"]
    assert compress(models, tmp_path / "d", *options) == 0
    assert "smaller in memory" in capsys.readouterr().out
    text = Delta.open(tmp_path / "d").manifest.calibration
    assert (text.source, text.sequences, text.seed) == ("sampled from the fine-tune", 8, 3)
    assert dispatch(["inspect", str(tmp_path / "d"), "--verify"]) == 0
    assert "calibrated on" in capsys.readouterr().out


def test_a_file_without_a_tokenizer_is_refused(models, tmp_path, capsys):
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "x"}))
    assert load_tokenizer(models / "base") is None
    assert compress(models, tmp_path / "d", "--data", str(tmp_path / "d.jsonl")) == 2
    err = capsys.readouterr().err
    assert "needs a tokenizer" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "d").exists()


def test_a_wrong_line_is_named(models, tmp_path, capsys):
    build_tokenizer().save_pretrained(tmp_path / "words")
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        for file in (*(models / name).iterdir(), *(tmp_path / "words").iterdir()):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    (tmp_path / "d.jsonl").write_text('{"text": "good"}\n{"txt": "bad"}\n')
    assert compress(tmp_path, tmp_path / "d", "--data", str(tmp_path / "d.jsonl")) == 2
    assert "d.jsonl, line 2: needs either" in capsys.readouterr().err


SMALL = ["--samples", "16", "--seq-len", "24"]


def test_the_default_is_checked_and_explained(models, tmp_path, capsys):
    assert compress(models, tmp_path / "d", "--target-ratio", "8", "--explain", *SMALL) == 0
    out = capsys.readouterr().out
    assert "int 2-bit g64" in out
    assert "verified: KL" in out
    assert "on held-out text" in out
    quality = Delta.open(tmp_path / "d").manifest.quality
    assert quality.text.sequences == 4


def test_a_goal_that_is_out_of_reach_ends_with_1(models, tmp_path, capsys):
    assert compress(models, tmp_path / "d", "--max-kl", "1e-12", *SMALL) == 1
    assert "MISSED: KL" in capsys.readouterr().out
    assert (tmp_path / "d" / "delta.json").is_file()


def test_goals_and_codecs_exclude_each_other(models, tmp_path, capsys):
    assert compress(models, tmp_path / "d", "--preset", "small", "--bits", "2") == 2
    assert "choose the codecs themselves" in capsys.readouterr().err


def test_a_device_that_is_not_there(models, tmp_path, capsys):
    assert compress(models, tmp_path / "d", "--device", "cuda:77") == 2
    err = capsys.readouterr().err
    assert "--device cuda:77 cannot be used here" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "option", [("--samples", "5"), ("--seq-len", "32"), ("--seed", "3"), ("--device", "cuda")]
)
def test_options_of_calibration_are_not_ignored_without_it(models, tmp_path, capsys, option):
    assert compress(models, tmp_path / "d", "--plain", *option) == 2
    assert "are for calibration" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()
