"""Where a cache pays: as near to the root as is legal and fits.

Never above a random operator (every epoch would see the same draw), nor above one that declares
itself not deterministic or repeats without end; sizes are estimated from a sample of rows, or
from the elements that a trace saw (Plumber, MLSys 2022, section 4.4). On a chain the legal
operator nearest the root that fits is best; where streams join, every set of caches that do not
lie below one another is a candidate and the one that saves most CPU time wins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from deltaserve.pipeline.tuning.rates import Demand

FREE_SHARE = 0.9


@dataclass(frozen=True)
class Place:
    """A candidate: whether it may be cached (``why`` if not), the bytes it would hold and the
    seconds of CPU and of waiting that it saves per element of the root."""

    name: str
    legal: bool
    bytes: float
    saved_s: float
    why: str = ""


@dataclass(frozen=True)
class Nature:
    """What the plan declares of an operator; rows: of a source, if known. bytes: of a cache behind
    it, if known; else they follow from the elements that a trace saw."""

    inputs: tuple[str, ...] = ()
    random: bool = False
    deterministic: bool = True
    endless: bool = False
    reorders: bool = False
    rows: int | None = None
    bytes: float | None = None


def places(
    found: Mapping[str, Demand],
    natures: Mapping[str, Nature],
    read_s: Callable[[float], float] = lambda size: size / 1e9,
) -> dict[str, Place]:
    """Every operator as a place for a cache behind it. read_s: seconds to read so many bytes
    from the cache, which it must beat."""
    made: dict[str, Place] = {}
    below: dict[str, float] = {}
    for name in _upwards(natures):
        nature, demand = natures[name], found[name]
        own = demand.cpu_s + demand.waited_s
        below[name] = own + sum(below[i] for i in nature.inputs)
        why = _reason(name, natures)
        size = nature.bytes
        if size is None:
            size = _elements(name, found, natures) * demand.element_bytes
        saved = below[name] - read_s(demand.element_bytes * demand.visits)
        made[name] = Place(name, not why, size, saved, why)
    return made


def place(
    found: Mapping[str, Demand],
    natures: Mapping[str, Nature],
    memory: float,
    read_s: Callable[[float], float] = lambda size: size / 1e9,
) -> list[Place]:
    """The caches to put in (none where nothing legal fits or pays); together they take at most
    0.9 of ``memory``, the free bytes."""
    every = places(found, natures, read_s)
    root = list(_upwards(natures))[-1]
    best: tuple[float, list[Place]] = (0.0, [])
    for chosen in _antichains(root, every, natures):
        if sum(each.bytes for each in chosen) > FREE_SHARE * memory:
            continue
        saved = sum(each.saved_s for each in chosen)
        if saved > best[0]:
            best = (saved, chosen)
    return best[1]


def _reason(name: str, natures: Mapping[str, Nature]) -> str:
    """Why nothing may be cached behind this operator; empty if it may."""
    nature = natures[name]
    if nature.random:
        return f"{name} is random"
    if not nature.deterministic:
        return f"{name} is not deterministic"
    if nature.endless:
        return f"{name} never ends"
    if nature.reorders:
        return f"{name} joins or reorders rows"
    for below in nature.inputs:
        if why := _reason(below, natures):
            return why
    return ""


def _elements(name: str, found: Mapping[str, Demand], natures: Mapping[str, Nature]) -> float:
    """Elements of one pass: rows of the sources, scaled by what the trace saw made of them."""
    nature = natures[name]
    if not nature.inputs:
        return float("inf") if nature.rows is None else float(nature.rows)
    taken = sum(found[i].visits for i in nature.inputs)
    rows = sum(_elements(i, found, natures) for i in nature.inputs)
    return rows * found[name].visits / taken if taken else 0.0


def _antichains(
    name: str, every: Mapping[str, Place], natures: Mapping[str, Nature]
) -> Iterator[list[Place]]:
    """Sets of legal places of which none lies below another, nearest the root first."""
    if every[name].legal and every[name].saved_s > 0:
        yield [every[name]]
    inputs = natures[name].inputs
    if not inputs:
        yield []
        return
    for parts in product(*(list(_antichains(i, every, natures)) for i in inputs)):
        yield [each for part in parts for each in part]


def _upwards(natures: Mapping[str, Nature]) -> Iterator[str]:
    """Inputs before those who read them."""
    done: set[str] = set()

    def visit(name: str) -> Iterator[str]:
        if name not in done:
            done.add(name)
            for below in natures[name].inputs:
                yield from visit(below)
            yield name

    for name in natures:
        yield from visit(name)
