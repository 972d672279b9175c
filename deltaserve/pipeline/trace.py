"""A trace: what each operator of a running pipeline cost, beside the plan that ran.

One JSON file holds both, so that a trace can be run again. Times are in ns and are totals over
all threads and processes; where only some calls were timed, they are scaled to all calls.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from deltaserve.artifact.staging import replacing
from deltaserve.errors import PipelineError

FORMAT = "deltaserve-trace/1"
SUMS = ("made", "taken", "timed", "cpu_ns", "wall_ns", "queued_ns", "bytes", "read_bytes")


@dataclass(frozen=True)
class OperatorFigures:
    """One operator. cpu_ns, wall_ns: own time, the clocks stopped while an input is called.

    queued_ns: of wall_ns, ready to run while other threads had the cores (Linux; else 0).
    made, taken: elements. handed: of made, what the next stage has got (None: all). bytes: of
    all elements made, from a sample. read_bytes: from files.
    stage: operators of one stage are run by the same threads. parallelism: of its stage.
    buffer, buffered: places and mean of what is ready in the queue behind it (0: none), in lots.
    lot: elements that a thread makes at a time.
    """

    name: str
    op: str
    inputs: tuple[str, ...] = ()
    stage: str = ""
    serial: bool = False
    parallelism: int = 1
    buffer: int = 0
    buffered: float = 0.0
    made: int = 0
    taken: int = 0
    handed: int | None = None
    timed: int = 0
    cpu_ns: float = 0.0
    wall_ns: float = 0.0
    queued_ns: float = 0.0
    bytes: float = 0.0
    read_bytes: float = 0.0
    lot: int = 1

    @property
    def waited_ns(self) -> float:
        """Neither on a core nor in line for one: disk, network, sleep, or the GIL."""
        return max(0.0, self.wall_ns - self.cpu_ns - self.queued_ns)


@dataclass(frozen=True)
class Trace:
    """operators: inputs before those who read them. stalled_ns: the consumer waited for the
    pipeline; consumer_ns: it worked. resident: bytes by process, the consumer's first."""

    operators: Mapping[str, OperatorFigures]
    root: str
    wall_ns: float
    stalled_ns: float
    consumer_ns: float
    elements: int
    threads: int = 1
    processes: int = 0
    cores: int = 1
    resident: Mapping[str, int] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Elements a second."""
        return self.elements / self.wall_ns * 1e9 if self.wall_ns else 0.0

    @property
    def stall(self) -> float:
        """Share of the time that the consumer waited."""
        return self.stalled_ns / self.wall_ns if self.wall_ns else 0.0

    def write(self, path: Path) -> None:
        with replacing(path) as partial:
            partial.write_text(json.dumps({"format": FORMAT} | asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Trace:
        """Raises PipelineError: not a trace."""
        try:
            content = json.loads(path.read_text())
            if content.pop("format", None) != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            operators = {
                name: OperatorFigures(**each | {"inputs": tuple(each["inputs"])})
                for name, each in content.pop("operators").items()
            }
            return cls(operators=operators, **content)
        except OSError as error:
            raise PipelineError(f"{path}: {error.strerror or error}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PipelineError(f"{path} is not a trace of a pipeline: {error}") from None


def merge(parts: list[OperatorFigures]) -> OperatorFigures:
    """One operator as several processes saw it."""
    if len(parts) == 1:
        return parts[0]
    sums = {name: sum(getattr(part, name) for part in parts) for name in (*SUMS, "buffered")}
    return replace(parts[0], **sums)


def difference(before: Trace, after: Trace) -> Trace:
    """What happened between two traces of one run."""
    operators = {
        name: _minus(each, before.operators.get(name)) for name, each in after.operators.items()
    }
    return replace(
        after,
        operators=operators,
        wall_ns=after.wall_ns - before.wall_ns,
        stalled_ns=after.stalled_ns - before.stalled_ns,
        consumer_ns=after.consumer_ns - before.consumer_ns,
        elements=after.elements - before.elements,
    )


def _minus(now: OperatorFigures, then: OperatorFigures | None) -> OperatorFigures:
    if then is None:
        return now
    # Scaled totals may shrink a little when the scale does.
    left = {name: max(0, getattr(now, name) - getattr(then, name)) for name in SUMS}
    handed = now.handed if then.handed is None or now.handed is None else now.handed - then.handed
    return replace(now, handed=handed, **left)
