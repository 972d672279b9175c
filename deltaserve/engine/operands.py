"""From an artifact to what the layers hold: which layer each parameter belongs to, and as what.

``Operands`` are made in a background thread and attached between two steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter
from typing import TypeGuard

import torch

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.artifact.codecs.base import Encoded
from deltaserve.artifact.manifest import TensorEntry
from deltaserve.artifact.reader import Delta
from deltaserve.engine.arena import Arena
from deltaserve.engine.embedding_layer import DeltaEmbedding
from deltaserve.engine.layers import MERGED, DeltaHead, DeltaLinear
from deltaserve.engine.norm_layer import DeltaNorm
from deltaserve.engine.pace import Pace
from deltaserve.engine.pieces import Piece, Pieces, entries_apart, packed_bytes
from deltaserve.engine.projections import DeltaModule, ProjectionPart, Wrapper, part_of
from deltaserve.engine.transfer import Arrival, Transfer
from deltaserve.errors import ArtifactError

HEAD = "lm_head"
MERGEABLE = ("int", "nm24", "nf4", "sparse", "sum")


@dataclass(frozen=True)
class Needs:
    """What a delta takes once it is in memory, known from its manifest alone.

    device_bytes: its operands. step_bytes: those that a step with a row of it reads, which are
    all but an embedding, which is read by the row. merged_bytes: its projections as base + delta,
    dense; 0 if none of them is packed. image_bytes: of what host memory keeps of it. vocab_size:
    of the fine-tune, which may have added tokens.
    """

    device_bytes: int
    step_bytes: int
    merged_bytes: int
    image_bytes: int
    vocab_size: int


@dataclass(frozen=True, eq=False)
class Binding:
    """One parameter of a layer, as the layer wants it. arrival: when it is on the device, unless
    it is there already."""

    layer: DeltaModule
    leaf: str
    pieces: Pieces
    arrival: Arrival | None = None


@dataclass(frozen=True, eq=False)
class Operands:
    """Everything that the layers hold of a delta. An operand of two layers counts once.

    arena: where it lies. In host memory, ``tensors`` are what a load needs of it.
    """

    bindings: tuple[Binding, ...]
    arena: Arena | None = None

    def attach(self, slot: int) -> Iterator[None]:
        """Give them to the layers, one with each ``next``: nothing is copied but norms."""
        for binding in self.bindings:
            binding.layer.expect(slot, binding.leaf, binding.arrival)
            binding.layer.attach(slot, binding.leaf, binding.pieces)
            yield

    def detach(self, slot: int) -> None:
        """Take them from the layers, and give back their memory."""
        for binding in self.bindings:
            binding.layer.detach(slot)
            if binding.arrival is not None and not binding.arrival.query():
                binding.arrival.wait()  # or the next to have this memory would be written over
        self.give_back()

    def give_back(self) -> None:
        if self.arena is not None:
            for tensor in self._by_address.values():
                self.arena.give_back(tensor)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return list(self._by_address.values())

    def detach_merged(self, slot: int) -> None:
        """Leave the packed ones that these were merged from."""
        for binding in self.bindings:
            assert isinstance(binding.layer, DeltaLinear), "only projections are merged"
            binding.layer.detach_merged(slot)

    @cached_property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def bytes_shared_with(self, tensors: Iterable[torch.Tensor]) -> int:
        """How many bytes of ``tensors`` are operands themselves."""
        return sum(t.nbytes for t in tensors if _address(t) in self._by_address)

    @cached_property
    def _by_address(self) -> dict[int, torch.Tensor]:
        tensors = (tensor for b in self.bindings for tensor in _tensors(b))
        return {_address(tensor): tensor for tensor in tensors if tensor.nbytes}


Image = Delta | Operands
"""What host memory keeps of a delta: the artifact, or operands as the device has them."""


class OperandMaker:
    """Knows the base and its layers; makes operands for them. Thread-safe."""

    def __init__(
        self,
        base: Checkpoint,
        modules: dict[str, Wrapper],
        vocab_size: int,
        dtype: torch.dtype,
        device: str,
        arena: Arena | None = None,
        pace: Pace | None = None,
    ) -> None:
        """pace: kept from layer to layer; at full speed unless given."""
        self.base = base
        self.modules = modules
        self.vocab_size = vocab_size
        self._dtype = dtype
        self._transfer = Transfer(device, arena)
        self._pace = pace or Pace()

    def needs(self, delta: Delta) -> Needs:
        """Raises ArtifactError for parameters that no layer of this base has, or not so."""
        tensors = delta.manifest.tensors
        total = step = merged = 0
        vocab_size = self.vocab_size
        counted: set[str] = set()  # an operand of two layers is in memory once
        for (layer, leaf), members in self._changes(delta, delta.names()).items():
            entries = [tensors[name] for name in members]
            whole = {name: tensors[name] for name in members.keys() - counted}
            size = 0
            if leaf == "weight" and isinstance(layer, DeltaLinear):
                size, kept = self._packed(layer, members, tensors)
                whole = {name: entry for name, entry in whole.items() if name in kept}
            size += sum(map(self._operand_bytes, whole.values()))
            counted |= whole.keys()
            total += size
            if not isinstance(layer, DeltaEmbedding):
                step += size
            if isinstance(layer, DeltaHead) and leaf == "weight":
                vocab_size = entries[0].shape[0]
            if _mergeable(layer, leaf, entries):
                merged += layer.merged_bytes(entries)
        image = sum(entry.bytes for entry in tensors.values()) if self.copies else total
        return Needs(total, step, merged, image, vocab_size)

    def _packed(
        self, layer: DeltaLinear, members: dict[str, int], tensors: Mapping[str, TensorEntry]
    ) -> tuple[int, set[str]]:
        """Size of what the layer makes anew of its weights, and which of them it keeps."""
        parts = [(n, start, e) for n, start in members.items() for e in entries_apart(tensors[n])]
        size = 0
        if layer.packs_on_cpu():
            starts, entries = [start for _, start, _ in parts], [entry for *_, entry in parts]
            size, left = packed_bytes(starts, entries, self._dtype)
            parts = [parts[i] for i in left]
        size += sum(self._operand_bytes(e) for name, _, e in parts if e is not tensors[name])
        return size, {name for name, _, entry in parts if entry is tensors[name]}

    def stage(self, delta: Delta) -> Image:
        """What host memory keeps of an artifact: on a CPU operands, for they would be made anew
        with each load, and the files are in the system's cache as they are."""
        return delta if self.copies else self.make(delta)

    def ready(self, image: Image) -> Operands | None:
        """Operands that lie where the layers read them."""
        return image if isinstance(image, Operands) and not self.copies else None

    def make(self, image: Image) -> Operands:
        """All of a delta, packed where its codecs are applied packed.

        What ``copy`` made is on its way when this returns, layer by layer; an artifact's is there.
        """
        if isinstance(image, Operands):
            return self.ready(image) or self._upload(image)
        return self._bind(image, image.names(), merge=False)

    @property
    def copies(self) -> bool:
        """Whether the device has a memory of its own, so that host memory gets copies."""
        return self._transfer.arena is not None

    def copy(self, operands: Operands) -> Operands:
        """The same in host memory, ready for ``make``; vectors first, then as a forward comes to
        them. The embedding is first of what is not a vector."""
        copies: dict[int, Piece] = {}
        bindings = []
        with self._transfer.stream():
            for binding in sorted(operands.bindings, key=lambda b: not _is_vector(b)):
                for piece in binding.pieces:
                    if id(piece) not in copies:
                        copies[id(piece)] = piece.moved(self._transfer.fetch)
                pieces = tuple(copies[id(piece)] for piece in binding.pieces)
                bindings.append(Binding(binding.layer, binding.leaf, pieces))
        return Operands(tuple(bindings))

    def _upload(self, copied: Operands) -> Operands:
        placed: dict[int, Piece] = {}
        bindings = []
        with self._transfer.stream(wait=False):
            for binding in copied.bindings:
                for piece in binding.pieces:
                    if id(piece) not in placed:
                        placed[id(piece)] = piece.moved(self._transfer.settle)
                pieces = tuple(placed[id(piece)] for piece in binding.pieces)
                arrival = self._transfer.arrival()
                bindings.append(Binding(binding.layer, binding.leaf, pieces, arrival))
            self._transfer.hand_over(t for b in bindings for t in _tensors(b))
        return Operands(tuple(bindings), self._transfer.arena)

    def merge(self, delta: Delta) -> Operands:
        """Its packed projections as base + delta, dense, rounded once to the engine's dtype.

        So one rounding differs from the packed computation, base's output + delta's output.
        """
        return self._bind(delta, delta.names(), merge=True)

    def _bind(self, delta: Delta, names: list[str], *, merge: bool) -> Operands:
        bindings: list[Binding] = []
        arena = None if merge else self._transfer.arena
        try:
            with self._transfer.stream():
                bindings += self._bindings(delta, names, merge)
                self._transfer.hand_over(t for b in bindings for t in _tensors(b))
        except BaseException:
            Operands(tuple(bindings), arena).give_back()
            raise
        return Operands(tuple(bindings), arena)

    def _bindings(self, delta: Delta, names: list[str], merge: bool) -> Iterator[Binding]:
        tensors = delta.manifest.tensors
        made: dict[str, Encoded] = {}  # an operand of two layers is made once
        placed: dict[str, Pieces] = {}  # and laid out once
        rest = self._pace.rest_merging if merge else self._pace.rest
        for (layer, leaf), members in self._changes(delta, names).items():
            if merge and not _mergeable(layer, leaf, [tensors[name] for name in members]):
                continue
            for name in members.keys() - made.keys():
                made[name] = self._operand(delta, name, merge)
                rest()
            kind, key = MERGED if merge else leaf, "+".join(members)
            if key not in placed or not all(p.laid_out for p in placed[key]):
                pieces = tuple(Piece(start, made[name]) for name, start in members.items())
                pieces = layer.prepare(kind, pieces, rest)
                placed[key] = pieces if merge else self._place(pieces)
            yield Binding(layer, kind, placed[key])
            rest()

    def _place(self, pieces: Pieces) -> Pieces:
        """Where the device keeps operands."""
        if self._transfer.arena is None:
            return pieces
        return tuple(piece.moved(self._transfer.settle) for piece in pieces)

    def _changes(
        self, delta: Delta, names: list[str]
    ) -> dict[tuple[DeltaModule, str], dict[str, int]]:
        """(layer, its parameter) -> the delta's parameters in it, and where they start."""
        found: dict[tuple[DeltaModule, str], dict[str, int]] = {}
        for name in names:
            for module, leaf in self._targets(delta, name):
                layer, start = part_of(module)
                found.setdefault((layer, leaf), {})[name] = start
        return {
            key: dict(sorted(members.items(), key=itemgetter(1))) for key, members in found.items()
        }

    def _targets(self, delta: Delta, parameter: str) -> list[tuple[Wrapper, str]]:
        """The layers that a parameter belongs to: two for an embedding that is also the head."""
        path, _, leaf = parameter.rpartition(".")
        module = self.modules.get(path)
        entry = delta.manifest.tensors[parameter]
        if module is None or not _fits(module, leaf, entry):
            raise ArtifactError(
                f"{delta.path} changes {parameter} {list(entry.shape)}, which the base "
                f"{self.base.name} does not have or the engine cannot change; compress the "
                "fine-tune against this base"
            )
        targets: list[tuple[Wrapper, str]] = [(module, leaf)]
        if isinstance(module, DeltaEmbedding) and self._tied(delta):
            targets.append((self.modules[HEAD], leaf))
        return targets

    def _tied(self, delta: Delta) -> bool:
        return self.base.tied and f"{HEAD}.weight" not in delta.manifest.tensors

    def _operand(self, delta: Delta, parameter: str, merge: bool) -> Encoded:
        """What the layer keeps: packed where the codec is applied packed, else the values."""
        enc = delta.encoded(parameter)
        if merge or _decoded(enc.codec, enc.shape):
            values = delta.decode(parameter, self._base_tensor(parameter))
            return replace(enc, codec="raw", params={}, tensors={"values": self._cast(values)})
        if enc.codec in ("lowrank", "rows"):
            parts = {part: self._cast(t) for part, t in enc.tensors.items()}
        else:
            parts = {part: self._transfer.put(t) for part, t in enc.tensors.items()}
        return replace(enc, tensors=parts)

    def _operand_bytes(self, entry: TensorEntry) -> int:
        """Size of ``_operand``."""
        if _decoded(entry.codec, entry.shape):
            return math.prod(entry.shape) * self._dtype.itemsize
        cast = entry.codec in ("lowrank", "rows")
        return sum(
            math.prod(shape) * (self._kept_dtype(dtype) if cast else dtype).itemsize
            for dtype, shape in entry.layout().values()
        )

    def _base_tensor(self, parameter: str) -> torch.Tensor | None:
        return self.base.tensor(parameter) if self.base.has(parameter) else None

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._transfer.put(tensor.to(self._kept_dtype(tensor.dtype)))

    def _kept_dtype(self, stored: torch.dtype) -> torch.dtype:
        """Float operands compute in the engine's dtype; indices and codes stay as they are."""
        return self._dtype if stored.is_floating_point else stored


def _decoded(codec: str, shape: tuple[int, ...]) -> bool:
    """Whether the layer keeps the values, whatever the artifact stores."""
    return codec in ("raw", "xor") or len(shape) < 2


def _tensors(binding: Binding) -> Iterator[torch.Tensor]:
    for piece in binding.pieces:
        yield from piece.tensors


def _address(tensor: torch.Tensor) -> int:
    """The same for the same memory. What is packed for a CPU does not tell where it lies."""
    return id(tensor) if tensor.is_mkldnn else tensor.data_ptr()


def _is_vector(binding: Binding) -> bool:
    return isinstance(binding.layer, DeltaNorm) or binding.leaf == "bias"


def _mergeable(layer: DeltaModule, leaf: str, entries: list[TensorEntry]) -> TypeGuard[DeltaLinear]:
    """A packed projection: whole values need no merging, and low rank is cheap as it is."""
    packed = any(entry.codec in MERGEABLE for entry in entries)
    dense = isinstance(layer, DeltaLinear) and not layer.quantised
    return packed and leaf == "weight" and dense


def _fits(module: Wrapper, leaf: str, entry: TensorEntry) -> bool:
    """Whether the layer can take the parameter: only vocabularies may differ from the base's."""
    if not entry.torch_dtype.is_floating_point:
        return False
    if isinstance(module, DeltaNorm):
        return leaf == "weight" and entry.shape == tuple(module.base_weight.shape)
    layer, _ = part_of(module)
    outputs = module.end - module.start if isinstance(module, ProjectionPart) else None
    if leaf == "bias":
        return isinstance(layer, DeltaLinear) and (
            layer.inner.bias is not None and entry.shape == (outputs or len(layer.inner.bias),)
        )
    assert isinstance(layer, DeltaLinear | DeltaEmbedding)
    if isinstance(layer, DeltaEmbedding):
        own = tuple(layer.inner.weight.shape)
    else:
        own = (outputs or layer.num_base_outputs, layer.inner.in_features)
    if isinstance(module, DeltaHead | DeltaEmbedding):
        return leaf == "weight" and len(entry.shape) == 2 and entry.shape[1:] == own[1:]
    return leaf == "weight" and entry.shape == own
