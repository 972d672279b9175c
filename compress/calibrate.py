"""Compressing layer by layer, each projection quantised for the inputs that it will really see.

A layer reads activations that the layers before it, already reconstructed, have made, and
within it projections follow one another in the order of their use, those that share an input
together (DeltaZip, Yao et al., EuroSys 2025): later ones mend what earlier ones lost.
In memory: one decoder layer of each model, one Hessian, and the activations of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import torch

from deltaserve.artifact.checkpoint import HEAD, Checkpoint
from deltaserve.compress.change import Change, compare, same
from deltaserve.compress.common import Progress
from deltaserve.compress.hessian import Hessian
from deltaserve.compress.layers import LayerWalk
from deltaserve.compress.plan import Plan
from deltaserve.compress.text import Text
from deltaserve.compress.weights import Table, reconstruct
from deltaserve.compress.work import Work
from deltaserve.errors import CheckpointError

NORM = "model.norm.weight"
# Can be gone through more than once.
Changes = Callable[[], Iterator[Change]]


@dataclass(frozen=True)
class Pair:
    """What is compressed, with what text, and where the run keeps what it has done.

    names: the parameters of both, sorted.
    """

    base: Checkpoint
    model: Checkpoint
    names: list[str]
    fit: Text
    device: str
    work: Work
    report: Progress

    @property
    def embedding(self) -> str:
        """Raises CheckpointError for a model without one of a known name."""
        if self.model.embedding is None:
            raise CheckpointError(
                f"{self.model.name} has no embedding of a known name to calibrate with"
            )
        return self.model.embedding

    def of_layer(self, layer: int) -> list[str]:
        prefix = LayerWalk.prefix(layer)
        return [name for name in self.names if name.startswith(prefix)]

    def outside(self, layers: int) -> list[str]:
        """What belongs to no layer, without the embedding; the final norm first."""
        inside = {name for layer in range(layers) for name in self.of_layer(layer)}
        rest = set(self.names) - inside - {self.embedding}
        return sorted(rest, key=lambda name: (name != NORM, name))

    def weights(self, names: list[str]) -> dict[str, torch.Tensor]:
        """The fine-tune's."""
        return {name: self.model.tensor(name).float() for name in names}

    def rebuilt(self, change: Change) -> torch.Tensor:
        """The parameter as base + delta has it, float32."""
        base = self.base.tensor(change.name)
        return base.float() if change.enc is None else reconstruct(change.enc, base)


def calibrated_changes(pair: Pair, plan: Plan, stage: str) -> Generator[None, None, Changes]:
    """Every parameter of the pair; yields after each layer. stage: name of this attempt."""
    work, embedding = pair.work, pair.embedding

    def first() -> list[Change]:
        return [compare(embedding, pair.base, pair.model, plan)]

    [change] = work.changes(f"{stage}/embedding", first)
    walk = LayerWalk(
        pair.model,
        [pair.fit.samples],
        Table(change.enc, pair.base.tensor(embedding)),
        work.folder(f"{stage}/in"),
        pair.device,
    )
    files = [f"{stage}/embedding"]
    for layer in range(len(walk)):
        files.append(f"{stage}/layer-{layer:05d}")
        if not walk.ahead(layer):
            changes = work.changes(files[-1], lambda: _layer(pair, plan, walk, layer))  # noqa: B023
            walk.advance(layer, {c.name: pair.rebuilt(c) for c in changes})
        walk.hidden.drop(layer)
        pair.report("compress", layer + 1, len(walk))
        yield
    files.append(f"{stage}/rest")
    work.changes(files[-1], lambda: _rest(pair, plan, walk))
    return lambda: (change for file in files for change in work.changes(file, list))


def _layer(pair: Pair, plan: Plan, walk: LayerWalk, layer: int) -> list[Change]:
    names = pair.of_layer(layer)
    weights = pair.weights(names)
    groups = walk.groups(layer, weights)
    projections = {name for group in groups for name in group}
    found = {}

    def settle(name: str, hessian: Hessian | None = None) -> None:
        found[name] = compare(name, pair.base, pair.model, plan, hessian)
        weights[name] = pair.rebuilt(found[name])

    for name in names:
        if name not in projections:
            settle(name)
    for group in groups:
        hessian = None
        if any(_moved(pair, name) for name in group):
            hessian = inputs_of(walk, layer, weights, group[0])
        for name in group:
            settle(name, hessian)
    return [found[name] for name in names]


def inputs_of(
    walk: LayerWalk, layer: int, weights: dict[str, torch.Tensor], projection: str
) -> Hessian:
    """Second moments of what a projection reads."""
    found: list[Hessian] = []

    def watch(name: str, x_TK: torch.Tensor) -> None:
        if name == projection:
            if not found:
                found.append(Hessian(x_TK.shape[-1], x_TK.device))
            found[0].add(x_TK)

    walk.observe(layer, weights, watch)
    return found[0]


def _rest(pair: Pair, plan: Plan, walk: LayerWalk) -> list[Change]:
    """Final norm, then the head, whose inputs come out of it, and whatever else there is."""
    changes, norm = [], None
    for name in pair.outside(len(walk)):
        hessian = None
        tied = pair.base.tied or pair.model.tied
        if name == HEAD and norm is not None and not tied and _moved(pair, name):
            hessian = Hessian(norm.shape[0], walk.device)
            with torch.inference_mode():
                for number in range(len(walk.batches)):
                    hessian.add(walk.final(number, norm))
        changes.append(compare(name, pair.base, pair.model, plan, hessian))
        if name == NORM:
            norm = pair.rebuilt(changes[-1])
    return changes


def _moved(pair: Pair, name: str) -> bool:
    return not same(pair.model.tensor(name), pair.base.tensor(name))
