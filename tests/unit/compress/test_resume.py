"""A run that was killed goes on at the layer where it stopped, and ends with the same digest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deltaserve.compress.choose import Request
from deltaserve.compress.goal import Goal
from deltaserve.compress.plan import make_plan
from deltaserve.compress.run import Target, compress, compress_many, compress_to
from deltaserve.compress.textsource import TextOptions
from deltaserve.compress.work import Work
from deltaserve.errors import ConfigError

TEXT = TextOptions(samples=8, seq_len=16)
KILLED = """
import os, signal, sys
from deltaserve.compress.goal import Goal
from deltaserve.compress.run import compress_to
from deltaserve.compress.textsource import TextOptions

def die(phase, done, total):
    if [phase, done] == [sys.argv[4], int(sys.argv[5])]:
        os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[4] == "fit":  # in the midst of a layer, where most of the time is spent
    from deltaserve.compress import candidates

    fit, calls = candidates._tried, []

    def counted(*arguments):
        calls.append(arguments)
        return fit(*arguments) if len(calls) < int(sys.argv[5]) else os.kill(os.getpid(), 9)

    candidates._tried = counted
goal = Goal(target_ratio=6.0)
compress_to(*sys.argv[1:4], goal, TextOptions(samples=8, seq_len=16), progress=die)
"""


@pytest.fixture(scope="module")
def whole(talking_pair, tmp_path_factory):
    """The digest of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "d"
    return compress_to(*talking_pair, out, Goal(target_ratio=6.0), TEXT).manifest.digest


@pytest.mark.parametrize(
    ("phase", "done", "kept"),
    [
        ("measure", 1, "measure/layer-00001.json"),
        ("fit", 2, "measure/head.json"),
        ("fit", 9, "measure/layer-00001.json"),
        ("compress", 1, "attempt-0/layer-00000.safetensors"),
        ("compare", 1, "attempt-0/layer-00001.safetensors"),
    ],
)
def test_killed_anywhere_and_run_again(talking_pair, tmp_path, whole, phase, done, kept):
    out = tmp_path / "d"
    command = [sys.executable, "-c", KILLED, *map(str, talking_pair), str(out), phase, str(done)]
    assert subprocess.run(command, check=False).returncode == -9
    assert not out.exists()
    [work] = tmp_path.glob(".d.*.work")
    before = (work / kept).stat().st_mtime_ns
    seen = []

    def watch(*progress):
        if not seen:
            assert (work / kept).stat().st_mtime_ns == before
        seen.append(progress)

    manifest = compress_to(*talking_pair, out, Goal(target_ratio=6.0), TEXT, progress=watch)
    assert manifest.manifest.digest == whole
    assert not work.exists()


def test_what_was_finished_is_not_done_again(talking_pair, tmp_path, monkeypatch):
    out, plan = tmp_path / "d", make_plan("int", {"bits": 1})

    def stop(phase, done, total):
        if (phase, done) == ("compress", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(*talking_pair, out, plan, stop, calibration=TEXT)
    fitted = []
    from deltaserve.compress import calibrate

    layer = calibrate._layer
    monkeypatch.setattr(calibrate, "_layer", lambda *a: fitted.append(a[3]) or layer(*a))
    compress(*talking_pair, out, plan, calibration=TEXT)
    assert fitted == [1]


def test_other_options_begin_anew_and_errors_leave_nothing(talking_pair, tmp_path, monkeypatch):
    out, plan = tmp_path / "d", make_plan("int", {"bits": 1})

    def stop(phase, done, total):
        if phase == "compress":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(*talking_pair, out, plan, stop, calibration=TEXT)
    [work] = tmp_path.glob(".d.*.work")
    other = make_plan("int", {"bits": 2})
    manifest = compress(*talking_pair, out, other, calibration=TEXT)
    assert (
        manifest.digest == compress(*talking_pair, tmp_path / "e", other, calibration=TEXT).digest
    )
    assert not work.exists()

    def broken(*_):
        raise OSError("no space")

    monkeypatch.setattr("deltaserve.compress.work.save_file", broken)
    with pytest.raises(OSError, match="no space"):
        compress(*talking_pair, tmp_path / "f", plan, calibration=TEXT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "e"]


def test_two_runs_to_one_output_do_not_mix(tmp_path):
    with (
        Work(tmp_path / "out", {"a": 1}),
        pytest.raises(ConfigError, match="another process"),
        Work(tmp_path / "out", {"a": 1}),
    ):
        pass


def test_several_fine_tunes_in_one_call_are_those_of_single_calls(
    talking_pair, tmp_path, monkeypatch
):
    base, tuned = talking_pair
    from deltaserve.artifact import checkpoint

    opened = []
    single = checkpoint.Checkpoint.open.__func__

    def counted(cls, where):
        opened.append(Path(where).name)
        return single(cls, where)

    request = Request(goal=Goal(target_ratio=6.0), options=TEXT)
    alone = compress_many(base, [Target(tuned, tmp_path / "alone")], request)[0]
    monkeypatch.setattr(checkpoint.Checkpoint, "open", classmethod(counted))
    targets = [Target(tuned, tmp_path / name) for name in ("a", "b")]
    phases: list[str] = []
    both = compress_many(base, targets, request, lambda phase, *_: phases.append(phase))
    assert [c.manifest.digest for c in both] == [alone.manifest.digest] * 2
    assert opened.count("base") == 1
    # In step: the second one's first layer comes before the first one's last.
    layers = [phase[0] for phase in phases if phase.endswith(": compress")]
    assert layers == ["a", "b", "a", "b"]
