"""What a client and its engine say to each other, whether by a queue or between processes.

Plain dataclasses: nothing here, and nothing that they hold, needs more than the standard
library. Commands go to the engine and are carried out in order, between two steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from deltaserve import errors
from deltaserve.config import EngineConfig
from deltaserve.engine.types import EngineRequest, EngineStats, ModelInfo, TokenEvent
from deltaserve.errors import DeltaServeError, EngineDeadError

SCHEMA = 3
"""Version of all messages. A process that says another one belongs to another release."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception on its way to whoever asked. kind: its class in errors.py. details: what it
    says beside the message, such as the field of a request that is wrong."""

    kind: str
    message: str
    details: dict[str, str | int | None] = field(default_factory=dict)

    @classmethod
    def of(cls, error: Exception) -> Failure:
        if isinstance(error, DeltaServeError):
            return cls(type(error).__name__, str(error), dict(vars(error)))
        return cls(EngineDeadError.__name__, f"the engine failed: {describe(error)}")

    def error(self) -> DeltaServeError:
        kind: type[DeltaServeError] = getattr(errors, self.kind)
        return kind(self.message, **self.details)


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


# Commands


@dataclass(frozen=True, slots=True)
class Registration:
    """A delta that was served before the process had to be started again."""

    name: str
    path: str
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Start:
    """The first command to a process: load, then serve.

    restore: deltas to register beside those of ``config``; one that cannot be any more is left
    out. log_level: of the logging module. json_logs: a line is a JSON object.
    """

    config: EngineConfig
    restore: tuple[Registration, ...]
    log_level: int
    json_logs: bool = False


@dataclass(frozen=True, slots=True)
class Submit:
    request: EngineRequest


@dataclass(frozen=True, slots=True)
class Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class Register:
    """``call`` here and below: answered by the Reply with the same number."""

    call: int
    name: str
    path: str
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Unregister:
    call: int
    name: str


@dataclass(frozen=True, slots=True)
class Pin:
    call: int
    name: str
    pinned: bool


@dataclass(frozen=True, slots=True)
class Rollback:
    call: int
    name: str


@dataclass(frozen=True, slots=True)
class Dump:
    call: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End; whatever runs is dropped."""


Call = Register | Unregister | Pin | Rollback | Dump
Command = Start | Submit | Abort | Call | Stop


# Reports


@dataclass(frozen=True, slots=True)
class Hello:
    """The first report of a process."""

    schema: int


@dataclass(frozen=True, slots=True)
class Loading:
    """Start has arrived: from now on messages pass in both directions."""


@dataclass(frozen=True, slots=True)
class Ready:
    max_model_len: int
    models: tuple[ModelInfo, ...]
    stats: EngineStats


@dataclass(frozen=True, slots=True)
class Stepped:
    """All events of one step; also sent without any, as the sign of life of a busy engine."""

    events: tuple[TokenEvent, ...]
    stats: EngineStats | None = None


@dataclass(frozen=True, slots=True)
class ModelsChanged:
    models: tuple[ModelInfo, ...]


@dataclass(frozen=True, slots=True)
class Reply:
    call: int
    failure: Failure | None = None
    result: Any = None
    """Of Register the version's number, of Dump the state."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine could not be loaded, or broke down; nothing follows."""

    failure: Failure


Report = Hello | Loading | Ready | Stepped | ModelsChanged | Reply | Failed
