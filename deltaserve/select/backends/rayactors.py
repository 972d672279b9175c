"""On a Ray cluster: actors own graph shards and keep a copy of the points' state.

After each phase the actors send what they changed in their own points, and get what the
others changed with the next phase: the exchange is as large as the change. An actor that dies
is replaced, with the coordinator's copy of the state, and its step repeated. A graph on disk
must lie on storage that all nodes share; one in memory is sent to its owners once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaserve.errors import SelectionError
from deltaserve.select.backends.base import Backend, Session
from deltaserve.select.backends.local import require_workers
from deltaserve.select.graph import AnyShard, Graph
from deltaserve.select.problem import Instance
from deltaserve.select.state import State, written_by

MAX_DEATHS = 5
# An array, the points, and their new values.
Change = tuple[str, Any, Any]


@dataclass(frozen=True)
class RayActors(Backend):
    """workers: actors, of one CPU each.

    address: of a running cluster; None uses the one that ``ray.init`` connected to, or starts
    one on this machine for the time of the selection, with ``object_store_memory`` bytes.
    """

    workers: int = 2
    address: str | None = None
    object_store_memory: int | None = None

    def __post_init__(self) -> None:
        require_workers(self.workers)

    def open(self, graph: Graph, instance: Instance, scratch: Path | None) -> RaySession:
        return RaySession(graph, instance, self)


class Owner:
    """An actor: the shards it owns, and a copy of the state of all points."""

    def __init__(
        self, shards: Sequence[AnyShard], instance: Instance, arrays: dict[str, NDArray[Any]]
    ) -> None:
        self.shards = shards
        # What comes from the object store is read-only.
        self.state = State(instance, {name: np.array(array) for name, array in arrays.items()})

    def learn(self, news: Sequence[Change]) -> None:
        for name, ids, values in news:
            self.state.arrays[name][ids] = values

    def run(
        self, news: Sequence[Change], step: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> tuple[list[Any], list[Change]]:
        self.learn(news)
        start, stop = self.shards[0].start, self.shards[-1].stop
        arrays = self.state.arrays
        before = {name: arrays[name][start:stop].copy() for name in written_by(step)}
        results = [step(shard, self.state, *arguments) for shard in self.shards]
        changes: list[Change] = []
        for name, old in before.items():
            ids = np.flatnonzero(arrays[name][start:stop] != old) + start
            changes.append((name, ids, arrays[name][ids]))
        return results, changes

    def rows(self, rows: Callable[..., Any], part: int) -> list[Any]:
        return [rows(shard, self.state, part) for shard in self.shards]

    def solve(
        self, solve: Callable[..., Any], arguments: tuple[Any, ...], *pieces: list[Any]
    ) -> NDArray[np.int64]:
        result: NDArray[np.int64] = solve(list(chain.from_iterable(pieces)), *arguments)
        return result


class RaySession(Session):
    def __init__(self, graph: Graph, instance: Instance, options: RayActors) -> None:
        super().__init__(graph)
        self._ray = _import_ray()
        self._started = not self._ray.is_initialized()
        if self._started:
            self._connect(options)
        self.state = State.create(instance, None)
        self._instance = self._ray.put(instance)
        count = min(options.workers, len(graph.shards))
        cuts = [len(graph.shards) * i // count for i in range(count + 1)]
        self._shards = [self._ray.put(list(graph.shards[a:b])) for a, b in pairwise(cuts)]
        self._news: list[Change] = []
        self.actors = [self._actor(shards) for shards in self._shards]

    def _connect(self, options: RayActors) -> None:
        own: dict[str, Any] = {
            "num_cpus": options.workers,
            "include_dashboard": False,
            "object_store_memory": options.object_store_memory,
        }
        try:
            self._ray.init(
                address=options.address or "local",
                log_to_driver=False,
                **({} if options.address else own),
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise SelectionError(f"cannot reach the Ray cluster: {error}") from None

    def _actor(self, shards: Any) -> Any:
        remote = self._ray.remote(num_cpus=1)(Owner)
        return remote.remote(shards, self._instance, self.state.arrays)

    def map(self, step: Callable[..., Any], *arguments: Any) -> list[Any]:
        news = self._ray.put(self._news)

        def start(number: int) -> Any:
            return self.actors[number].run.remote(news, step, arguments)

        found = self._gather(dict.fromkeys(range(len(self.actors)), start))
        self._news = []
        for _, changes in found:
            for change in changes:
                self.write(*change)
        return [result for results, _ in found for result in results]

    def parts(
        self,
        rows: Callable[..., Any],
        solve: Callable[..., NDArray[np.int64]],
        count: int,
        *arguments: Any,
    ) -> Iterator[NDArray[np.int64]]:
        news = self._ray.put(self._news)

        def start(part: int) -> Any:
            pieces = []
            for actor in self.actors:
                actor.learn.remote(news)
                pieces.append(actor.rows.remote(rows, part))
            solver = self.actors[part % len(self.actors)]
            return solver.solve.remote(solve, arguments, *pieces)

        # As many parts at a time as there are actors: their rows pass through the store.
        for first in range(0, count, len(self.actors)):
            wave = range(first, min(count, first + len(self.actors)))
            yield from self._gather(dict.fromkeys(wave, start))

    def write(self, name: str, ids: NDArray[np.int64] | slice, values: Any) -> None:
        self.state.arrays[name][ids] = values
        self._news.append((name, ids, values))

    def _gather(self, starts: dict[int, Callable[[int], Any]]) -> list[Any]:
        """Results in order; what was lost with an actor is done again."""
        results: dict[int, Any] = {}
        deaths = 0
        while len(results) < len(starts):
            missing = [number for number in starts if number not in results]
            refs = {number: starts[number](number) for number in missing}
            for number, ref in refs.items():
                try:
                    results[number] = self._ray.get(ref)
                    deaths = 0
                except self._ray.exceptions.RayError as error:
                    if isinstance(error, self._ray.exceptions.RayTaskError) and not isinstance(
                        error.cause, self._ray.exceptions.RayError
                    ):
                        raise
                    deaths += 1
                    self._replace_dead(error, deaths)
        return [results[number] for number in starts]

    def _replace_dead(self, error: Exception, deaths: int) -> None:
        if deaths >= MAX_DEATHS * len(self.actors):
            raise SelectionError(f"Ray actors died {deaths} times in a row: {error}") from error
        for number, actor in enumerate(self.actors):
            try:
                self._ray.get(actor.learn.remote([]))
            except self._ray.exceptions.RayActorError:
                self.actors[number] = self._actor(self._shards[number])

    def close(self) -> None:
        for actor in self.actors:
            self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise SelectionError(
            "the Ray backend needs Ray: pip install 'deltaserve[ray]', or use another backend"
        ) from None
    return ray
