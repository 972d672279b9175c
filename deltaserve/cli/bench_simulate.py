"""``deltaserve bench simulate`` and ``calibrate``: load tests without the hardware"""

from __future__ import annotations

from deltaserve.bench.load.output import check_file, check_result, write_text
from deltaserve.bench.load.result import document
from deltaserve.bench.load.runner import INTERRUPTED
from deltaserve.cli import bench_options as options
from deltaserve.cli.bench_run import CTRL_C, MISSED, progress, publish, workload_of


def simulate(
    system: options.SystemFile,
    workload: options.WorkloadFile = None,
    replicas: options.Replicas = None,
    deltas: options.DeltaCount = None,
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
    publish(result, out)
    if measured.run.ended == INTERRUPTED:
        return CTRL_C
    missed = any(not each["passed"] for each in result["thresholds"])
    return MISSED if missed or not result["summary"]["completed"] else 0


def calibrate(
    result: options.Measurement, system: options.SystemFile, out: options.OutSystem
) -> None:
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
