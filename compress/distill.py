"""Scale distillation: the scales of a finished delta fitted to the fine-tune's logits.

Codes stay; scales are trained by Adam on the squared difference of the logits (BitDelta, Liu et
al., NeurIPS 2024; with scales per row or column: per-axis weight deltas, 2025). This is the one
method that looks at the whole model at once, and the one that holds it in memory, in float32.

B sequences of T tokens, V the vocabulary, P planes, N outputs, K inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.func import functional_call

from deltaserve.artifact.checkpoint import HEAD
from deltaserve.artifact.codecs.base import Encoded, matrix_shape
from deltaserve.artifact.codecs.int import IntParams
from deltaserve.artifact.codecs.quantise import LARGEST_SCALE, SCALE_DTYPE, expand
from deltaserve.artifact.packing import unpack_bits
from deltaserve.compress.calibrate import Changes, Pair
from deltaserve.compress.change import Change
from deltaserve.compress.errors import relative_error
from deltaserve.compress.models import load_fine_tune
from deltaserve.compress.text import batches
from deltaserve.compress.weights import of_changes

# BitDelta's: sequences in a batch, learning rate, relative here because scales differ in size.
BATCH, RATE = 4, 0.02


class Scaled:
    """A parameter whose scales are trained: base + levels * scales * exp(step)."""

    def __init__(self, enc: Encoded, base: torch.Tensor, device: str) -> None:
        self.enc, self._grid = enc, IntParams(**enc.params).grid
        _, self._columns = matrix_shape(enc.shape)
        codes_PNK = unpack_bits(enc.tensors["codes"], self._grid.bits, self._columns)
        self._levels_PNK = (codes_PNK.float() - self._grid.top / 2).to(device)
        self._scales = enc.tensors["scales"].float().to(device)
        self._base = base.float().to(device)
        self.step = torch.zeros_like(self._scales, requires_grad=True)

    def weight(self) -> torch.Tensor:
        """As base + delta has it, differentiable in ``step``."""
        scales = self._scales * self.step.exp()
        total = self._base
        for levels_NK, plane in zip(self._levels_PNK, scales, strict=True):
            wide, _ = expand(plane, None, slice(None), self._columns, self._grid)
            total = total + (levels_NK * wide).view(self.enc.shape)
        return total

    def finished(self) -> Encoded:
        """With the trained scales, as they are stored."""
        scales = (self._scales * self.step.detach().exp()).clamp(max=LARGEST_SCALE)
        tensors = {**self.enc.tensors, "scales": scales.to(SCALE_DTYPE).cpu()}
        return replace(self.enc, tensors=tensors)


def distilled(pair: Pair, changes: Changes, stage: str, steps: int) -> Changes:
    """The same changes with other scales; a killed run begins the distillation again."""
    name = f"{stage}/distilled"

    def train() -> list[Change]:
        found = list(changes())
        trained = _train(pair, found, steps)
        return [_with(pair, c, trained[c.name]) if c.name in trained else c for c in found]

    pair.work.changes(name, train)
    return lambda: iter(pair.work.changes(name, list))


def _with(pair: Pair, change: Change, scaled: Scaled) -> Change:
    enc = scaled.finished()
    tensors = pair.model.tensor(change.name), pair.base.tensor(change.name)
    return replace(change, enc=enc, error=relative_error(enc, *tensors))


def _train(pair: Pair, changes: list[Change], steps: int) -> dict[str, Scaled]:
    teacher = load_fine_tune(pair.base, pair.model, pair.device).float()
    parameters = {name: value.detach() for name, value in teacher.named_parameters()}
    source = of_changes(pair.base, changes)
    fixed = {
        name: source(name).to(pair.device)
        for name in parameters
        if name != HEAD or not pair.model.tied
    }
    trained = {
        c.name: Scaled(c.enc, pair.base.tensor(c.name), pair.device)
        for c in changes
        if c.enc is not None and c.enc.codec == "int" and _trainable(pair, c)
    }
    if not trained:
        return {}
    optimiser = torch.optim.Adam([each.step for each in trained.values()], lr=RATE)
    data = _endless(pair)
    for number in range(steps):
        ids_BT, real_BT = next(data)
        with torch.no_grad():
            wanted_BTV = teacher(input_ids=ids_BT, use_cache=False).logits
        weights = {**fixed, **{name: each.weight() for name, each in trained.items()}}
        logits_BTV = functional_call(
            teacher, weights, kwargs={"input_ids": ids_BT, "use_cache": False}, tie_weights=True
        ).logits
        loss = (logits_BTV - wanted_BTV)[real_BT].square().mean()
        for group in optimiser.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * number / steps))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        pair.report("distil", number + 1, steps)
    return trained


def _trainable(pair: Pair, change: Change) -> bool:
    enc = change.enc
    assert enc is not None
    same_shape = enc.shape == pair.base.shape(change.name)
    return enc.params["symmetric"] and same_shape and change.kind == "linear"


def _endless(pair: Pair) -> Iterator[tuple[Any, torch.Tensor]]:
    """Batches of the calibration text in random order, again and again."""
    every = list(batches(pair.fit.samples, BATCH))
    generator = torch.Generator().manual_seed(pair.fit.seed)
    while True:
        for place in torch.randperm(len(every), generator=generator).tolist():
            ids_BT, lengths = every[place]
            real_BT = torch.arange(ids_BT.shape[1]) < torch.tensor(lengths)[:, None]
            yield ids_BT.to(pair.device), real_BT.to(pair.device)
