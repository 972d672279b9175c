"""``deltaserve pipeline``: look at a plan, run it, see what limits it; the service."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="YAML file; see docs/pipeline.md.")]
Functions = Annotated[
    bool, typer.Option("--allow-functions", help="Let the plan import and run module:function.")
]
Rewrites = Annotated[bool, typer.Option(help="Rewrite the plan before it runs.")]


def show(plan: PlanFile, allow_functions: Functions = False, rewrites: Rewrites = True) -> None:
    """Check a plan, and print it, what it gives, and how it is rewritten.

    Example: deltaserve pipeline show configs/pipeline/chat.yaml
    """
    from deltaserve.pipeline.elements import require_elements
    from deltaserve.pipeline.plan import Plan
    from deltaserve.pipeline.rewrites import rewrite

    read = Plan.from_yaml(plan, allow_functions=allow_functions).named()
    gives = read.check()
    require_elements(read)
    print(f"{read}\n\nfingerprint  {read.fingerprint()}\ngives        {gives}")
    if not rewrites:
        return
    rewritten, notes = rewrite(read)
    if not notes:
        print("\nno rewrites")
        return
    print("\nrewrites")
    for note in notes:
        print(f"  {note}")
    print(f"\n{rewritten.named()}")


def run(
    plan: PlanFile,
    limit: Annotated[int | None, typer.Option(min=0, help="Stop after so many elements.")] = None,
    threads: Annotated[int, typer.Option(help="Threads that work on rows.")] = 0,
    processes: Annotated[int, typer.Option(help="Processes that do, instead.")] = 0,
    print_: Annotated[
        int, typer.Option("--print", min=0, help="Print the first elements, as JSON.")
    ] = 0,
    state: Annotated[
        Path | None,
        typer.Option(help="Go on from this file if it exists; save where it stands to it."),
    ] = None,
    save_every: Annotated[
        float, typer.Option(min=0, help="Seconds between saves; also at the end and on Ctrl-C.")
    ] = 10.0,
    cache: Annotated[Path | None, typer.Option(help="Folder of the plan's caches.")] = None,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Find threads, processes, caches first; then follow."),
    ] = False,
    allow_functions: Functions = False,
    rewrites: Rewrites = True,
) -> None:
    """Run a plan, and say what it gave and how fast.

    Example: deltaserve pipeline run configs/pipeline/chat.yaml --limit 100 --print 1
    """
    from deltaserve.cli.progress import stop_on_sigterm, warnings_told
    from deltaserve.cli.running import run_elements
    from deltaserve.pipeline.iterator import open_pipeline
    from deltaserve.pipeline.plan import Plan

    if tune and (threads or processes or not rewrites):
        raise typer.BadParameter("--tune finds threads and processes itself, of a rewritten plan")
    read = Plan.from_yaml(plan, allow_functions=allow_functions)
    options: dict[str, Any] = {"threads": threads, "processes": processes, "cache": cache}

    def opened() -> Any:
        if not tune:
            return open_pipeline(read, rewrites=rewrites, **options)
        from deltaserve.cli.profile import open_tuned

        return open_tuned(read, cache)

    with warnings_told(), stop_on_sigterm(), opened() as elements:
        run_elements(elements, limit=limit, shown=print_, state=state, save_every_s=save_every)


def profile(
    plan: PlanFile,
    seconds: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="How long to run; with --tune, of each of three traces. Turns of half of it "
            "follow.",
        ),
    ] = 5.0,
    threads: Annotated[int, typer.Option(help="Threads that work on rows.")] = 1,
    processes: Annotated[int, typer.Option(help="Processes that do, instead.")] = 0,
    trainer_ms: Annotated[
        float, typer.Option(min=0, help="What the trainer takes for an element, imitated.")
    ] = 0.0,
    tune: Annotated[
        bool, typer.Option("--tune", help="Try what is advised, and measure it.")
    ] = False,
    by: Annotated[
        str, typer.Option(help="Advice by: program (linear), or tfdata (its analytic model).")
    ] = "program",
    picture: Annotated[Path | None, typer.Option(help="Write a picture here (SVG).")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write the trace here (JSON).")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of the plan's caches.")] = None,
    allow_functions: Functions = False,
) -> None:
    """Run a plan for some seconds; name what limits it, and say what to set.

    Example: deltaserve pipeline profile configs/pipeline/chat.yaml --tune --picture chat.svg
    """
    from deltaserve.cli.profile import profile_plan
    from deltaserve.cli.progress import warnings_told
    from deltaserve.pipeline.plan import Plan
    from deltaserve.pipeline.tuning.plans import Workload

    if by not in ("program", "tfdata"):
        raise typer.BadParameter(f"--by {by}: choose program or tfdata")
    if threads < 1 or processes < 0:
        raise typer.BadParameter("a profile needs --threads of 1 or more, or --processes")
    read = Plan.from_yaml(plan, allow_functions=allow_functions)
    with warnings_told():
        profile_plan(
            Workload(read, trainer_ms / 1e3, cache, by),  # type: ignore[arg-type]
            seconds=seconds, threads=threads, processes=processes, tuned=tune, picture=picture,
            trace_file=trace,
        )  # fmt: skip


def serve(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Of the journal; kept over restarts.")
    ],
    name: Annotated[str, typer.Option(help="Of the service on its cluster.")] = "pipeline",
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster; by default one is started here.")
    ] = None,
    min_workers: Annotated[int, typer.Option(min=0, help="Workers, without demand too.")] = 0,
    max_workers: Annotated[int, typer.Option(min=1, help="Workers, whatever is wanted.")] = 2,
) -> None:
    """Run the service that prepares plans for trainers, until Ctrl-C.

    Trainers reach it with deltaserve.pipeline.service.cluster.connect.

    Example: deltaserve pipeline serve ./journal --max-workers 4
    """
    from deltaserve.cli.progress import stop_on_sigterm, warnings_told
    from deltaserve.pipeline.service.cluster import Service

    limits = {"min_workers": min_workers, "max_workers": max_workers}
    with (
        warnings_told(),
        stop_on_sigterm(),
        Service(folder, name=name, address=address, **limits) as service,
        stop_on_sigterm(),  # Ray has put its own in the place of the first
    ):
        jobs = len(service.stats()["jobs"])
        print(f"service '{name}' is ready ({jobs} jobs in {folder}); Ctrl-C ends it", flush=True)
        before = -1
        while True:
            # A dispatcher that is being restarted answers a little later.
            workers = len(service.stats()["workers"])
            if workers != before:
                print(f"workers: {workers}", flush=True)
                before = workers
            time.sleep(1)


SUBCOMMANDS = (show, run, profile, serve)
