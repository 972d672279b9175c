"""The kernels' own layouts of the operands, made once when a delta is attached.

N outputs, K inputs, P planes, I tiles along K, L lanes, R rank or stored rows.

The order of the inputs does not change a sum, so a word holds the codes of eight inputs that
lie L apart: after one shift and mask a tile of words is a tile of codes for L *neighbouring*
inputs, in the registers where the tensor cores want it. Every packed byte is loaded once and
nothing unpacked passes through shared memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch.nn.functional import pad

from deltaserve.artifact.codecs.base import Encoded, matrix_shape
from deltaserve.artifact.codecs.nm24 import INDEX_BITS, kept_columns
from deltaserve.artifact.codecs.quantise import SCALE_DTYPE
from deltaserve.artifact.packing import CODES_PER_WORD, unpack_bits

# By bits. A step of the tensor cores spans 16 inputs; more lanes are longer loads, but a row of a
# tile should not pass 128 bytes or the registers run out.
LANES = {1: (64, 32, 16), 2: (64, 32, 16), 4: (32, 16)}
# nm24: inputs in a quad, quads in a word, and their lanes.
QUAD = 4
QUADS_PER_WORD = 4
NM24_LANES = 16
RANK_BLOCKS = (16, 32, 64)
# Columns of the address table. Packed: words, scales, places of the kept or listed outputs, N,
# planes, steps per group; low rank: v, u, N, ranks of all parts, of one part, where the first and
# the second part end; rows: values, listed outputs, count.
FIELDS = 8
MAX_PARTS = 3
# Of one of the parts: a grid has 65535 programs along its second axis, of at least 64 outputs or 16
# inputs each, and kernels count words of eight weights in 32 bits.
MAX_OUTPUTS = 65535 * 64 // MAX_PARTS
MAX_INPUTS = 65535 * 16
MAX_WEIGHTS = 8 * 2**31 // MAX_PARTS
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_STORED_BITS = (1, 2, 3, 4, 8)


@dataclass(frozen=True)
class Kind:
    """Operands of one kind share a kernel specialisation, and so a launch.

    codec: int, nm24, lowrank, rows. bits of a code. lanes: neighbouring inputs in one step.
    run: steps that share a scale. indexed: the outputs are listed. block: ranks per program.
    """

    codec: str
    bits: int = 0
    lanes: int = 0
    run: int = 0
    indexed: bool = False
    block: int = 0


@dataclass(frozen=True, eq=False)
class Operand:
    """One delta's weight in one layer, laid out.

    fields: its row of the address table, see ``FIELDS``; the first are the addresses of parts.
    scale: a factor of the whole. num_outputs: N, or the stored rows. enc: shape and settings,
    without tensors. ranks: of each low-rank factor pair, and its number of outputs.
    """

    kind: Kind
    fields: tuple[int, ...]
    parts: tuple[torch.Tensor, ...]
    num_outputs: int
    enc: Encoded
    scale: float = 1.0
    ranks: tuple[tuple[int, int], ...] = ()

    def moved(self, put: Callable[[torch.Tensor], torch.Tensor]) -> Operand:
        """The same with its parts elsewhere, where ``put`` copies them."""
        parts = tuple(put(part) for part in self.parts)
        fields = (*(part.data_ptr() for part in parts), *self.fields[len(parts) :])
        return replace(self, parts=parts, fields=fields)


def refusal(enc: Encoded, dtype: torch.dtype) -> str | None:
    """Why no kernel takes this operand with activations of ``dtype``; None if one does."""
    if too_large := _size_refusal(enc):
        return too_large
    if enc.codec == "int":
        return _int_refusal(enc.params)
    if enc.codec == "nm24":
        if enc.params["bits"] not in (2, 4):
            return f"{enc.params['bits']} bits"
        group = enc.params["group_size"]
        return f"group size {group}" if group % (NM24_LANES * QUAD) else None
    if enc.codec == "lowrank" and enc.params.get("bits"):
        return "quantised factors"
    if enc.codec in ("lowrank", "rows"):
        floats = [t for t in enc.tensors.values() if t.is_floating_point()]
        if enc.codec == "rows" and enc.params["bits"]:
            return _int_refusal({**enc.params, "scale_axis": "group"})
        other = [t.dtype for t in floats if t.dtype != dtype]
        return f"operand is {other[0]}, activations are {dtype}" if other else None
    return f"codec {enc.codec}"


def _size_refusal(enc: Encoded) -> str | None:
    outputs, inputs = matrix_shape(enc.shape)
    if outputs > MAX_OUTPUTS or inputs > MAX_INPUTS:
        return f"more than {MAX_OUTPUTS} outputs or {MAX_INPUTS} inputs"
    planes = enc.params.get("planes", 1)
    if outputs * inputs * planes > MAX_WEIGHTS:
        return f"more than {MAX_WEIGHTS} weights in {planes} plane(s)"
    return None


def _int_refusal(params: dict[str, object]) -> str | None:
    if params["bits"] not in _STORED_BITS:
        return f"{params['bits']} bits"
    if not params["symmetric"]:
        return "asymmetric codes"
    if params["scale_axis"] == "column":
        return "scales per column"
    group = params["group_size"] if params["scale_axis"] == "group" else 0
    assert isinstance(group, int)
    return f"group size {group}" if group % 16 else None


def joinable(encs: Sequence[Encoded]) -> bool:
    """Whether operands that share their input can be one, their outputs side by side."""
    codecs = {enc.codec for enc in encs}
    if len(encs) < 2 or len(encs) > MAX_PARTS or len(codecs) > 1 or codecs & {"rows", "raw"}:
        return False
    if codecs == {"lowrank"}:
        return len({enc.params.get("scale", 1.0) for enc in encs}) == 1
    return all(enc.params == encs[0].params for enc in encs)


def lay_out(*encs: Encoded) -> Operand:
    """The operand of ``encs``, on the device of their tensors. ``refusal`` must have been None.

    Several must be ``joinable``: weights of one input, side by side as one.
    """
    if encs[0].codec == "lowrank":
        return _lowrank(encs)
    enc = encs[0] if len(encs) == 1 else _joined(encs)
    if enc.codec == "nm24":
        return _nm24(enc)
    if enc.codec == "int":
        return _int(enc, enc, None)
    if enc.params["bits"]:
        stored = (enc.params["rows"], *enc.shape[1:])
        params = {**enc.params, "scale_axis": "group", "planes": 1}
        return _int(replace(enc, params=params, shape=stored), enc, enc.tensors["index"])
    return _rows(enc)


def _int(inner: Encoded, enc: Encoded, index_R: torch.Tensor | None) -> Operand:
    """words [P, I, N, L]; scales bf16 [P, G, N]; then the outputs' places where they are listed."""
    rows, columns = matrix_shape(inner.shape)
    codes, scales, bits = _in_words(inner, columns)
    planes = len(codes)
    group = inner.params["group_size"] if inner.params["scale_axis"] == "group" else 0
    lanes = next(width for width in LANES[bits] if group % width == 0)
    width = lanes * CODES_PER_WORD
    tiles = -(-columns // width)
    codes = pad(codes, (0, tiles * width - columns)).view(
        planes, rows, tiles, CODES_PER_WORD, lanes
    )
    words = _merge(codes.transpose(-1, -2), bits).transpose(1, 2).contiguous()
    run, steps, groups = _scale_run(group // lanes, CODES_PER_WORD, tiles)
    scales = _scales_by_group(scales, rows, groups)
    kind = Kind("int", bits, lanes, run, indexed=index_R is not None)
    listed = [] if index_R is None else [index_R.contiguous()]
    index_address = listed[0].data_ptr() if listed else 0
    fields = (words.data_ptr(), scales.data_ptr(), index_address, rows, planes, steps)
    parts = (words, scales, *listed)
    return Operand(kind, fields, parts, rows, replace(enc, tensors={}))


def _in_words(enc: Encoded, columns: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Codes uint8 [P, N, K], scales [P, ...] and bits of what is stored, at 1, 2 or 4 bits.

    The same numbers: ``(q - 3.5) s`` of 3 bits is ``(q + 4 - 7.5) s`` of 4, and ``(q - 127.5) s``
    of 8 bits is ``(high - 7.5) 16 s + (low - 7.5) s``.
    """
    bits, scales = enc.params["bits"], enc.tensors["scales"]
    codes = unpack_bits(enc.tensors["codes"], bits, columns)
    if bits == 3:
        return codes + 4, scales, 4
    if bits == 8:
        return torch.cat([codes >> 4, codes & 15]), torch.cat([16 * scales, scales]), 4
    return codes, scales, bits


def _nm24(enc: Encoded) -> Operand:
    """words [I, N, L] of a lane's kept codes; scales bf16 [G, N]; places int16 [I, N, L]."""
    rows, columns = matrix_shape(enc.shape)
    bits, kept = enc.params["bits"], kept_columns(columns)
    width = NM24_LANES * QUADS_PER_WORD * 2
    tiles = -(-kept // width)

    def by_lane(packed: torch.Tensor, bits: int) -> torch.Tensor:
        """Words of the kept values of a lane's quads, which lie L quads apart."""
        values = pad(unpack_bits(packed, bits, kept), (0, tiles * width - kept))
        quads = values.view(rows, tiles, QUADS_PER_WORD, NM24_LANES, 2).transpose(2, 3)
        return _merge(quads.flatten(3), bits).transpose(0, 1).contiguous()

    words, places = by_lane(enc.tensors["codes"], bits), by_lane(enc.tensors["index"], INDEX_BITS)
    group = enc.params["group_size"] // (NM24_LANES * QUAD)
    run, steps, groups = _scale_run(group, QUADS_PER_WORD, tiles)
    scales = _scales_by_group(enc.tensors["scales"][None], rows, groups)
    fields = (words.data_ptr(), scales.data_ptr(), places.data_ptr(), rows, 1, steps)
    kind = Kind("nm24", bits, NM24_LANES, run)
    return Operand(kind, fields, (words, scales, places), rows, replace(enc, tensors={}))


def _joined(encs: Sequence[Encoded]) -> Encoded:
    """``int`` or ``nm24`` matrices with the same settings as one."""
    rows = [matrix_shape(enc.shape)[0] for enc in encs]
    params, tensors = dict(encs[0].params), {}
    for name in encs[0].tensors:
        parts = [enc.tensors[name] for enc in encs]
        if name == "scales":  # one of the whole matrix becomes one of each row
            parts = [
                part.expand(*part.shape[:-2], count, -1)
                for part, count in zip(parts, rows, strict=True)
            ]
        tensors[name] = torch.cat(parts, dim=-2)
    if params.get("scale_axis") == "tensor":
        params["scale_axis"] = "row"
    return replace(encs[0], params=params, shape=(sum(rows), encs[0].shape[1]), tensors=tensors)


def _lowrank(encs: Sequence[Encoded]) -> Operand:
    """v [parts * R, K] and u [N, R], R padded with zeros to whole blocks, the same for all."""
    ranks = [enc.tensors["u"].shape[1] for enc in encs]
    block = next((size for size in RANK_BLOCKS if max(ranks) <= size), RANK_BLOCKS[-1])
    rank = -(-max(ranks) // block) * block
    gaps = [rank - own for own in ranks]
    v = torch.cat([pad(e.tensors["v"], (0, 0, 0, gap)) for e, gap in zip(encs, gaps, strict=True)])
    u = torch.cat([pad(e.tensors["u"], (0, gap)) for e, gap in zip(encs, gaps, strict=True)])
    ends = list(accumulate(len(enc.tensors["u"]) for enc in encs))
    ends += [len(u)] * (MAX_PARTS - len(ends))
    fields = (v.data_ptr(), u.data_ptr(), len(u), len(v), rank, *ends[:2])
    enc = replace(encs[0], shape=(len(u), encs[0].shape[1]), tensors={})
    own = tuple((r, len(e.tensors["u"])) for r, e in zip(ranks, encs, strict=True))
    scale = float(enc.params.get("scale", 1.0))
    return Operand(Kind("lowrank", block=block), fields, (v, u), len(u), enc, scale, own)


def _rows(enc: Encoded) -> Operand:
    """values [R, K] and the outputs' places [R], as stored."""
    values, index = enc.tensors["values"].contiguous(), enc.tensors["index"].contiguous()
    fields = (values.data_ptr(), index.data_ptr(), len(index))
    return Operand(Kind("rows"), fields, (values, index), len(index), replace(enc, tensors={}))


def _merge(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [..., M] -> [...] words of M codes, lowest bits first."""
    count = codes.shape[-1]
    # The sign bit is an ordinary bit here.
    word = torch.zeros(codes.shape[:-1], dtype=torch.int32, device=codes.device)
    for i in range(count):
        word |= codes[..., i].to(torch.int32) << (bits * i)
    return word.to(_WORDS[bits * count // CODES_PER_WORD])


def _scale_run(group: int, tile: int, tiles: int) -> tuple[int, int, int]:
    """(steps of a tile that share a scale, steps of a group, groups), all counted in steps.

    group: 0 means that the whole row shares its scale.
    """
    steps = group or tiles * tile
    return math.gcd(steps, tile), steps, -(-tiles * tile // steps)


def _scales_by_group(scales: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """[P, N or 1, G or 1] -> bf16 [P, groups, N]: neighbouring outputs are read together."""
    planes, _, stored = scales.shape
    # They may have been cast with the rest of an operand; all of them were made as bfloat16.
    wide = scales.to(SCALE_DTYPE).expand(planes, rows, stored).transpose(1, 2)
    return pad(wide, (0, 0, 0, groups - stored)).contiguous()
