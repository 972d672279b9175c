"""A workload on a simulated installation: the same runs, records and result as on a server."""

from __future__ import annotations

import asyncio

from deltaserve.bench.load.execute import LoadTest, Progress
from deltaserve.bench.load.plan import Served
from deltaserve.bench.load.prompts import Renderer
from deltaserve.bench.load.result import Measured
from deltaserve.bench.load.workload import Workload
from deltaserve.bench.simulate.cluster import Cluster
from deltaserve.bench.simulate.system import System
from deltaserve.bench.simulate.virtual import run


def simulate(system: System, workload: Workload, on_progress: Progress) -> Measured:
    """Run the workload in virtual time. Ctrl-C ends it early and keeps what was simulated.

    Raises ConfigError: the system or the workload asks for what cannot be.
    """
    return run(_simulate(system, workload, on_progress))


async def _simulate(system: System, workload: Workload, on_progress: Progress) -> Measured:
    cluster = Cluster(system, workload)
    base = system.engine_config().served_model_name
    models = [Served(base), *(Served(name, base) for name in system.model_names())]
    names = [tenant.name for tenant in workload.tenants]
    renderer = Renderer(token_ids=workload.token_ids)
    test = LoadTest(
        cluster,
        workload,
        dict.fromkeys(names, ""),
        dict.fromkeys(names, models),
        renderer,
        on_progress,
    )
    running = asyncio.ensure_future(test.execute())
    try:
        # An engine that failed answers nobody: waiting for the run would last for ever.
        await asyncio.wait({running, *cluster.running}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not running.done():
            running.cancel()
        await cluster.close()
    return await running
