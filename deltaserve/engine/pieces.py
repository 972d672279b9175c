"""What a layer is given of a delta: stored parameters, and where among its outputs they belong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress, pairwise
from operator import attrgetter
from typing import Any, cast

import torch

from deltaserve.artifact.codecs import CODECS
from deltaserve.artifact.codecs.base import Encoded
from deltaserve.artifact.codecs.lowrank import LowRankCodec
from deltaserve.artifact.codecs.sum import SumCodec
from deltaserve.artifact.manifest import TensorEntry
from deltaserve.kernels.delta_matmul import GroupedDeltas, LaidOut, int4, joinable


@dataclass(frozen=True, eq=False)
class Piece:
    """A stored parameter that changes a layer's outputs from ``start`` on."""

    start: int
    operand: Encoded | LaidOut

    @cached_property
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
Rest = Callable[[], None]


def no_rest() -> None:
    """Where nobody else needs the processor."""


def apart(enc: Encoded, dtype: torch.dtype) -> list[Encoded]:
    """What operators take: the terms of a sum each on its own, low-rank factors in ``dtype``."""
    if enc.codec == "sum":
        terms = cast(SumCodec, CODECS["sum"]).terms(enc)
        return [part for term in terms for part in apart(term, dtype)]
    if enc.codec == "lowrank" and (enc.params.get("bits") or enc.tensors["u"].dtype != dtype):
        u, v = cast(LowRankCodec, CODECS["lowrank"]).factors(enc)
        params = _without(enc.params, "bits")
        return [replace(enc, params=params, tensors={"u": u.to(dtype), "v": v.to(dtype)})]
    return [enc]


def entries_apart(entry: TensorEntry) -> list[TensorEntry]:
    """The same of what a manifest says: ``[entry]`` itself where nothing is taken apart."""
    if entry.codec == "sum":
        return [
            part
            for term in entry.params["terms"]
            for part in entries_apart(
                replace(entry, codec=term["codec"], params=_without(term, "codec"))
            )
        ]
    if entry.codec == "lowrank" and entry.params.get("bits"):
        return [replace(entry, params=_without(entry.params, "bits"))]
    return [entry]


def join(pieces: Pieces, dtype: torch.dtype, rest: Rest = no_rest) -> Pieces:
    """On a CPU: whole weights of neighbouring outputs as one, and ``int`` as its operator reads it.

    pieces: of one layer, by ``start``. rest: called between slices of the work.
    """
    packed = [p for p in pieces if _packs(p.enc, p.enc.dtype, dtype)]
    others = [p for p in pieces if not _packs(p.enc, p.enc.dtype, dtype)]
    encs = [piece.enc for piece in packed]
    if packed and _adjacent(packed) and int4.fusable(encs):
        packed = [Piece(packed[0].start, enc) for enc in int4.pack(encs, rest)]
    else:
        packed = [Piece(p.start, enc) for p in packed for enc in int4.pack([p.enc], rest)]
    if len(others) > 1 and _adjacent(others) and all(p.enc.codec == "raw" for p in others):
        values = torch.cat([piece.values for piece in others])
        whole = replace(others[0].enc, shape=tuple(values.shape), tensors={"values": values})
        others = [Piece(others[0].start, whole)]
    return tuple(sorted([*packed, *others], key=attrgetter("start")))


def for_kernels(pieces: Pieces, grouped: GroupedDeltas) -> Pieces:
    """On a GPU: whole weights of neighbouring outputs as one operand, so that one launch serves
    them; what no kernel takes stays as it is."""
    found = []
    for codec in dict.fromkeys(piece.enc.codec for piece in pieces):
        same = [piece for piece in pieces if piece.enc.codec == codec]
        encs = [piece.enc for piece in same]
        operand = None
        if len(same) > 1 and _adjacent(same) and joinable(encs):
            operand = grouped.prepare(*encs)
        if operand is not None:
            found.append(Piece(same[0].start, operand))
        else:
            found += [Piece(p.start, grouped.prepare(p.enc) or p.enc) for p in same]
    return tuple(sorted(found, key=attrgetter("start")))


def packed_bytes(
    starts: Sequence[int], entries: Sequence[TensorEntry], dtype: torch.dtype
) -> tuple[int, list[int]]:
    """Size of what ``join`` packs anew, and which of the entries it leaves as they are."""
    packs = [_packs(entry, entry.torch_dtype, dtype) for entry in entries]
    left = [i for i, packed in enumerate(packs) if not packed]
    packed = list(compress(entries, packs))
    begins = list(compress(starts, packs))
    ends = [start + entry.shape[0] for start, entry in zip(begins, packed, strict=True)]
    if packed and begins[1:] == ends[:-1] and int4.fusable(packed):
        return int4.packed_bytes(packed), left
    return sum(int4.packed_bytes([entry]) for entry in packed), left


def _packs(stored: int4.Stored, made_in: torch.dtype, dtype: torch.dtype) -> bool:
    return int4.supports(stored) and int4.loses_nothing(made_in, dtype)


def _adjacent(pieces: Sequence[Piece]) -> bool:
    return all(a.outputs.stop == b.start for a, b in pairwise(pieces))


def _without(params: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in params.items() if key != name}
