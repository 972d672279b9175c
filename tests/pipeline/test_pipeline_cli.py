"""``deltaserve pipeline show`` and ``run``, as users call them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from deltaserve.cli.main import dispatch
from deltaserve.pipeline import Plan
from deltaserve.pipeline.trace import Trace
from tests.pipeline.pipelines import chats, texts, tokenizer

CONFIGS = Path(__file__).parents[2] / "configs" / "pipeline"


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """The shipped example, with data beside it."""
    chats(tmp_path / "chat.jsonl", 300)
    with (tmp_path / "chat.jsonl").open("a") as file:
        file.write("{\n")
    tokenizer(tmp_path / "base")
    file = tmp_path / "chat.yaml"
    file.write_text((CONFIGS / "chat.yaml").read_text().replace("2048", "256"))
    return file


def test_show(chat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["pipeline", "show", str(chat)]) == 0
    out = capsys.readouterr().out
    assert "pack(length=256" in out
    assert "gives        a batch: input_ids" in out
    assert "tokenize takes 64 texts at a time" in out
    assert Plan.from_yaml(chat).fingerprint() in out


def test_run_and_go_on(chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["pipeline", "run", str(chat), "--cache", str(tmp_path / "cache")]
    saved = ["--state", str(tmp_path / "state.json")]
    assert dispatch([*common, "--print", "100"]) == 0
    *elements, summary = capsys.readouterr().out.splitlines()
    assert "3 broken rows skipped" in summary
    assert "of places filled" in summary
    assert dispatch([*common, *saved, "--print", "100", "--limit", "4"]) == 0
    first = capsys.readouterr().out.splitlines()[:-1]
    assert dispatch([*common, *saved, "--print", "100", "--threads", "2"]) == 0
    rest = capsys.readouterr().out.splitlines()[:-1]
    assert first + rest == elements
    assert json.loads(first[0])["input_ids"]


def test_profile(chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat.write_text(chat.read_text().replace("epochs: 3", "epochs: null"))
    picture, trace = tmp_path / "chat.svg", tmp_path / "trace.json"
    options = ["--seconds", "0.3", "--cache", str(tmp_path / "cache")]
    files = ["--picture", str(picture), "--trace", str(trace)]
    assert dispatch(["pipeline", "profile", str(chat), *options, *files]) == 0
    out = " ".join(capsys.readouterr().out.split())
    found = Trace.read(trace)
    assert 0 < found.elements <= found.operators["batch"].made  # some were made ahead
    assert found.operators["pack"].made >= 4 * found.elements
    assert any(f"{name} limits. Best here: " in out for name in found.operators)
    assert ElementTree.fromstring(picture.read_text()).tag.endswith("svg")
    assert dispatch(["pipeline", "profile", str(chat), *options, "--tune"]) == 0
    assert "elements/s with rows: 1 threads;" in " ".join(capsys.readouterr().out.split())


def test_a_tuned_run_gives_the_same(
    chat: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deltaserve.cli.profile.TUNING_S", 0.3)
    chat.write_text(chat.read_text().replace("epochs: 3", "epochs: 200"))
    run = ["pipeline", "run", str(chat), "--cache", str(tmp_path / "cache"), "--limit", "30"]
    assert dispatch([*run, "--print", "30"]) == 0
    plain = capsys.readouterr().out.splitlines()[:-1]
    assert dispatch([*run, "--print", "30", "--tune"]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[:-1] == plain
    assert re.search(r"tuned: (rows: |[12] processes)", shown.err)
    assert dispatch([*run, "--tune", "--threads", "2"]) == 2
    assert "--tune finds threads" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("plan", "options", "message"),
    [
        ("source: {jsonl: none.jsonl}", [], "none.jsonl does not exist"),
        ("source: {jsonl: a.jsonl}\nsteps: [nothing: 1]", [], "no 'nothing'"),
        ("source: {jsonl: a.jsonl}\nsteps: [pack: 9]", [], "no field 'input_ids'"),
        ("source: {jsonl: a.jsonl}", ["--state", "plan.yaml"], "not a saved state"),
        ("source: {jsonl: a.jsonl}", ["--state", "none/state.json"], "cannot be saved"),
        ("source: {jsonl: a.jsonl}", ["--threads", "-1"], "threads"),
        ("source: {jsonl: a.jsonl}\nsteps: [map: 'os:getcwd']", [], "--allow-functions"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    plan: str,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    texts(tmp_path / "a.jsonl", 10)
    (tmp_path / "plan.yaml").write_text(plan)
    assert dispatch(["pipeline", "run", "plan.yaml", *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize(
    ("name", "message"),
    [("base", "has no chat template"), ("./none", "no such folder")],
)
@pytest.mark.parametrize("command", ["show", "run"])
def test_a_tokenizer_that_will_not_do_is_told_before_anything_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    name: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    chats(tmp_path / "a.jsonl", 10)
    tokenizer(tmp_path / "base", template=None)
    steps = f"[chat_template: {{tokenizer: {name}}}]"
    (tmp_path / "plan.yaml").write_text(f"source: {{jsonl: a.jsonl}}\nsteps: {steps}\n")
    assert dispatch(["pipeline", command, "plan.yaml"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_a_missing_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["pipeline", "show", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--threads", "2"], ["--processes", "1"]])
def test_ctrl_c_saves_where_it_stopped(tmp_path: Path, options: list[str]) -> None:
    texts(tmp_path / "a.jsonl", 200)
    (tmp_path / "plan.yaml").write_text("source: {jsonl: a.jsonl}\nsteps: [repeat, batch: 4]\n")
    state = tmp_path / "state.json"
    command = [sys.executable, "-m", "deltaserve", "pipeline", "run", "plan.yaml"]
    child = subprocess.Popen(
        [*command, "--state", str(state), "--print", "1", *options],
        cwd=tmp_path, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline()
    time.sleep(0.3)
    os.killpg(child.pid, signal.SIGINT)  # a terminal sends it to the whole group
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    # Grain says in each worker process that jax is missing.
    told = [line for line in err.splitlines() if not line.startswith("WARNING:absl")]
    assert told == [
        "deltaserve: stopping after this element; Ctrl-C again stops at once",
        "deltaserve: interrupted",
    ]
    assert "elements in" in out
    found: dict[str, Any] = json.loads(state.read_text())
    assert found["position"] >= 1


@pytest.mark.parametrize("options", [[], ["--processes", "1"]])
def test_a_killed_run_goes_on_from_its_last_save(tmp_path: Path, options: list[str]) -> None:
    """The output up to the saved position, and what the next run gives, are the whole stream."""
    texts(tmp_path / "a.jsonl", 3000)
    steps = "[{shuffle: {seed: 1}}, {repeat: 20}, {batch: 4}]"
    (tmp_path / "plan.yaml").write_text(f"source: {{jsonl: a.jsonl}}\nsteps: {steps}\n")
    state, out = tmp_path / "state.json", tmp_path / "out"
    run = [sys.executable, "-m", "deltaserve", "pipeline", "run", "plan.yaml", "--print", "99999"]
    saved = ["--state", str(state), "--save-every", "0.05", *options]
    with out.open("w") as file:
        child = subprocess.Popen([*run, *saved], cwd=tmp_path, stdout=file, stderr=file)
        _wait_for(lambda: state.exists() and json.loads(state.read_text())["position"] > 200)
        child.kill()
    assert child.wait() == -signal.SIGKILL
    position = json.loads(state.read_text())["position"]
    first = [line for line in out.read_text().splitlines() if line.startswith("{")][:position]
    assert len(first) == position < 15_000

    def finished(*more: str) -> list[str]:
        done = subprocess.run([*run, *more], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[:-1]

    assert first + finished("--state", str(state)) == finished()
    assert finished("--state", str(state)) == []


def test_a_state_is_saved_where_an_element_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    good = Path(texts(tmp_path / "a.jsonl", 300)).read_text()
    (tmp_path / "plan.yaml").write_text("source: {jsonl: a.jsonl}\nsteps: [batch: 7]\n")
    run = ["pipeline", "run", "plan.yaml", "--print", "999", "--no-rewrites"]
    assert dispatch(run) == 0
    whole = capsys.readouterr().out.splitlines()[:-1]
    lines = good.splitlines()
    lines[200] = "{" + " " * (len(lines[200]) - 1)
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    assert dispatch([*run, "--state", "state.json"]) == 2
    shown = capsys.readouterr()
    assert "a.jsonl, line 201" in shown.err
    (tmp_path / "a.jsonl").write_text(good)
    assert dispatch([*run, "--state", "state.json"]) == 0
    assert shown.out.splitlines()[:-1] + capsys.readouterr().out.splitlines()[:-1] == whole


def test_a_degradation_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    texts(tmp_path / "a.jsonl", 300)
    (tmp_path / "file").write_text("")
    steps = "[{tokenize: {tokenizer: base}}, cache]"
    tokenizer(tmp_path / "base")
    (tmp_path / "plan.yaml").write_text(f"source: {{jsonl: a.jsonl}}\nsteps: {steps}\n")
    assert dispatch(["pipeline", "run", "plan.yaml", "--cache", "file"]) == 0
    assert capsys.readouterr().err == (
        "deltaserve: warning: the cache file cannot keep more rows (Not a directory): what it "
        "lacks is computed each time\n"
    )


def _wait_for(ready: Callable[[], bool]) -> None:
    limit = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.mark.parametrize("name", [path.name for path in sorted(CONFIGS.glob("*.yaml"))])
def test_shipped_plans_are_plans(name: str) -> None:
    assert str(Plan.from_yaml(CONFIGS / name))
