"""``deltaserve bench`` as typed: exit codes, files, one line for each mistake."""

from __future__ import annotations

import json
import re
import resource
import tempfile
import xml.dom.minidom
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deltaserve.bench.load.output import LEAST_ROOM
from deltaserve.bench.load.sweep import points
from deltaserve.bench.load.target import check_url
from deltaserve.bench.load.workload import make_workload, read_workload
from deltaserve.cli.main import dispatch
from deltaserve.errors import ConfigError
from tests.bench.fake_server import Behaviour, FakeServer, fake_server

CONFIGS = sorted(Path("configs/bench").glob("*.yaml"))
STATS = {"running": 3, "waiting": 1, "residency": {"device_deltas": 2, "hits": 3, "misses": 1}}


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    models = ("base", *(f"delta-{i}" for i in range(1000)))
    with fake_server(Behaviour(models=models, gap=0.01, stats=STATS)) as server:
        yield server


@pytest.fixture
def write(tmp_path: Path):
    def write(**content: Any) -> str:
        (tmp_path / "w.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return str(tmp_path / "w.yaml")

    return write


def test_serve_writes_a_result_and_a_page(server, write, tmp_path, capsys):
    file = write(
        arrivals=20,
        requests=12,
        output=4,
        models=2,
        tenants=2,
        slo={"ttft": 1},
        thresholds=[{"metric": "summary.completed", "min": 24}],
    )
    out = tmp_path / "out" / "r.json"
    command = ["bench", "serve", file, "--url", f"{server.url}/v1/", "--out", str(out)]
    assert dispatch(command) == 0
    said = capsys.readouterr().out
    assert "============ Serving Benchmark Result ============" in said
    assert "PASS  summary.completed: 24" in said
    result = json.loads(out.read_text())
    assert result["schema"] == "deltaserve-bench/1"
    assert result["environment"]["cores"] > 0
    assert not list(out.parent.glob("*.partial"))
    check_page(out.with_suffix(".html").read_text(), "tenant-1")


def check_page(text: str, *words: str) -> None:
    """Self-contained: it would fetch nothing; its charts are well-formed and in range."""
    assert not re.search(r"<(script|link|img|iframe|object)|@import|url\(", text)
    charts = re.findall(r"<svg.*?</svg>", text, re.S)
    assert charts
    for chart in charts:
        root = xml.dom.minidom.parseString(chart).documentElement
        assert "nan" not in chart.lower()
        height = float(root.getAttribute("viewBox").split()[3])
        for circle in root.getElementsByTagName("circle"):
            assert 0 <= float(circle.getAttribute("cy")) <= height
    assert all(word in text for word in words)


def test_a_missed_threshold_is_exit_code_one(server, write, capsys):
    file = write(
        requests=3,
        arrivals=20,
        models=1,
        thresholds=[{"metric": "summary.completed", "min": 4}],
    )
    assert dispatch(["bench", "serve", file, "--url", server.url]) == 1
    assert "FAIL  summary.completed: 3 (at least 4)" in capsys.readouterr().out


def test_flags_win_over_the_file(server, write, capsys):
    file = write(requests=50, output=2, models=3)
    flags = ["--rate", "100", "--requests", "6", "--goodput", "ttft:900", "--set", "output=3"]
    assert dispatch(["bench", "serve", file, "--url", server.url, *flags]) == 0
    said = capsys.readouterr().out
    assert re.search(r"Successful requests: +6\n", said)
    assert re.search(r"Total generated tokens: +18\n", said)
    assert "Request goodput" in said
    assert dispatch(["bench", "serve", file, "--url", server.url, "--closed", "2"]) == 0
    assert re.search(r"Peak concurrent requests: +2\n", capsys.readouterr().out)


def test_sweep_resumes_and_compare_reads_its_points(server, write, tmp_path, capsys):
    file = write(
        requests=25,
        output=2,
        sweep={"models": [1, 2], "arrivals.rate": [50, 100]},
        arrivals={"kind": "constant", "rate": 1},
    )
    out = tmp_path / "sweep"
    command = ["bench", "sweep", file, "--url", server.url, "--out", str(out)]
    assert dispatch([*command, "--dry-run"]) == 0
    assert not out.exists()
    assert capsys.readouterr().out.splitlines()[3] == "003 models=2, arrivals.rate=100"
    assert dispatch([*command, "--rate-scale", "2"]) == 0
    assert [line.rpartition(", ")[2] for line in capsys.readouterr().out.splitlines()[:4]] == [
        "PASS"
    ] * 4
    files = sorted(out.glob("*.json"))
    assert files[0].name == "000-models=1_arrivals.rate=100.json"
    check_page((out / "sweep.html").read_text(), "models=2")
    assert dispatch([*command, "--rate-scale", "2"]) == 2
    assert "already holds results: say --resume" in capsys.readouterr().err
    files[2].unlink()
    before = {each: each.stat().st_mtime_ns for each in out.glob("*.json")}
    assert dispatch([*command, "--rate-scale", "2", "--resume"]) == 0
    assert {each: each.stat().st_mtime_ns for each in before} == before
    assert files[2].exists()
    capsys.readouterr()
    assert dispatch(["bench", "compare", str(files[0]), str(files[1])]) == 0
    assert "ttft p50" in capsys.readouterr().out


def test_points_differ_in_seed_so_that_no_cache_helps():
    found = points({"seed": 5, "sweep": {"prompt": [3, 4]}})
    assert [point.workload.seed for point in found] == [5, 1005]
    swept = points({"sweep": {"seed": [7, 8]}})
    assert [(point.name, point.workload.seed) for point in swept] == [("seed=7", 7), ("seed=8", 8)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sweep": {"arrivals.rate": ["fast"]}}, "point 0.*rate is 'fast', but must be a number"),
        ({"sweep": {"arrivals.rate": [None]}}, "rate is None, but must be a number"),
        ({"sweep": {5: [1]}}, "sweep point 0: unknown key '5'"),
        ({"sweep": {"output": [1]}, "seed": "x"}, "seed is 'x', but must be a whole number"),
    ],
)
def test_mistakes_of_a_sweep_are_named(content, message):
    with pytest.raises(ConfigError, match=message):
        points({"arrivals": {"kind": "poisson", "rate": 1}, **content})


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_shipped_workloads_run(config, server, tmp_path, capsys):
    """Shortened, on a server without queues."""
    short = ["--set", "warmup=0", "--set", "duration=1", "--set", "scrape=0.2", "--url", server.url]
    if "sweep" in read_workload(config):
        assert len(points(read_workload(config))) == 96
        few = ["--set", "sweep={models: [4], arrivals.rate: [6]}", "--out", str(tmp_path)]
        assert dispatch(["bench", "sweep", str(config), *few, *short]) in (0, 1)
        return
    assert make_workload(read_workload(config)).thresholds
    dispatch(["bench", "serve", str(config), *short, "--max-requests", "60"])
    said = capsys.readouterr().out
    assert re.search(r"Failed requests: +0\n", said)
    assert "PASS  " in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve"], "either --url or --spawn"),
        (["serve", "--url", "http://127.0.0.1:9", "--spawn", "x"], "either --url or --spawn"),
        (["serve", "--url", "127.0.0.1:9"], "is no address"),
        (["serve", "--url", "http://127.0.0.1:9"], "at http://127.0.0.1:9: connection refused"),
        (["serve", "--url", "https://127.0.0.1:9"], "at https://127.0.0.1:9: connection refused"),
        (["serve", "--url", "http://192.0.2.1"], "is another machine: say --allow-remote"),
        (["serve", "nowhere.yaml", "--url", "http://127.0.0.1:9"], "nowhere.yaml: No such file"),
        (["serve", "--url", "http://127.0.0.1:9", "--set", "x"], "given as KEY=VALUE"),
        (["serve", "--url", "http://127.0.0.1:9", "--set", "x=["], "not valid YAML"),
        (["serve", "--url", "http://127.0.0.1:9", "--goodput", "ttft"], "given as NAME:MS"),
        (["serve", "--url", "http://127.0.0.1:9", "--goodput", "speed:1"], "unknown key 'speed'"),
        (["serve", "--url", "http://127.0.0.1:9", "--rate", "1", "--closed", "1"], "one of them"),
        (["serve", "--spawn", "nowhere.yaml"], "did not start"),
        (["compare", "a.json", "b.json"], "a.json: No such file"),
        (["sweep", "configs/bench/soak.yaml", "--out", "x"], "has no sweep"),
        ([], "Missing command"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_two(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # a server's log outlives its failure
    assert dispatch(["bench", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_dead_server_is_exit_code_one_with_a_partial_report(write, capsys, tmp_path):
    def plant(number: int, body: dict[str, Any], key: str) -> str | None:
        return "die" if number == 15 else None

    out = tmp_path / "r.json"
    file = write(arrivals=20, duration=60, output=3, give_up=0.5)
    with fake_server(Behaviour(failure=plant)) as server:
        assert dispatch(["bench", "serve", file, "--url", server.url, "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert "PARTIAL: the run ended early: server died" in said.out
    assert "the server died" in said.err
    assert json.loads(out.read_text())["summary"]["completed"] > 0


def nowhere(tmp_path: Path) -> dict[str, Path]:
    """Places where no file can be, also for an administrator."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "taken.html").mkdir()
    return {
        "not a directory": tmp_path / "file" / "r.json",
        "it is not a file": tmp_path / "folder.json",
        "taken.html cannot be written: it is not a file": tmp_path / "taken.json",
        "names the JSON": tmp_path / "r.html",
        "file name too long": tmp_path / f"{'r' * 300}.json",
        "no such file": Path("/proc/nothing/r.json"),
    }


@pytest.mark.parametrize("command", ["serve", "simulate"])
def test_an_out_that_cannot_be_is_refused_before_the_run(command, write, tmp_path, capsys):
    behaviour = Behaviour()
    with fake_server(behaviour) as server:
        where = ["--url", server.url, write(requests=1)]
        if command == "simulate":
            where = ["--system", "configs/simulate/cpu.yaml"]
        for reason, out in nowhere(tmp_path).items():
            assert dispatch(["bench", command, *where, "--out", str(out)]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert reason in line
    assert behaviour.seen == []
    assert not list(tmp_path.rglob("*.partial"))


def test_a_sweep_and_a_calibration_refuse_such_an_out_too(server, write, tmp_path, capsys):
    file = write(requests=1, sweep={"output": [1]})
    out = nowhere(tmp_path)["not a directory"]
    assert dispatch(["bench", "sweep", file, "--url", server.url, "--out", str(out)]) == 2
    assert "not a directory" in capsys.readouterr().err
    system = ["--system", "configs/simulate/cpu.yaml", "--out", str(out)]
    assert dispatch(["bench", "calibrate", "r.json", *system]) == 2
    assert "not a directory" in capsys.readouterr().err


def test_a_full_disk_leaves_no_part_of_a_file(server, write, tmp_path, capsys):
    """A limit on the size of files is as good: the write fails in its midst."""
    out = tmp_path / "r.json"
    command = ["bench", "serve", write(requests=3, output=2), "--url", server.url]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room, ran in ((LEAST_ROOM - 1, False), (LEAST_ROOM + 1, True)):  # full at first, or later
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            assert dispatch([*command, "--out", str(out)]) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        said = capsys.readouterr()
        assert ("Serving Benchmark Result" in said.out) == ran
        assert f"{out} cannot be written: file too large" in said.err
        assert list(tmp_path.iterdir()) == [tmp_path / "w.yaml"]


def test_only_this_machine_unless_allowed():
    assert check_url("http://127.0.0.1:8000/v1/", allow_remote=False) == "http://127.0.0.1:8000"
    assert check_url("http://0.0.0.0:8000", allow_remote=False) == "http://0.0.0.0:8000"
    assert check_url("http://192.0.2.1", allow_remote=True) == "http://192.0.2.1"
    with pytest.raises(ConfigError, match="another machine"):
        check_url("http://192.0.2.1", allow_remote=False)
