"""``deltaserve bench simulate`` and ``calibrate``: load tests without the hardware"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltaserve.bench.load import text
from deltaserve.bench.load.output import check_file, check_result, write_json, write_text
from deltaserve.bench.load.page import report
from deltaserve.bench.load.result import document
from deltaserve.bench.load.runner import INTERRUPTED
from deltaserve.cli.bench_options import (
    CTRL_C,
    MISSED,
    Closed,
    Detailed,
    Duration,
    Goodput,
    MaxRequests,
    MaxTime,
    Out,
    Rate,
    Requests,
    Seed,
    Settings,
    WorkloadFile,
    progress,
    workload_of,
)

SystemFile = Annotated[
    Path, typer.Option("--system", help="What is simulated: YAML, such as configs/simulate/*.yaml.")
]
Replicas = Annotated[int | None, typer.Option(help="Engines with a base each, behind a router.")]
DeltaCount = Annotated[int | None, typer.Option("--deltas", help="Registered deltas.")]
Measurement = Annotated[
    Path, typer.Argument(metavar="RESULT.json", help="Of deltaserve bench serve, on DeltaServe.")
]
OutSystem = Annotated[Path, typer.Option("--out", help="Write the system here, as YAML.")]


def simulate(
    system: SystemFile,
    workload: WorkloadFile = None,
    replicas: Replicas = None,
    deltas: DeltaCount = None,
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
    """Run a workload on a system that need not exist: the engine's decisions, computed times."""
    from deltaserve.bench.simulate.simulate import simulate as run  # torch
    from deltaserve.bench.simulate.system import changed, read_system

    flags = {"requests": requests, "duration": duration, "max_time": max_time}
    flags |= {"max_requests": max_requests, "seed": seed}
    test = workload_of(workload, flags, rate, closed, set_, goodput)
    installation = changed(read_system(system), replicas=replicas, deltas=deltas)
    if out is not None:
        check_result(out)
    with progress() as show:
        measured = run(installation, test, show)
    result = document(measured, detailed=save_detailed)
    print(text.render(result), flush=True)
    if out is not None:
        write_json(out, result)
        write_text(out.with_suffix(".html"), report(result))
        print(f"wrote {out} and {out.with_suffix('.html')}")
    if measured.run.ended == INTERRUPTED:
        return CTRL_C
    missed = any(not each["passed"] for each in result["thresholds"])
    return MISSED if missed or not result["summary"]["completed"] else 0


def calibrate(result: Measurement, system: SystemFile, out: OutSystem) -> None:
    """Find the times of a system's steps from a measured run; simulate takes what this writes."""
    from deltaserve.bench.load.result import read_result
    from deltaserve.bench.simulate.calibrate import calibrate as fit  # torch
    from deltaserve.bench.simulate.system import as_yaml, read_system

    check_file(out)
    found = fit(read_system(system), read_result(result))
    write_text(out, as_yaml(found.system))
    for line in found.lines():
        print(line)
    print(f"wrote {out}")
