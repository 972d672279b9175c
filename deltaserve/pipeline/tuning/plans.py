"""Profiling and tuning of a whole plan on this machine, and running it tuned."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaserve.pipeline.cache import settings_of
from deltaserve.pipeline.consumption import usable_cores
from deltaserve.pipeline.iterator import prepare
from deltaserve.pipeline.plan import Plan
from deltaserve.pipeline.profiling import Profiled, segment_names
from deltaserve.pipeline.trace import Trace
from deltaserve.pipeline.tuning.calibration import Calibration, calibrated
from deltaserve.pipeline.tuning.controller import Controller
from deltaserve.pipeline.tuning.online import Autotuner
from deltaserve.pipeline.tuning.program import Resources
from deltaserve.pipeline.tuning.recommend import Advice, By, advise
from deltaserve.pipeline.tuning.settings import Settings, epochs, natures
from deltaserve.pipeline.tuning.tune import Tuned, run_traced, tune

MAX_THREADS = 32
MEMORY_SHARE = 0.5
"""Of the free memory, as tf.data's budget."""


@dataclass(frozen=True)
class Workload:
    """plan: as written. trainer_s: the trainer's time for an element. cache: folder of caches.
    by: which model gives the advice."""

    plan: Plan
    trainer_s: float = 0.0
    cache: Path | None = None
    by: By = "program"
    max_threads: int = MAX_THREADS

    def open(self, settings: Settings) -> Profiled:
        return Profiled(self.plan, settings, cache=self.cache)

    def knowledge(self) -> dict[str, Any]:
        """What `advise` is told beside a trace. Raises PipelineError."""
        prepared = prepare(self.plan)
        alone = calibrated(prepared)
        return {
            "lone": alone.lone,
            # What has a cache needs no advice where to put one.
            "natures": {} if _cached(prepared) else natures(prepared, alone.rows, alone.bytes),
            "epochs": epochs(prepared),
            "by": self.by,
            "parts": alone.parts,
            "resources": self._resources(alone),
        }

    def _resources(self, alone: Calibration) -> Resources:
        import psutil

        folder = settings_of(self.cache)
        place = next(p for p in (folder.directory, *folder.directory.parents) if p.exists())
        return Resources(
            cores=usable_cores(),
            memory=MEMORY_SHARE * psutil.virtual_memory().available,
            cache_bytes=min(folder.max_bytes, shutil.disk_usage(place).free),
            demand=1 / self.trainer_s if self.trainer_s else None,
            max_threads=self.max_threads,
            max_processes=usable_cores(),
            process_bytes=psutil.Process().memory_info().rss,
            transfer=alone.transfer,
            bandwidth=alone.bandwidth,
        )


def _cached(plan: Plan) -> bool:
    return any(node.op == "cache" for node in plan.nodes())


def profile(work: Workload, settings: Settings, seconds: float) -> tuple[Trace, Advice]:
    """Run a plan for some seconds. Raises PipelineError."""
    trace = run_traced(work.open(settings), seconds=seconds, compute_s=work.trainer_s)
    return trace, advise(trace, **work.knowledge())


def tune_plan(work: Workload, start: Settings, seconds: float) -> Tuned:
    """See `tune.tune`. Raises PipelineError."""
    stages = segment_names(prepare(work.plan))
    return tune(
        work.open,
        start,
        stages,
        seconds=seconds,
        compute_s=work.trainer_s,
        **work.knowledge(),
    )


@contextmanager
def opened_tuned(
    work: Workload,
    settings: Settings,
    changed: Callable[[dict[str, int]], None] = lambda change: None,
    period_s: float = 1.0,
) -> Iterator[Profiled]:
    """The plan with these settings, threads following what the trainer needs. (Processes stay
    as they are: a change would stop the rows that are under way.)"""
    elements = work.open(settings)
    tuner = Autotuner(elements, Controller(work.max_threads), period_s, changed)
    try:
        if not settings.processes:
            tuner.start()
        yield elements
    finally:
        tuner.stop()
        elements.close()
