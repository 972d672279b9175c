"""``deltaserve pipeline``: look at a plan, and run it."""

from __future__ import annotations

import json
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
    from deltaserve.pipeline.plan import Plan
    from deltaserve.pipeline.rewrites import rewrite

    read = Plan.from_yaml(plan, allow_functions=allow_functions).named()
    print(f"{read}\n\nfingerprint  {read.fingerprint()}\ngives        {read.check()}")
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
    threads: Annotated[int, typer.Option(min=0, help="Threads that work on rows.")] = 0,
    processes: Annotated[int, typer.Option(min=0, help="Processes that do, instead.")] = 0,
    print_: Annotated[
        int, typer.Option("--print", min=0, help="Print the first elements, as JSON.")
    ] = 0,
    state: Annotated[
        Path | None,
        typer.Option(help="Go on from this file if it exists; save where it stopped to it."),
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of the plan's caches.")] = None,
    allow_functions: Functions = False,
    rewrites: Rewrites = True,
) -> None:
    """Run a plan, and say what it gave and how fast.

    Example: deltaserve pipeline run configs/pipeline/chat.yaml --limit 100 --print 1
    """
    from deltaserve.cli.progress import count_bar, stop_on_sigterm
    from deltaserve.pipeline.iterator import open_pipeline
    from deltaserve.pipeline.plan import Plan
    from deltaserve.pipeline.saving import load_state, save_state

    read = Plan.from_yaml(plan, allow_functions=allow_functions)
    options: dict[str, Any] = {"threads": threads, "processes": processes, "cache": cache}
    with stop_on_sigterm(), open_pipeline(read, rewrites=rewrites, **options) as elements:
        if state is not None and state.exists():
            elements.set_state(load_state(state))
        counts = _Counts()
        try:
            with count_bar() as progress:
                while limit is None or counts.elements < limit:
                    element = next(elements, None)
                    if element is None:
                        break
                    counts.add(element)
                    if counts.elements <= print_:
                        print(json.dumps(element, default=_plain))
                    progress("elements", counts.elements, limit or 0)
        finally:
            if state is not None:
                save_state(state, elements.get_state())
            print(counts.summary(elements.skipped))


class _Counts:
    """What came out."""

    def __init__(self) -> None:
        self.elements = self.tokens = self.places = 0
        self._began = time.perf_counter()

    def add(self, element: Any) -> None:
        self.elements += 1
        ids = element.get("input_ids")
        if ids is None or not hasattr(ids, "size"):
            return
        used = element.get("segment_ids", element.get("attention_mask"))
        self.places += ids.size
        self.tokens += ids.size if used is None else int((used > 0).sum())

    def summary(self, skipped: int) -> str:
        seconds = time.perf_counter() - self._began
        words = [f"{self.elements:,} elements in {seconds:.1f} s"]
        if self.places:
            words.append(f"{self.tokens:,} tokens ({self.tokens / seconds:,.0f}/s)")
            words.append(f"{self.tokens / self.places:.2%} of places filled")
        if skipped:
            words.append(f"{skipped:,} broken rows skipped")
        return ", ".join(words)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


SUBCOMMANDS = (show, run)
