"""``deltaserve pipeline profile``: the table of what operators cost, and what to set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deltaserve.pipeline.consumption import usable_cores
from deltaserve.pipeline.plan import Plan
from deltaserve.pipeline.profiling import ROWS, Profiled
from deltaserve.pipeline.trace import Trace
from deltaserve.pipeline.tuning import picture as pictures
from deltaserve.pipeline.tuning.program import Resources
from deltaserve.pipeline.tuning.recommend import Advice, advise
from deltaserve.pipeline.tuning.tune import run_traced, tune


def profile_plan(
    plan: Plan,
    *,
    seconds: float,
    threads: int,
    processes: int,
    trainer_s: float,
    tuned: bool,
    picture: Path | None,
    trace_file: Path | None,
    cache: Path | None,
) -> None:
    """Raises PipelineError: the plan is wrong, or gives nothing in this time."""
    resources = Resources(
        cores=usable_cores(),
        demand=1 / trainer_s if trainer_s else None,
        max_processes=0 if tuned else usable_cores(),
    )

    def opened(chosen: Mapping[str, int]) -> Profiled:
        return Profiled(plan, chosen.get(ROWS, 0), processes, cache)

    start = {ROWS: threads}
    console = Console()
    if tuned and not processes:
        found = tune(opened, start, resources, seconds=seconds, compute_s=trainer_s)
        before, trace, advice = found.traces[0], found.traces[-1], found.advice
        _show(console, trace, advice)
        console.print(
            f"{before.rate:.4g} elements/s with --threads {threads}, {found.rate:.4g} with "
            f"--threads {found.threads[ROWS]}"
        )
    else:
        trace = run_traced(opened(start), seconds=seconds, compute_s=trainer_s)
        advice = advise(trace, resources)
        _show(console, trace, advice)
    if picture is not None:
        pictures.write(picture, trace, advice)
        console.print(f"{picture} shows it")
    if trace_file is not None:
        trace.write(trace_file)


def _show(console: Console, trace: Trace, advice: Advice) -> None:
    table = Table()
    table.add_column("operator")
    for name in ("threads", "made", "CPU, ms", "waits, ms", "most, /s"):
        table.add_column(name, justify="right")
    for name, each in advice.demands.items():
        lanes = trace.operators[name].parallelism
        most = lanes / each.held_s if each.held_s else float("inf")
        table.add_row(
            f"[bold red]{name}[/]" if name == advice.bottleneck else name,
            "" if each.serial else str(lanes),
            f"{trace.operators[name].made:,}",
            f"{each.cpu_s * 1e3:.3g}",
            f"{each.waited_s * 1e3:.3g}",
            f"{most:,.4g}",
        )
    console.print(table)
    console.print(
        f"{trace.rate:.4g} elements/s, {trace.elements:,} elements; the consumer waited "
        f"{trace.stall:.0%} of the time. Times are per element, all threads together."
    )
    chosen = advice.allocation
    workers = chosen.threads.get(ROWS, 1)
    setting = f"--processes {chosen.processes}" if chosen.processes else f"--threads {workers}"
    console.print(
        f"{advice.bottleneck} limits. Best here: {setting}, prefetch {advice.prefetch}; at most "
        f"{chosen.rate:.4g} elements/s, by {', '.join(chosen.limits) or 'nothing known'}."
    )
