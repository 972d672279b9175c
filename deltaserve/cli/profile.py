"""``deltaserve pipeline profile``: the table of what operators cost, and what to set."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deltaserve.pipeline.iterator import prepare
from deltaserve.pipeline.plan import Plan
from deltaserve.pipeline.profiling import Profiled, segment_names
from deltaserve.pipeline.trace import Trace
from deltaserve.pipeline.tuning import picture as pictures
from deltaserve.pipeline.tuning.plans import Workload, opened_tuned, profile, tune_plan
from deltaserve.pipeline.tuning.recommend import Advice
from deltaserve.pipeline.tuning.settings import Settings
from deltaserve.pipeline.tuning.tune import TooShortError, advised

TUNING_S = 2.0
"""Of each of the three traces before a tuned run."""


def profile_plan(
    work: Workload,
    *,
    seconds: float,
    threads: int,
    processes: int,
    tuned: bool,
    picture: Path | None,
    trace_file: Path | None,
) -> None:
    """Raises PipelineError: the plan is wrong, or gives nothing in this time."""
    stages = segment_names(prepare(work.plan))
    start = Settings(dict.fromkeys(stages, threads), processes)
    console = Console()
    if tuned:
        found = tune_plan(work, start, seconds)
        trace, advice = found.traces[-1], found.advice
        show(console, trace, advice)
        console.print(
            f"measured: {found.traces[0].rate:.4g} elements/s with {start}; "
            f"{found.rate:.4g} with {found.settings}",
            soft_wrap=True,
        )
        for each in found.tried[1:]:
            console.print(
                f"tried beside {found.tried[0].settings}: {each.settings}, "
                f"{each.share:.2f} times as fast",
                soft_wrap=True,
            )
    else:
        trace, advice = profile(work, start, seconds)
        show(console, trace, advice)
    if picture is not None:
        pictures.write(picture, trace, advice)
        console.print(f"{picture} shows it")
    if trace_file is not None:
        trace.write(trace_file)


@contextmanager
def open_tuned(plan: Plan, cache: Path | None) -> Iterator[Profiled]:
    """A plan with what tuning found; what is set is told on stderr."""
    work = Workload(plan, cache=cache)
    settings = Settings(dict.fromkeys(segment_names(prepare(plan)), 1))
    try:
        settings = tune_plan(work, settings, TUNING_S).settings
        print(f"tuned: {settings}", file=sys.stderr)
    except TooShortError as short:
        print(f"not tuned: {short}", file=sys.stderr)

    def changed(change: dict[str, int]) -> None:
        print(f"threads: {change}", file=sys.stderr)

    with opened_tuned(work, settings, changed) as elements:
        yield elements


def show(console: Console, trace: Trace, advice: Advice) -> None:
    """What each operator costs, what limits, what to set."""
    console.print(_table(trace, advice))
    console.print(
        f"{trace.rate:.4g} elements/s, {trace.elements:,} elements; the consumer waited "
        f"{trace.stall:.0%} of the time; {sum(trace.resident.values()) / 2**20:,.0f} MB resident "
        f"in {len(trace.resident)} processes. Times are per element, all threads together.",
        soft_wrap=True,
    )
    chosen = advice.allocation
    stages = [name for name in chosen.threads if not _serial(advice, name)]
    parts = advice.parts.get(advice.bottleneck, {})
    within = ", ".join(f"{name} {share:.0%}" for name, share in parts.items())
    limit = f"{advice.bottleneck} ({within})" if within else advice.bottleneck
    console.print(
        f"{limit} limits. Best here: {advised(advice, stages)}; at most {chosen.rate:.4g} "
        f"elements/s, by {', '.join(chosen.limits) or 'nothing known'}.",
        soft_wrap=True,
    )
    for place in advice.caches:
        console.print(
            f"A cache behind {place.name} ({place.bytes / 2**20:,.0f} MB) saves "
            f"{place.saved_s * 1e3:.3g} ms an element from the second epoch on: at most "
            f"{advice.warm.rate:.4g} elements/s then.",
            soft_wrap=True,
        )
    for place in advice.refused:
        console.print(f"No cache behind {place.name}: {place.why}.", soft_wrap=True)


def _table(trace: Trace, advice: Advice) -> Table:
    table = Table()
    table.add_column("operator")
    for name in ("stage", "threads", "made", "KB each", "CPU, ms", "lock", "waits, ms", "most, /s",
                 "ready"):  # fmt: skip
        table.add_column(name, justify="right")
    for name, each in advice.demands.items():
        figures = trace.operators[name]
        most = figures.parallelism / each.held_s if each.held_s else float("inf")
        table.add_row(
            f"[bold red]{name}[/]" if name == advice.bottleneck else name,
            each.stage,
            "" if each.serial else str(figures.parallelism),
            f"{figures.made:,}",
            f"{each.element_bytes / 1024:,.3g}",
            f"{each.cpu_s * 1e3:.3g}",
            f"{each.gil:.0%}",
            f"{each.waited_s * 1e3:.3g}",
            f"{most:,.4g}",
            f"{figures.buffered:.2g} of {figures.buffer}" if figures.buffer else "",
        )
    return table


def _serial(advice: Advice, stage: str) -> bool:
    return any(each.serial for each in advice.demands.values() if each.stage == stage)
