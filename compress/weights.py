"""The parameters of a model one at a time, in float32: a fine-tune's, and those of base + delta.

Embedding and head, which can be larger than many layers, also by rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from deltaserve.artifact.checkpoint import HEAD, Checkpoint
from deltaserve.artifact.codecs import get_codec
from deltaserve.artifact.codecs.base import Encoded, aligned
from deltaserve.artifact.reader import Delta
from deltaserve.compress.lora import Adapter
from deltaserve.kernels.delta_embedding import rows_of

if TYPE_CHECKING:
    from deltaserve.compress.change import Change

CHUNK = 1 << 20
"""Values of a table, and logits against it, that are in float32 at a time."""


def reconstruct(enc: Encoded, base: torch.Tensor | None) -> torch.Tensor:
    """The fine-tuned parameter in float32, additive codecs not rounded to its own dtype:
    that is how an engine applies them."""
    codec: Any = get_codec(enc.codec)
    if codec.additive:
        summed: torch.Tensor = codec.delta(enc).add_(aligned(base, enc.shape, torch.float32))
        return summed
    decoded: torch.Tensor = codec.decode(enc, base)
    return decoded.float()


class Table:
    """An embedding or head [V, D] that is never in float32 as a whole, unless it is small."""

    def __init__(self, enc: Encoded | None, base_VD: torch.Tensor | None) -> None:
        """enc None: the values are ``base_VD``."""
        assert base_VD is not None or enc is not None
        self._enc, self._base_VD = enc, base_VD
        self.shape = tuple(enc.shape if enc is not None else base_VD.shape)  # type: ignore[union-attr]

    def __len__(self) -> int:
        return int(self.shape[0])

    def rows(self, ids_T: torch.Tensor) -> torch.Tensor:
        """[T, D] float32."""
        if self._enc is None:
            assert self._base_VD is not None
            return self._base_VD[ids_T].float()
        return rows_of(ids_T, self._base_VD, self._enc)

    def blocks(self, tokens: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """All rows in their order, so many at a time that their values, and ``tokens`` logits
        of each, are at most ``CHUNK``: which rows, and they in float32."""
        step = max(1, CHUNK // max(tokens, self.shape[1]))
        for start in range(0, len(self), step):
            some = slice(start, min(start + step, len(self)))
            yield some, self._block(some)

    def _block(self, some: slice) -> torch.Tensor:
        if self._enc is None:
            assert self._base_VD is not None
            return self._base_VD[some].float()  # a view where it is float32 already
        if math.prod(self.shape) <= CHUNK:
            return self._whole[some]
        return self.rows(torch.arange(some.start, some.stop))

    @cached_property
    def _whole(self) -> torch.Tensor:
        return self.rows(torch.arange(len(self)))


class Source:
    """Parameter name -> float32 values. ``lm_head.weight`` always has some."""

    def __init__(self, find: Callable[[str], tuple[Encoded | None, torch.Tensor | None]]) -> None:
        """find: what is stored of a parameter, and the base's; or no change, and the values."""
        self._find = find

    def __call__(self, name: str) -> torch.Tensor:
        enc, base = self._find(name)
        if enc is not None:
            return reconstruct(enc, base)
        assert base is not None
        return base.float()

    def table(self, name: str) -> Table:
        """An embedding or head, by rows."""
        return Table(*self._find(name))


def of_model(base: Checkpoint, model: Checkpoint | Adapter) -> Source:
    """Of a checkpoint, or of the base with an adapter added."""
    if isinstance(model, Checkpoint):
        return Source(lambda name: (None, model.tensor(name)))
    targets = model.targets(base)
    changed = {target.parameter: target for target in targets}
    own_head = not base.tied or model.keeps_base_head(base, targets)

    def find(name: str) -> tuple[Encoded | None, torch.Tensor | None]:
        if name == HEAD and not own_head and base.embedding is not None and HEAD not in changed:
            name = base.embedding
        enc = model.encode(changed[name], base) if name in changed else None
        return enc, base.tensor(name)

    return Source(find)


def of_delta(base: Checkpoint, delta: Delta) -> Source:
    """Of base + delta."""
    return _of_stored(base, set(delta.names()), delta.encoded)


def of_changes(base: Checkpoint, changes: Iterable[Change]) -> Source:
    """Of base + a delta on its way: what is stored stays mapped, nothing is decoded before use."""
    encs = {change.name: change.enc for change in changes if change.enc is not None}
    return _of_stored(base, set(encs), encs.__getitem__)


def _of_stored(base: Checkpoint, names: set[str], encoded: Callable[[str], Encoded]) -> Source:

    def find(name: str) -> tuple[Encoded | None, torch.Tensor | None]:
        if name == HEAD and HEAD not in names and base.tied and base.embedding is not None:
            name = base.embedding
        reference = base.tensor(name) if base.has(name) else None
        return encoded(name) if name in names else None, reference

    return Source(find)
