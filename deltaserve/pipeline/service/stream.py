"""A plan's elements from the service: an iterator with exact state, like every other place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from deltaserve.errors import ServiceError
from deltaserve.pipeline.service.feed import Feed
from deltaserve.pipeline.service.hosted import HostedReader
from deltaserve.pipeline.service.ledger import HOSTED_MODES, SPLIT_MODES, JobSpec
from deltaserve.pipeline.service.link import Link
from deltaserve.pipeline.service.program import HostedOptions, Program
from deltaserve.pipeline.service.splits import SplitReader

# What a checkpoint must agree on with the stream that it is restored to.
IDENTITY = ("job", "stream", "mode", "consumers", "consumer", "split", "producers")


@dataclass(frozen=True)
class JobOptions:
    """How the consumers of a job share it.

    mode: "ordered": consumer i of n reads the ranges i, i + n, ... of the source (one consumer:
    the same stream as without a service); "dynamic": ranges go to who asks first; "window" and
    "lockstep": all consumers read one stream, made once (see shared.py); "rounds": batches of
    near-equal cost for all consumers at a time (see rounds.py).
    relaxed (dynamic): at most once instead of exactly once: what a lost worker had is passed
    over, and a consumer that returns goes on with what nobody was given.
    split: positions that are prepared at a time. depth: such ranges under way. local: threads of
    the consumer's own process that prepare ranges, before workers are asked.
    producers (rounds): streams that can be on as many workers.
    peers_limit_s: how long to wait for the other consumers of lockstep and rounds.
    """

    name: str
    mode: str = "ordered"
    consumer: int = 0
    consumers: int = 1
    relaxed: bool = False
    split: int = 64
    depth: int = 16
    local: int = 1
    producers: int = 1
    hosted: HostedOptions = field(default_factory=HostedOptions)
    peers_limit_s: float = 600.0

    def __post_init__(self) -> None:
        if self.mode not in SPLIT_MODES + HOSTED_MODES:
            known = ", ".join(SPLIT_MODES + HOSTED_MODES)
            raise ServiceError(f"a job's mode is one of {known}, not {self.mode!r}")
        if self.relaxed and self.mode != "dynamic":
            raise ServiceError(f"relaxed jobs are dynamic ones, not {self.mode}")
        if self.producers > 1 and self.mode != "rounds":
            raise ServiceError(f"several producers are for rounds, not for {self.mode}")
        for name in ("consumers", "split", "depth", "producers"):
            if getattr(self, name) < 1:
                raise ServiceError(f"{name} of a job must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.consumer < self.consumers or self.local < 0:
            raise ServiceError(
                f"consumer {self.consumer} of {self.consumers} with local={self.local}: consumers "
                "count from 0, local threads are 0 or more"
            )

    def spec(self, program: Program) -> JobSpec:
        hosted = self.mode in HOSTED_MODES
        return JobSpec(
            name=self.name,
            stream=program.stream,
            mode=self.mode,
            consumers=self.consumers,
            length=program.length,
            split=self.split,
            relaxed=self.relaxed,
            producers=self.producers,
            options=self.hosted.text() if hosted else "",
        )


class ServiceStream:
    """The elements of one consumer.

    Raises ServiceError when the dispatcher, or every worker, was away for longer than the link's
    patience; PipelineError as the plan does.
    """

    def __init__(self, link: Link, program: Program, options: JobOptions) -> None:
        self._link, self._options = link, options
        self.spec = options.spec(program)
        link.ask("register", self.spec)
        consumer = options.consumer
        self._splits: SplitReader | None = None
        self._hosted: HostedReader | None = None
        if self.spec.hosted:
            self._hosted = HostedReader(
                link, self.spec, consumer, program, options.peers_limit_s
            )
            return
        self._splits = SplitReader(
            link, self.spec, consumer, program, options.depth, options.local
        )
        self._feed = Feed(self._splits.fetch)
        self._program = program
        if options.relaxed:
            self._skip_granted()
        self._elements = program.elements(self._feed)

    def __iter__(self) -> ServiceStream:
        return self

    def __next__(self) -> Any:
        return next(self._hosted if self._hosted is not None else self._elements)

    def get_state(self) -> dict[str, Any]:
        """The place after the last element; the dispatcher is told of it. JSON can hold it."""
        state: dict[str, Any] = dict(zip(IDENTITY, self._identity(), strict=True))
        if self._hosted is not None:
            number, offset = self._hosted.taken, 0
            state["at"] = self._hosted.get_state()
        else:
            place = self._feed.get_state()
            number, offset = place["grant"], place["row"]
            state["at"] = self._elements.get_state()
        self._link.ask("ack", self.spec.name, self._options.consumer, number, offset)
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; a relaxed job goes on with what was not granted yet.

        Raises:
            ServiceError: it belongs to another job.
        """
        for name, mine in zip(IDENTITY, self._identity(), strict=True):
            if state.get(name) != mine:
                raise ServiceError(
                    f"the saved state has {name} {state.get(name)!r}, this job {mine!r}; restore "
                    "it with the plan and the options that it was saved with"
                )
        if self._hosted is not None:
            self._hosted.set_state(state["at"])
        elif not self.spec.relaxed:
            assert self._splits is not None
            self._splits.seek()
            self._elements.set_state(state["at"])

    @property
    def skipped(self) -> int:
        """Elements that this consumer was too slow for (window)."""
        return self._hosted.skipped if self._hosted is not None else 0

    @property
    def lost_positions(self) -> int:
        """Positions that went with a worker (relaxed)."""
        return self._splits.lost_positions if self._splits is not None else 0

    def close(self) -> None:
        reader = self._hosted or self._splits
        assert reader is not None
        reader.close()

    def __enter__(self) -> ServiceStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _identity(self) -> list[Any]:
        spec = self.spec
        consumer = self._options.consumer
        return [
            spec.name, spec.stream, spec.mode, spec.consumers, consumer, spec.split, spec.producers
        ]  # fmt: skip

    def _skip_granted(self) -> None:
        granted = self._link.ask("granted", self.spec.name, self._options.consumer)
        self._feed.set_state({"grant": granted, "row": 0})
