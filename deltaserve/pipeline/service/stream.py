"""A plan's elements from the service: an iterator with exact state, like every other place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deltaserve.errors import ServiceError
from deltaserve.pipeline.cache import settings_of
from deltaserve.pipeline.iterator import Pipeline
from deltaserve.pipeline.plan import Plan
from deltaserve.pipeline.service.executor import ServiceExecutor
from deltaserve.pipeline.service.hosted import HostedReader
from deltaserve.pipeline.service.ledger import HOSTED_MODES, SPLIT_MODES, JobSpec
from deltaserve.pipeline.service.link import Link
from deltaserve.pipeline.service.program import HostedOptions, Program


@dataclass(frozen=True)
class JobOptions:
    """How the consumers of a job share it.

    mode: "ordered": consumer i of n reads the ranges i, i + n, ... of the source (one consumer:
    the same stream as without a service); "dynamic": ranges go to who asks first; "window" and
    "lockstep": all consumers read one stream, made once (see shared.py); "rounds": batches of
    near-equal cost for all consumers at a time (see rounds.py).
    relaxed (dynamic): at most once instead of exactly once: what a lost worker had is passed
    over, and a consumer that returns goes on with what nobody was given.
    split: lists of 64 positions that are prepared at a time. depth: such ranges under way. local:
    threads of the consumer's own process that prepare ranges, before workers are asked.
    producers (rounds): streams that can be on as many workers.
    peers_limit_s: how long to wait for the other consumers of lockstep and rounds.
    """

    name: str
    mode: str = "ordered"
    consumer: int = 0
    consumers: int = 1
    relaxed: bool = False
    split: int = 1
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

    def spec(self, stream: str) -> JobSpec:
        hosted = self.mode in HOSTED_MODES
        return JobSpec(
            name=self.name,
            stream=stream,
            mode=self.mode,
            consumers=self.consumers,
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

    def __init__(self, link: Link, plan: Plan, options: JobOptions, cache: str | None) -> None:
        self._link, self._options = link, options
        program = Program.of(plan, cache)
        self.spec = options.spec(program.stream)
        self._elements: HostedReader | Pipeline
        if self.spec.hosted:
            link.ask("register", self.spec)
            self._elements = HostedReader(
                link, self.spec, options.consumer, program, options.peers_limit_s
            )
            return
        self._executor = ServiceExecutor(
            link, program, self.spec, options.consumer, options.depth, options.local
        )
        stream = program.stream if self._whole else f"{program.stream} of {self._identity()}"
        settings = settings_of(cache)
        self._elements = Pipeline(program.plan, stream, self._executor, None, settings)

    def __iter__(self) -> ServiceStream:
        return self

    def __next__(self) -> Any:
        return next(self._elements)

    def get_state(self) -> dict[str, Any]:
        """The place after the last element; plain values (JSON). That of a single ordered
        consumer is also a state of the same plan anywhere else."""
        state = self._elements.get_state()
        if isinstance(self._elements, HostedReader):
            number = self._elements.taken
            self._link.ask("ack", self.spec.name, self._options.consumer, number)
        return {**state, "job": self._identity()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; a relaxed job goes on with what was not granted yet.

        Raises:
            PipelineError: it belongs to another plan or job.
        """
        saved, mine = state.get("job"), self._identity()
        if not (saved is None and self._whole):
            for name in mine:
                if (saved or {}).get(name) != mine[name]:
                    more = "; only in lockstep may it change" if name == "consumers" else ""
                    raise ServiceError(
                        f"the saved state has {name} {(saved or {}).get(name)!r}, this job "
                        f"{mine[name]!r}; restore it with the plan and the options that it was "
                        f"saved with{more}"
                    )
        if not self.spec.relaxed:
            self._elements.set_state(state)

    @property
    def skipped(self) -> int:
        """Elements that this consumer was too slow for (window)."""
        return self._elements.skipped if isinstance(self._elements, HostedReader) else 0

    @property
    def lost_positions(self) -> int:
        """Positions that went with a worker (relaxed)."""
        return 0 if self.spec.hosted else self._executor.lost_positions

    def close(self) -> None:
        self._elements.close()

    def __enter__(self) -> ServiceStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def _whole(self) -> bool:
        """Whether this is the stream that the plan gives everywhere."""
        return self.spec.mode == "ordered" and self.spec.consumers == 1

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the stream that it is restored to. A job's name,
        too: what a consumer was granted belongs to it (ordered ranges do not). In lockstep all
        consumers of every job have the same elements, however many there are."""
        spec = self.spec
        if spec.mode == "lockstep":
            return {"stream": spec.stream, "mode": spec.mode}
        identity = {
            "stream": spec.stream,
            "mode": spec.mode,
            "consumers": spec.consumers,
            "consumer": self._options.consumer,
            "split": spec.split,
            "producers": spec.producers,
        }
        return identity if spec.mode == "ordered" else {"name": spec.name, **identity}
