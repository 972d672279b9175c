"""Data-parallel trainers: each gets its own rows of every batch, and any number of them goes on
from the same state.

The batches of a plan are those of all trainers together, in one order that does not depend on
how many there are. So a state is the stream's own, the same for every consumer behind the same
batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Self

from deltaserve.errors import PipelineError
from deltaserve.pipeline.node import Node
from deltaserve.pipeline.plan import Plan


class Batches(Protocol):
    """A pipeline's iterator, or a stream of the service in lockstep."""

    def __next__(self) -> Any: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Share:
    """Rows ``consumer * g`` to ``(consumer + 1) * g`` of each batch of ``consumers * g`` rows.

    batches: of ``plan``, all of them: those of `open_pipeline`, where each consumer computes all
    rows, or of the service in lockstep, where they are made once. A context manager that closes
    them.

    Raises PipelineError: the plan's batches cannot be shared out evenly.
    """

    def __init__(self, batches: Batches, plan: Plan, consumer: int, consumers: int) -> None:
        if not 0 <= consumer < consumers:
            raise PipelineError(f"consumer {consumer} of {consumers}: consumers count from 0")
        self._batches = batches
        rows = shared_rows(plan, consumers)
        self._mine = slice(consumer * rows, (consumer + 1) * rows)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        return {name: values[self._mine] for name, values in next(self._batches).items()}

    def get_state(self) -> dict[str, Any]:
        """Also of any other consumer, of any number of them, that takes the next batch."""
        return self._batches.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._batches.set_state(state)

    def close(self) -> None:
        self._batches.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def shared_rows(plan: Plan, consumers: int) -> int:
    """Rows of a batch for each of so many consumers.

    Raises PipelineError: they would not get as many each, of every batch.
    """
    node = plan.root
    while node.op == "prefetch":
        node = node.inputs[0]
    if node.op != "batch":
        raise PipelineError(
            f"consumers share out batches, and this plan ends with {node.op}: end it with a batch "
            "of the rows of all consumers"
        )
    size = int(node.params["n"])
    if size % consumers:
        raise PipelineError(
            f"batches of {size} rows cannot be shared out evenly to {consumers} consumers: the "
            "batch must be a multiple of their number"
        )
    if not node.params["drop_remainder"] and consumers > 1 and not _endless(node):
        raise PipelineError(
            f"the last batch may have fewer than {size} rows, too few for {consumers} consumers: "
            "give batch drop_remainder=True, or repeat the rows without end"
        )
    return size // consumers


def _endless(node: Node) -> bool:
    """Whether its rows never run out."""
    if node.op == "repeat" and node.params["epochs"] is None:
        return True
    return node.op != "take" and bool(node.inputs) and all(map(_endless, node.inputs))
