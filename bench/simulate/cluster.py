"""A simulated installation in the place of a server: it answers a run's requests."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltaserve.bench.load.client import Prompt
from deltaserve.bench.load.records import Outcome, Record
from deltaserve.bench.load.scrape import Series, flatten
from deltaserve.bench.load.workload import Workload
from deltaserve.bench.simulate.loading import VOCAB
from deltaserve.bench.simulate.replica import Replica, Ticket
from deltaserve.bench.simulate.router import Router
from deltaserve.bench.simulate.system import System
from deltaserve.engine.types import EngineRequest, SamplingParams
from deltaserve.errors import QueueFullError, RequestError

LETTERS_PER_TOKEN = 6
"""Of words that are not made up, to tell how many tokens they are."""
GENERATED = "#"
"""A generated token as text: this and its id."""


class Cluster:
    """Replicas behind a router. What a run needs of a server (see ``execute.Backend``)."""

    def __init__(self, system: System, workload: Workload) -> None:
        self.system = system
        self._workload = workload
        self._tenants = {tenant.name: tenant for tenant in workload.tenants}
        loop = asyncio.get_running_loop()
        self.replicas = [Replica(system, loop) for _ in range(system.replicas)]
        self._router = Router(system.routing, self.replicas)
        self.running = [asyncio.ensure_future(replica.run()) for replica in self.replicas]
        self._numbers = itertools.count()

    async def close(self) -> None:
        """Raises what a replica has failed with, which is a fault of the engine or of ours."""
        for task in self.running:
            task.cancel()
        for result in await asyncio.gather(*self.running, return_exceptions=True):
            if isinstance(result, Exception):
                raise result

    def client(self, clock: Callable[[], float]) -> SimulatedClient:
        return SimulatedClient(self, self._workload, clock)

    def scraper(self) -> SimulatedScraper:
        return SimulatedScraper(self, self._workload.scrape)

    async def facts(self) -> dict[str, object]:
        return {
            "url": f"simulated: {self.system.name}",
            "simulated": True,
            "models": 1 + self.system.deltas.count,
            "system": dataclasses.asdict(self.system),
            "requests_of_replica": [
                replica.engine.scheduler.usage.total.requests for replica in self.replicas
            ],
        }

    def submit(
        self, record: Record, prompt: Prompt, output_tokens: int
    ) -> tuple[Replica, str, Ticket]:
        tenant = self._tenants[record.tenant]
        request = EngineRequest(
            f"{next(self._numbers)}",
            record.model,
            token_ids(prompt),
            SamplingParams(max_tokens=output_tokens, temperature=0.0),
            tenant=record.tenant,
            weight=tenant.weight,
        )
        replica = self.replicas[self._router.choose(record.model)]
        return replica, request.request_id, replica.submit(request)


@dataclass(frozen=True)
class SimulatedClient:
    """As ``Client``, without a network."""

    cluster: Cluster
    workload: Workload
    clock: Callable[[], float]

    @property
    def url(self) -> str:
        return "simulated"

    async def ask(
        self,
        record: Record,
        prompt: Prompt,
        output_tokens: int,
        key: str,
        cancel_after: float | None = None,
    ) -> tuple[Record, str]:
        sent = self.clock()
        origin = asyncio.get_running_loop().time() - sent
        outcome, status, message = Outcome.OK, 200, ""
        ticket = None
        patience = math.inf if cancel_after is None else cancel_after
        try:
            async with asyncio.timeout(min(patience, self.workload.request_timeout)):
                await asyncio.sleep(self.cluster.system.request_s)
                replica, request_id, ticket = self.cluster.submit(record, prompt, output_tokens)
                try:
                    await ticket.ended
                finally:
                    replica.abort(request_id)
            outcome, status, message = _end(ticket)
        except TimeoutError:
            waited = patience > self.workload.request_timeout
            outcome = Outcome.TIMEOUT if waited else Outcome.CANCELLED
        except asyncio.CancelledError:
            outcome, message = Outcome.UNFINISHED, "the run ended first"
        tokens = ticket.tokens if ticket is not None else []
        done = dataclasses.replace(
            record,
            sent=sent,
            finished=self.clock(),
            outcome=outcome,
            token_times=tuple(t - origin for t in ticket.times) if ticket is not None else (),
            prompt_tokens=len(token_ids(prompt)),
            output_tokens=len(tokens),
            cached_tokens=ticket.num_cached if ticket is not None else 0,
            status=status,
            message=message,
        )
        return done, " ".join(f"{GENERATED}{token}" for token in tokens)


@dataclass(frozen=True)
class SimulatedScraper:
    """The engines' own counters, summed over the replicas, under the names of ``/v1/stats``."""

    cluster: Cluster
    period: float

    async def follow(self, clock: Callable[[], float], series: Series) -> None:
        while True:
            await self.look(clock, series)
            await asyncio.sleep(self.period)

    async def look(self, clock: Callable[[], float], series: Series) -> None:
        total: Counter[str] = Counter()
        for replica in self.cluster.replicas:
            stats: Mapping[str, Any] = dataclasses.asdict(replica.engine.stats())
            for name, value in flatten("stats", stats):
                total[name] += value  # type: ignore[assignment]
        series.times.append(clock())
        series.values.append(dict(total))


def token_ids(prompt: Prompt) -> tuple[int, ...]:
    """Ids that are equal where the words are; a generated token has its own again."""
    if isinstance(prompt, str):
        return tuple(_ids(prompt.split()))
    ids: list[int] = []
    for part in prompt:
        ids += [part % VOCAB] if isinstance(part, int) else _ids(part["content"].split())
    return tuple(ids)


def _ids(words: Sequence[str]) -> list[int]:
    ids: list[int] = []
    for word in words:
        if word.startswith(GENERATED) and word[1:].isdigit():
            ids.append(int(word[1:]))
        else:
            first = zlib.crc32(word.encode()) % VOCAB
            ids += [first] * max(1, math.ceil(len(word) / LETTERS_PER_TOKEN))
    return ids


def _end(ticket: Ticket) -> tuple[Outcome, int, str]:
    error = ticket.error
    if error is None:
        return Outcome.OK, 200, ""
    if isinstance(error, RequestError):
        status = 429 if isinstance(error, QueueFullError) else 400
        return Outcome.HTTP, status, str(error)
    return Outcome.STREAM, 200, str(error)
