"""The parameters of a model one at a time, in float32: a fine-tune's, and those of base + delta."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from deltaserve.artifact.checkpoint import HEAD, Checkpoint
from deltaserve.artifact.codecs import get_codec
from deltaserve.artifact.codecs.base import Encoded, aligned
from deltaserve.artifact.reader import Delta
from deltaserve.compress.lora import Adapter

if TYPE_CHECKING:
    from deltaserve.compress.change import Change

# Parameter name -> float32 values. ``lm_head.weight`` always has some.
Source = Callable[[str], torch.Tensor]


def reconstruct(enc: Encoded, base: torch.Tensor | None) -> torch.Tensor:
    """The fine-tuned parameter in float32, additive codecs not rounded to its own dtype:
    that is how an engine applies them."""
    codec: Any = get_codec(enc.codec)
    if codec.additive:
        summed: torch.Tensor = codec.delta(enc).add_(aligned(base, enc.shape, torch.float32))
        return summed
    decoded: torch.Tensor = codec.decode(enc, base)
    return decoded.float()


def of_model(base: Checkpoint, model: Checkpoint | Adapter) -> Source:
    """Of a checkpoint, or of the base with an adapter added."""
    if isinstance(model, Checkpoint):
        return lambda name: model.tensor(name).float()
    targets = model.targets(base)
    changed = {target.parameter: target for target in targets}
    own_head = not base.tied or model.keeps_base_head(base, targets)

    def values(name: str) -> torch.Tensor:
        if name == HEAD and not own_head and base.embedding is not None and HEAD not in changed:
            name = base.embedding
        if name not in changed:
            return base.tensor(name).float()
        return reconstruct(model.encode(changed[name], base), base.tensor(name))

    return values


def of_delta(base: Checkpoint, delta: Delta) -> Source:
    """Of base + delta."""
    return _of_stored(base, set(delta.names()), delta.encoded)


def of_changes(base: Checkpoint, changes: Iterable[Change]) -> Source:
    """Of base + a delta on its way: what is stored stays mapped, nothing is decoded before use."""
    encs = {change.name: change.enc for change in changes if change.enc is not None}
    return _of_stored(base, set(encs), encs.__getitem__)


def _of_stored(base: Checkpoint, names: set[str], encoded: Callable[[str], Encoded]) -> Source:

    def values(name: str) -> torch.Tensor:
        if name == HEAD and HEAD not in names and base.tied and base.embedding is not None:
            name = base.embedding
        reference = base.tensor(name) if base.has(name) else None
        if name in names:
            return reconstruct(encoded(name), reference)
        assert reference is not None
        return reference.float()

    return values
