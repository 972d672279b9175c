"""What a layer is given of a delta: stored parameters, and where among its outputs they belong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch

from deltaserve.artifact.codecs.base import Encoded
from deltaserve.artifact.manifest import TensorEntry
from deltaserve.kernels.delta_matmul import GroupedDeltas, LaidOut, int4, joinable


@dataclass(frozen=True, eq=False)
class Piece:
    """A stored parameter that changes a layer's outputs from ``start`` on."""

    start: int
    operand: Encoded | LaidOut

    @property
    def enc(self) -> Encoded:
        return self.operand.enc if isinstance(self.operand, LaidOut) else self.operand

    @property
    def values(self) -> torch.Tensor:
        """Of a parameter that is kept as it is."""
        return self.enc.tensors["values"]

    @property
    def laid_out(self) -> bool:
        """For a kernel."""
        return isinstance(self.operand, LaidOut)

    @property
    def tensors(self) -> Iterable[torch.Tensor]:
        operand = self.operand
        return operand.parts if isinstance(operand, LaidOut) else operand.tensors.values()

    def moved(self, put: Callable[[torch.Tensor], torch.Tensor]) -> Piece:
        """The same with its tensors where ``put`` copies them."""
        operand = self.operand
        if isinstance(operand, LaidOut):
            return Piece(self.start, operand.moved(put))
        tensors = {name: put(tensor) for name, tensor in operand.tensors.items()}
        return Piece(self.start, replace(operand, tensors=tensors))

    @cached_property
    def outputs(self) -> slice:
        return slice(self.start, self.start + self.enc.shape[0])


Pieces = tuple[Piece, ...]


def join(pieces: Pieces, dtype: torch.dtype) -> Pieces:
    """On a CPU: whole weights of neighbouring outputs as one, and ``int`` as its operator reads it.

    pieces: of one layer, by ``start``.
    """
    encs = [piece.enc for piece in pieces]
    packs = [int4.supports(enc) and int4.loses_nothing(enc.dtype, dtype) for enc in encs]
    if _adjacent(pieces) and all(packs) and int4.fusable(encs):
        return tuple(Piece(pieces[0].start, enc) for enc in int4.pack(encs))
    if _adjacent(pieces) and all(enc.codec == "raw" for enc in encs):
        values = pieces[0].values
        if len(pieces) > 1:
            values = torch.cat([piece.values for piece in pieces])
        whole = replace(encs[0], shape=tuple(values.shape), tensors={"values": values})
        return (Piece(pieces[0].start, whole),)
    return tuple(
        Piece(piece.start, enc)
        for piece, packed in zip(pieces, packs, strict=True)
        for enc in (int4.pack([piece.enc]) if packed else [piece.enc])
    )


def for_kernels(pieces: Pieces, grouped: GroupedDeltas) -> Pieces:
    """On a GPU: whole weights of neighbouring outputs as one operand, so that one launch serves
    them; what no kernel takes stays as it is."""
    encs = [piece.enc for piece in pieces]
    if len(pieces) > 1 and _adjacent(pieces) and joinable(encs):
        operand = grouped.prepare(*encs)
        if operand is not None:
            return (Piece(pieces[0].start, operand),)
    return tuple(Piece(p.start, grouped.prepare(p.enc) or p.enc) for p in pieces)


def packed_bytes(
    starts: Sequence[int], entries: Sequence[TensorEntry], dtype: torch.dtype
) -> tuple[int, list[int]]:
    """Size of what ``join`` packs anew, and which of the entries it leaves as they are."""
    ends = [start + entry.shape[0] for start, entry in zip(starts, entries, strict=True)]
    packs = [int4.supports(e) and int4.loses_nothing(e.torch_dtype, dtype) for e in entries]
    if list(starts[1:]) == ends[:-1] and all(packs) and int4.fusable(entries):
        return int4.packed_bytes(entries), []
    left = [i for i, packed in enumerate(packs) if not packed]
    packed = [entry for i, entry in enumerate(entries) if i not in left]
    return sum(int4.packed_bytes([entry]) for entry in packed), left


def _adjacent(pieces: Pieces) -> bool:
    return all(a.outputs.stop == b.start for a, b in pairwise(pieces))
