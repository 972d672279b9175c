"""tf.data's analytic model of a pipeline: how long its consumer waits for one element.

Each operator is a queue of its own; an asynchronous one hides its inputs' time behind a buffer
(Murray, Simsa, Klimovic, Indyk: tf.data, PVLDB 14(12), 2021, section 3.3). All times in ns:

    s   own processing time per element          r   elements taken from each input per element
    p   parallelism                              n   elements buffered
    x   how often the consumer comes             y   how long the inputs take
    T   output time: synchronous s + r * sum T;  asynchronous s / p + W(y, x, n)

The searches over its parameters are in `search`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from deltaserve.errors import PipelineError

Way = Literal["sync", "parallel", "interleave", "prefetch"]
Downward = Literal["consumer", "pipeline"]
Settings = Mapping[str, float]
"""Parallelism of parallel operators and interleaves, buffer of prefetches, by name."""


@dataclass(frozen=True)
class Operator:
    """One operator of the model; ``low`` and ``high`` bound its setting unless it is sync."""

    name: str
    self_ns: float
    ratio: float = 1.0
    way: Way = "sync"
    inputs: tuple[str, ...] = ()
    low: int = 1
    high: int = 1
    element_bytes: float = 0.0

    def taken(self) -> float:
        """Elements taken from each input per output; an interleave takes from one at a time."""
        return self.ratio / len(self.inputs) if self.way == "interleave" else self.ratio


def wait_ns(producer_ns: float, consumer_ns: float, buffer: float) -> float:
    """W(y, x, n): an M/M/1/k queue is empty with probability P, and then one waits y."""
    if producer_ns == 0:
        return 0.0
    if consumer_ns == 0:
        return producer_ns
    load = consumer_ns / producer_ns
    if abs(load - 1) < 1e-9:
        return producer_ns / (buffer + 1)
    if load > 1 and (buffer + 1) * (load - 1) > 700:  # load ** (n + 1) would overflow
        return 0.0
    return float(producer_ns * (1 - load) / (1 - load ** (buffer + 1)))


@dataclass(frozen=True)
class Model:
    """Operators by name, the root's name, and how long the consumer works on an element.

    downward: what an operator's consumer is taken to need between two elements. "consumer":
    only the trainer's time, shared out, as in the paper's worked example (its figure 5);
    "pipeline": the processing on the way there too, as TensorFlow's code does it.
    """

    operators: Mapping[str, Operator]
    root: str
    consumer_ns: float = 0.0
    downward: Downward = "pipeline"
    order: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", tuple(self._from_root()))

    def _from_root(self) -> Iterator[str]:
        """Consumers before what they consume."""
        waiting, seen = [self.root], set()
        while waiting:
            name = waiting.pop(0)
            if name not in self.operators:
                raise PipelineError(f"the model has no operator {name!r}")
            if name in seen:
                raise PipelineError(f"the model needs a tree, but {name!r} is consumed twice")
            seen.add(name)
            yield name
            waiting += self.operators[name].inputs

    def tunable(self) -> list[Operator]:
        return [self.operators[n] for n in self.order if self.operators[n].way != "sync"]

    def lowest(self) -> dict[str, float]:
        return {each.name: float(each.low) for each in self.tunable()}

    def output_ns(self, settings: Settings) -> float:
        """T of the root: what the consumer waits for one element."""
        return self.output_times(settings)[self.root]

    def output_times(self, settings: Settings) -> dict[str, float]:
        consumers, times = self._consumer_times(settings), dict[str, float]()
        for name in reversed(self.order):
            each = self.operators[name]
            inputs = [times[i] for i in each.inputs]
            times[name] = self._output(each, inputs, consumers[name], settings.get(name, 1.0))
        return times

    def _output(self, each: Operator, inputs: list[float], x: float, setting: float) -> float:
        y = each.ratio * sum(inputs)
        if each.way == "sync":
            return each.self_ns + y
        if each.way == "prefetch":
            return each.self_ns + wait_ns(y, x, setting)
        if each.way == "interleave":
            y = each.taken() * sum(inputs) / setting
            return each.self_ns / setting + wait_ns(y, x, setting)
        return each.self_ns / setting + wait_ns(y, x, setting / max(each.ratio, 1e-12))

    def _consumer_times(self, settings: Settings) -> dict[str, float]:
        """x of every operator: the time between two requests of its consumer."""
        found = {self.root: self.consumer_ns}
        for name in self.order:
            each = self.operators[name]
            lanes = settings[name] if each.way in ("parallel", "interleave") else 1.0
            busy = each.self_ns / lanes if self.downward == "pipeline" else 0.0
            if each.way != "sync":
                found[name] += busy
            inherited = found[name] + (busy if each.way == "sync" else 0.0)
            for child in each.inputs:
                # Each of the inputs that an interleave reads at once is asked less often.
                share = lanes if each.way == "interleave" else 1 / max(each.ratio, 1e-12)
                found[child] = inherited * share
        return found

    def processing_ns(self) -> float:
        """C of the root: the whole work behind one element, on one core."""
        times = dict[str, float]()
        for name in reversed(self.order):
            each = self.operators[name]
            inputs = sum(times[i] for i in each.inputs)
            times[name] = each.self_ns + each.taken() * inputs
        return times[self.root]

    def buffered_bytes(self, settings: Settings) -> float:
        """The most that the buffers of all asynchronous operators hold."""
        return sum(
            settings[o.name] * (1.0 if o.way == "prefetch" else 1 / max(o.ratio, 1e-12))
            * o.element_bytes
            for o in self.tunable()
        )  # fmt: skip

    def stages(self) -> dict[str, list[tuple[str, float]]]:
        """Operators that one thread runs together, by the asynchronous one (or root) they end in.

        Each comes with its visits: elements it makes per element of the root.
        """
        found = dict[str, list[tuple[str, float]]]()
        visits, owner = {self.root: 1.0}, {self.root: self.root}
        for name in self.order:
            each = self.operators[name]
            found.setdefault(owner[name], []).append((name, visits[name]))
            for child in each.inputs:
                visits[child] = visits[name] * each.taken()
                crosses = self.operators[child].way in ("parallel", "interleave")
                owner[child] = child if crosses or each.way == "prefetch" else owner[name]
        return found
