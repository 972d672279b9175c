"""The engine itself, with a runner that computes nothing but how long it would have taken."""

from __future__ import annotations

import dataclasses

from deltaserve.bench.simulate.costs import Costs, Shape, costs_of
from deltaserve.bench.simulate.loading import VOCAB, SimulatedLoader, Store
from deltaserve.bench.simulate.system import System, plan_room
from deltaserve.bench.simulate.virtual import StepClock
from deltaserve.engine.admission import ByteBudget
from deltaserve.engine.core import Engine
from deltaserve.engine.grammar import Preparing
from deltaserve.engine.limits import Limits
from deltaserve.engine.observe import StepCounters
from deltaserve.engine.pace import Pace
from deltaserve.engine.parts import Parts
from deltaserve.engine.residency import Residency
from deltaserve.engine.scheduler import StepPlan
from deltaserve.engine.sequence import Sequence


class SimulatedRunner:
    """Draws a token for each row that is due, after the time that a step takes."""

    def __init__(self, costs: Costs, clock: StepClock) -> None:
        self._costs, self._clock = costs, clock
        self._drawn = 0

    def execute(self, plan: StepPlan, vocab_sizes: dict[int, int]) -> dict[Sequence, int]:
        self._clock.pass_time(self._costs(Shape.of(plan)))
        return {row.seq: self._next() for row in plan.rows if row.samples}

    def _next(self) -> int:
        self._drawn += 1
        return self._drawn % VOCAB


class SimulatedEngine(Engine):
    """``add``, ``step`` and all that they call are the engine's own."""

    def __init__(self, system: System, clock: StepClock) -> None:
        # Not the engine's constructor, which reads a checkpoint and makes a model.
        self.config = dataclasses.replace(system.engine_config(), merge_memory_bytes=0)
        self.clock = clock
        room = plan_room(system)
        self.max_model_len = room.max_model_len
        store, loader = Store(system), SimulatedLoader(system, clock)
        self.residency = Residency(
            Parts(store, store, store, loader, store.base(self.config.served_model_name)),
            Limits(room.deltas, room.host, attach_s=float("inf")),
            clock,
        )
        self.runner = SimulatedRunner(costs_of(system), clock)  # type: ignore[assignment]
        base = system.base
        budget = ByteBudget(
            self.config.slo_tpot_ms,
            base_bytes=base.step_bytes,
            kv_bytes_per_token=base.kv_bytes,
        )
        self.scheduler = self._make_scheduler(
            room.kv // (base.kv_bytes * self.config.block_size), budget
        )
        self.preparing = Preparing()
        self.counters = StepCounters()
        self.pace = Pace()
        self._refused = []
        for name in system.model_names():
            # Not ``register``, which compares each with all others: of 10,000, for minutes.
            self.residency.catalogue.add(store.version(name), pinned=False)
        loader.instant = True
        self.residency.load_all()
        loader.instant = False
