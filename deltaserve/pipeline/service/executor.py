"""The service as a place to run a plan's segments: what threads and processes are elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from deltaserve.pipeline.adapter import Segment
from deltaserve.pipeline.segments import Done
from deltaserve.pipeline.service.ledger import JobSpec
from deltaserve.pipeline.service.link import Link
from deltaserve.pipeline.service.program import Program
from deltaserve.pipeline.service.splits import SplitReader


class ServiceExecutor:
    """spec: of the job; each of its segments, and each pass over one, has its own ranges of lists
    and is a job of its own for the dispatcher. depth, local: see SplitReader."""

    def __init__(
        self, link: Link, program: Program, spec: JobSpec, consumer: int, depth: int, local: int
    ) -> None:
        self._link, self._program, self._spec = link, program, spec
        self._consumer, self._depth, self._local = consumer, depth, local
        self._reference = (program.stream, link.share(program))
        self._readers: list[SplitReader] = []
        self.lost_positions = 0

    def open(self, segment: Segment, first: int) -> Iterator[Done]:
        """This consumer's lists; ``first`` counts those that it had before."""
        name = f"{self._spec.name}/{segment.number}.{segment.epoch}"
        spec = replace(self._spec, name=name, length=segment.lists)
        self._link.ask("register", spec)
        if spec.relaxed and first == 0:
            first = spec.split * self._link.ask("granted", name, self._consumer)
        place = (segment.number, segment.epoch)
        reader = SplitReader(
            self._link, spec, self._consumer, self._program, self._reference, place,
            self._depth, self._local,
        )  # fmt: skip
        self._readers.append(reader)
        try:
            grant, skip = divmod(first, spec.split)
            while (done := reader.fetch(grant)) is not None:
                yield from done[skip:]
                grant, skip = grant + 1, 0
        finally:
            self.lost_positions += reader.lost_positions
            reader.close()
            self._readers.remove(reader)

    def close(self) -> None:
        for reader in self._readers:
            reader.close()
