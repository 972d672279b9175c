"""``deltaserve bench``: load tests of any OpenAI-compatible server"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from deltaserve.bench.load import compare as comparing
from deltaserve.bench.load import sweep as sweeping
from deltaserve.bench.load import text
from deltaserve.bench.load.execute import Progress, Target, measure
from deltaserve.bench.load.page import report
from deltaserve.bench.load.result import Measured, document, write_json, write_text
from deltaserve.bench.load.runner import COMPLETE, INTERRUPTED, MAX_TIME, SERVER_DIED, Run
from deltaserve.bench.load.target import check_url
from deltaserve.bench.load.workload import (
    make_workload,
    read_workload,
    set_key,
    with_settings,
)
from deltaserve.demo.server_process import Server, server_process
from deltaserve.errors import ConfigError, DeltaServeError

MISSED = 1
CTRL_C = 130

WorkloadFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="WORKLOAD", help="YAML file, such as configs/bench/*.yaml.", show_default=False
    ),
]
SweepFile = Annotated[Path, typer.Argument(metavar="WORKLOAD", help="YAML file with a key sweep.")]
Url = Annotated[str | None, typer.Option(help="The server, such as http://127.0.0.1:8000.")]
Spawn = Annotated[
    Path | None,
    typer.Option(metavar="CONFIG", help="Start deltaserve serve with this YAML file, and end it."),
]
ApiKey = Annotated[
    str,
    typer.Option(
        envvar="DELTASERVE_API_KEY", help="Key of tenants that name none.", show_default=False
    ),
]
AllowRemote = Annotated[bool, typer.Option(help="Load a server on another machine.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a key of the workload: arrivals.rate=4. Repeat."
    ),
]
Rate = Annotated[float | None, typer.Option(help="Poisson arrivals per second, of each tenant.")]
Requests = Annotated[int | None, typer.Option(help="Requests of each tenant.")]
Duration = Annotated[float | None, typer.Option(help="Seconds in which each tenant sends.")]
Closed = Annotated[
    int | None, typer.Option(help="Closed loop instead: so many users of each tenant.")
]
MaxTime = Annotated[float | None, typer.Option(help="Seconds after which the run is cut.")]
MaxRequests = Annotated[int | None, typer.Option(help="Requests of all tenants, at most.")]
Goodput = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME:MS", help="Objective: ttft, tpot, itl or e2e. Repeat."),
]
Seed = Annotated[int | None, typer.Option(help="Of everything random in the workload.")]
Out = Annotated[
    Path | None, typer.Option(help="Write the result here as JSON, and beside it as HTML.")
]
Detailed = Annotated[bool, typer.Option("--save-detailed", help="With the time of every token.")]
OutFolder = Annotated[Path, typer.Option(help="Folder of the results.")]
Resume = Annotated[bool, typer.Option(help="Leave out what the folder already holds.")]
DryRun = Annotated[bool, typer.Option(help="Only list the points.")]
RateScale = Annotated[float, typer.Option(help="Multiplies the swept rates, for this machine.")]
ResultA = Annotated[Path, typer.Argument(metavar="A.json", help="A result, or a folder of runs.")]
ResultB = Annotated[Path, typer.Argument(metavar="B.json", help="What is compared with it.")]


def serve(
    workload: WorkloadFile = None,
    url: Url = None,
    spawn: Spawn = None,
    api_key: ApiKey = "",
    allow_remote: AllowRemote = False,
    set_: Settings = None,
    rate: Rate = None,
    requests: Requests = None,
    duration: Duration = None,
    closed: Closed = None,
    max_time: MaxTime = None,
    max_requests: MaxRequests = None,
    goodput: Goodput = None,
    seed: Seed = None,
    out: Out = None,
    save_detailed: Detailed = False,
) -> int:
    """Run one workload on one server: latencies, throughput, fairness, pass or fail."""
    flags: dict[str, Any] = {"requests": requests, "duration": duration, "max_time": max_time}
    flags |= {"max_requests": max_requests, "seed": seed, "arrivals": _arrivals(rate, closed)}
    content = read_workload(workload) if workload else {}
    for key, value in flags.items():
        if value is not None:
            set_key(content, key, value)
    for key, value in [*map(_setting, set_ or ()), *map(_objective, goodput or ())]:
        set_key(content, key, value)
    test = make_workload(content, str(workload or "workload"))
    with _target(url, spawn, api_key, allow_remote) as (target, server), _progress() as show:
        measured = measure(target, test, show)
    result = document(measured, detailed=save_detailed)
    print(text.render(result), flush=True)
    if out is not None:
        write_json(out, result)
        write_text(out.with_suffix(".html"), report(result))
        print(f"wrote {out} and {out.with_suffix('.html')}")
    return _exit_code(measured, result, server)


def sweep(
    workload: SweepFile,
    out: OutFolder,
    url: Url = None,
    spawn: Spawn = None,
    api_key: ApiKey = "",
    allow_remote: AllowRemote = False,
    set_: Settings = None,
    rate_scale: RateScale = 1.0,
    resume: Resume = False,
    dry_run: DryRun = False,
) -> int:
    """Run a workload at every combination of the settings under its key sweep."""
    content = with_settings(read_workload(workload), map(_setting, set_ or ()))
    found = sweeping.points(content, rate_scale=rate_scale)
    if dry_run:
        for point in found:
            print(f"{point.number:03d} {point.name}")
        return 0
    if not resume and out.is_dir() and any(out.glob("*.json")):
        raise ConfigError(f"{out} already holds results: say --resume, or choose another --out")
    rows: list[dict[str, Any]] = []
    code = 0
    with _target(url, spawn, api_key, allow_remote) as (target, server):
        for point in found:
            result = sweeping.done(point, out) if resume else None
            if result is None:
                with _progress(f"{point.number + 1}/{len(found)} ") as show:
                    measured = measure(target, point.workload, show)
                result = document(measured)
                write_json(out / point.file, result)
                code = max(code, _exit_code(measured, result, server))
            rows.append(sweeping.row(point, result))
            print(*sweeping.text(rows[-1:]), flush=True)
            write_text(out / "sweep.html", sweeping.overview(str(content["name"]), rows))
            if code == CTRL_C or result["ended"] == SERVER_DIED:
                break
    print(f"wrote {out / 'sweep.html'}")
    return code


def compare(a: ResultA, b: ResultB) -> None:
    """Ratios of two results with confidence intervals, and whether they are only noise."""
    sides = comparing.read_side(a), comparing.read_side(b)
    for line in comparing.render(*sides, comparing.compare(*sides)):
        print(line)


SUBCOMMANDS = (serve, sweep, compare)


@contextlib.contextmanager
def _target(
    url: str | None, spawn: Path | None, key: str, allow_remote: bool
) -> Iterator[tuple[Target, Server | None]]:
    """The server that was named, or one of our own, ended when the block is left."""
    if (url is None) == (spawn is None):
        raise ConfigError("name the server to load: either --url or --spawn")
    if url is not None:
        yield Target(check_url(url, allow_remote=allow_remote), key), None
        return
    with tempfile.TemporaryDirectory(prefix="deltaserve-bench-") as folder:
        arguments = ["serve", "--config", str(spawn), "--port", "0"]
        try:
            with server_process(arguments, Path(folder) / "server.log") as server:
                yield Target(server.wait_until_ready(), key, server.process.pid), server
        except subprocess.TimeoutExpired:  # what was measured counts all the same
            print("deltaserve: the server did not stop in time and was killed", file=sys.stderr)


@contextlib.contextmanager
def _progress(prefix: str = "") -> Iterator[Progress]:
    """A line on stderr that follows the run, where there is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda name, run: None
        return
    with console.status("looking at the server and warming it up ...") as status:

        def show(name: str, run: Run) -> None:
            done = len(run.records)
            failed = sum(record.failed for record in run.records)
            status.update(
                f"{prefix}{name}: {run.seconds:.0f} s, {run.sent} sent, {done} done, "
                f"{failed} failed, {run.in_flight} in flight"
            )

        yield show


def _exit_code(measured: Measured, result: Mapping[str, Any], server: Server | None) -> int:
    """0, 1 for a missed threshold or a failed server, 130 for Ctrl-C."""
    ended = measured.run.ended
    if ended == INTERRUPTED:
        return CTRL_C
    if ended == SERVER_DIED:
        error = DeltaServeError("the server died; what was measured before is above")
        print(f"deltaserve: {server.explain(error) if server else error}", file=sys.stderr)
    missed = any(not each["passed"] for each in result["thresholds"])
    nothing = not result["summary"]["completed"]
    return MISSED if missed or nothing or ended not in (COMPLETE, MAX_TIME) else 0


def _arrivals(rate: float | None, closed: int | None) -> dict[str, Any] | None:
    if rate is not None and closed is not None:
        raise ConfigError("--rate is of an open loop, --closed is another: give one of them")
    if closed is not None:
        return {"kind": "closed", "concurrency": closed}
    return None if rate is None else {"kind": "poisson", "rate": rate}


def _setting(argument: str) -> tuple[str, Any]:
    key, equals, value = argument.partition("=")
    if not (key and equals):
        raise ConfigError(f"a setting is given as KEY=VALUE, not {argument!r}")
    try:
        return key.replace("-", "_"), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{argument!r}: the value is not valid YAML") from error


def _objective(argument: str) -> tuple[str, float]:
    """vLLM's way of naming one: ttft:500, in milliseconds."""
    name, _, value = argument.partition(":")
    name = {"e2el": "e2e"}.get(name, name)
    try:
        return f"slo.{name}", float(value) / 1e3
    except ValueError:
        raise ConfigError(f"an objective is given as NAME:MS, not {argument!r}") from None
