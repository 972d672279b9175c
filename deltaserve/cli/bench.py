"""``deltaserve bench``: load tests of any OpenAI-compatible server"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deltaserve.bench.load import compare as comparing
from deltaserve.bench.load import sweep as sweeping
from deltaserve.bench.load.execute import Target, measure
from deltaserve.bench.load.output import check_file, check_result, write_json, write_text
from deltaserve.bench.load.result import Measured, document
from deltaserve.bench.load.runner import COMPLETE, INTERRUPTED, MAX_TIME, SERVER_DIED
from deltaserve.bench.load.target import check_url
from deltaserve.bench.load.workload import read_workload, with_settings
from deltaserve.cli import bench_options as options
from deltaserve.cli.bench_run import CTRL_C, MISSED, progress, publish, setting, workload_of
from deltaserve.cli.bench_simulate import calibrate, simulate
from deltaserve.cli.progress import stop_on_sigterm
from deltaserve.demo.server_process import Server, ServerError, server_process
from deltaserve.errors import ConfigError, DeltaServeError


def serve(
    workload: options.WorkloadFile = None,
    url: options.Url = None,
    spawn: options.Spawn = None,
    api_key: options.ApiKey = "",
    admin_key: options.AdminKey = "",
    allow_remote: options.AllowRemote = False,
    set_: options.Settings = None,
    rate: options.Rate = None,
    requests: options.Requests = None,
    duration: options.Duration = None,
    closed: options.Closed = None,
    max_time: options.MaxTime = None,
    max_requests: options.MaxRequests = None,
    goodput: options.Goodput = None,
    seed: options.Seed = None,
    out: options.Out = None,
    save_detailed: options.Detailed = False,
) -> int:
    """Run one workload on one server: latencies, throughput, fairness, pass or fail."""
    flags = {"requests": requests, "duration": duration, "max_time": max_time}
    flags |= {"max_requests": max_requests, "seed": seed}
    test = workload_of(workload, flags, rate, closed, set_, goodput)
    if out is not None:
        check_result(out)
    with _target(url, spawn, (api_key, admin_key), allow_remote) as (target, server):
        with progress() as show:
            measured = measure(target, test, show)
        result = document(measured, detailed=save_detailed)
        publish(result, out)
        return _exit_code(measured, result, server)


def sweep(
    workload: options.SweepFile,
    out: options.OutFolder,
    url: options.Url = None,
    spawn: options.Spawn = None,
    api_key: options.ApiKey = "",
    admin_key: options.AdminKey = "",
    allow_remote: options.AllowRemote = False,
    set_: options.Settings = None,
    rate_scale: options.RateScale = 1.0,
    resume: options.Resume = False,
    dry_run: options.DryRun = False,
) -> int:
    """Run a workload at every combination of the settings under its key sweep."""
    content = with_settings(read_workload(workload), map(setting, set_ or ()))
    found = sweeping.points(content, rate_scale=rate_scale)
    if dry_run:
        for point in found:
            print(f"{point.number:03d} {point.name}")
        return 0
    if not resume and out.is_dir() and any(out.glob("*.json")):
        raise ConfigError(f"{out} already holds results: say --resume, or choose another --out")
    overview = out / "sweep.html"
    check_file(overview)
    rows: list[dict[str, Any]] = []
    code = 0
    with _target(url, spawn, (api_key, admin_key), allow_remote) as (target, server):
        for point in found:
            result = sweeping.done(point, out) if resume else None
            if result is None:
                with progress(f"{point.number + 1}/{len(found)} ") as show:
                    measured = measure(target, point.workload, show)
                result = document(measured)
                write_json(out / point.file, result)
                code = max(code, _exit_code(measured, result, server))
            rows.append(sweeping.row(point, result))
            code = max(code, 0 if rows[-1]["passed"] else MISSED)  # also one of before --resume
            print(*sweeping.text(rows[-1:]), flush=True)
            write_text(overview, sweeping.overview(str(content["name"]), rows))
            if code == CTRL_C or result["ended"] == SERVER_DIED:
                break
    print(f"wrote {overview}")
    return code


def compare(a: options.ResultA, b: options.ResultB) -> None:
    """Ratios of two results with confidence intervals, and whether they are only noise."""
    sides = comparing.read_side(a), comparing.read_side(b)
    for line in comparing.render(*sides, comparing.compare(*sides)):
        print(line)


SUBCOMMANDS = (serve, sweep, compare, simulate, calibrate)


@contextlib.contextmanager
def _target(
    url: str | None, spawn: Path | None, keys: tuple[str, str], allow_remote: bool
) -> Iterator[tuple[Target, Server | None]]:
    """The server that was named, or one of our own."""
    if (url is None) == (spawn is None):
        raise ConfigError("name the server to load: either --url or --spawn")
    if spawn is None:
        yield Target(check_url(str(url), allow_remote=allow_remote), *keys), None
        return
    with stop_on_sigterm(), _spawned(spawn, keys) as found:
        yield found


@contextlib.contextmanager
def _spawned(spawn: Path, keys: tuple[str, str]) -> Iterator[tuple[Target, Server]]:
    """A server of our own, ended when the block is left; the log of one that ended by itself, or
    did not start, is kept: the error names it."""
    folder = Path(tempfile.mkdtemp(prefix="deltaserve-bench-"))
    arguments = ["serve", "--config", str(spawn), "--port", "0"]
    keep = False
    try:
        with server_process(arguments, folder / "server.log") as server:
            try:
                yield Target(server.wait_until_ready(), *keys, pid=server.process.pid), server
            finally:
                keep = server.process.poll() is not None
    except ServerError:
        keep = True
        raise
    except subprocess.TimeoutExpired:  # what was measured counts all the same
        print("deltaserve: the server did not stop in time and was killed", file=sys.stderr)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


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
