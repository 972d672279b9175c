"""From an artifact to what the layers hold: which layer each parameter belongs to, and as what.

``Operands`` are made in a background thread and attached between two steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter
from typing import TypeGuard

import torch

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.artifact.codecs.base import Encoded
from deltaserve.artifact.manifest import TensorEntry
from deltaserve.artifact.reader import Delta
from deltaserve.engine.layers import (
    MERGED,
    DeltaEmbedding,
    DeltaHead,
    DeltaLinear,
    DeltaModule,
    DeltaNorm,
    ProjectionPart,
    Wrapper,
    part_of,
)
from deltaserve.engine.pieces import Piece, Pieces, packed_bytes
from deltaserve.engine.transfer import Transfer
from deltaserve.errors import ArtifactError
from deltaserve.kernels.delta_matmul import LaidOut

HEAD = "lm_head"
MERGEABLE = ("int", "nm24", "nf4", "sparse", "sum")


@dataclass(frozen=True)
class Needs:
    """What a delta takes once it is in memory, known from its manifest alone.

    device_bytes: its operands. step_bytes: those that a step with a row of it reads, which are
    all but an embedding, which is read by the row. merged_bytes: its projections as base + delta,
    dense; 0 if none of them is packed. image_bytes: of the artifact. vocab_size: of the
    fine-tune, which may have added tokens.
    """

    device_bytes: int
    step_bytes: int
    merged_bytes: int
    image_bytes: int
    vocab_size: int


@dataclass(frozen=True, eq=False)
class Binding:
    """One parameter of a layer, as the layer wants it."""

    layer: DeltaModule
    leaf: str
    pieces: Pieces


@dataclass(frozen=True, eq=False)
class Operands:
    """Everything that the layers hold of a delta. An operand of two layers counts once."""

    bindings: tuple[Binding, ...]

    def attach(self, slot: int) -> Iterator[None]:
        """Give them to the layers, one with each ``next``: nothing is copied but norms."""
        for binding in self.bindings:
            binding.layer.attach(slot, binding.leaf, binding.pieces)
            yield

    def detach(self, slot: int) -> None:
        for binding in self.bindings:
            binding.layer.detach(slot)

    def detach_merged(self, slot: int) -> None:
        """Leave the packed ones that these were merged from."""
        for binding in self.bindings:
            assert isinstance(binding.layer, DeltaLinear), "only projections are merged"
            binding.layer.detach_merged(slot)

    @cached_property
    def num_bytes(self) -> int:
        return sum(self._by_address.values())

    def bytes_shared_with(self, tensors: Iterable[torch.Tensor]) -> int:
        """How many bytes of ``tensors`` are operands themselves."""
        return sum(t.nbytes for t in tensors if t.data_ptr() in self._by_address)

    @cached_property
    def _by_address(self) -> dict[int, int]:
        tensors = (tensor for b in self.bindings for tensor in _tensors(b))
        return {tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.nbytes}


class OperandMaker:
    """Knows the base and its layers; makes operands for them. Thread-safe."""

    def __init__(
        self,
        base: Checkpoint,
        modules: dict[str, Wrapper],
        *,
        vocab_size: int,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self.base = base
        self.modules = modules
        self.vocab_size = vocab_size
        self._dtype = dtype
        self._transfer = Transfer(device)

    def needs(self, delta: Delta) -> Needs:
        """Raises ArtifactError for parameters that no layer of this base has, or not so."""
        tensors = delta.manifest.tensors
        total = step = merged = 0
        vocab_size = self.vocab_size
        counted: set[str] = set()  # an operand of two layers is in memory once
        for (layer, leaf), members in self._changes(delta, delta.names()).items():
            entries = [tensors[name] for name in members]
            size, kept = 0, set(members)
            if leaf == "weight" and isinstance(layer, DeltaLinear) and layer.joins_inputs():
                size, left = packed_bytes(list(members.values()), entries, self._dtype)
                kept = {list(members)[i] for i in left}
            size += sum(self._operand_bytes(tensors[name]) for name in kept - counted)
            counted |= kept
            total += size
            if not isinstance(layer, DeltaEmbedding):
                step += size
            if isinstance(layer, DeltaHead) and leaf == "weight":
                vocab_size = entries[0].shape[0]
            if _mergeable(layer, leaf, entries):
                merged += layer.merged_bytes(entries)
        image = sum(entry.bytes for entry in tensors.values())
        return Needs(total, step, merged, image, vocab_size)

    def make(self, delta: Delta) -> Operands:
        """All of a delta, packed where its codecs are applied packed."""
        return self._bind(delta, delta.names(), merge=False)

    def merge(self, delta: Delta) -> Operands:
        """Its packed projections as base + delta, dense, rounded once to the engine's dtype.

        So one rounding differs from the packed computation, base's output + delta's output.
        """
        return self._bind(delta, delta.names(), merge=True)

    def _bind(self, delta: Delta, names: list[str], *, merge: bool) -> Operands:
        tensors = delta.manifest.tensors
        bindings = []
        made: dict[str, Encoded] = {}  # an operand of two layers is made once
        with self._transfer.stream():
            for (layer, leaf), members in self._changes(delta, names).items():
                if merge and not _mergeable(layer, leaf, [tensors[name] for name in members]):
                    continue
                for name in members.keys() - made.keys():
                    made[name] = self._operand(delta, name, merge)
                pieces = tuple(Piece(start, made[name]) for name, start in members.items())
                kind = MERGED if merge else leaf
                bindings.append(Binding(layer, kind, layer.prepare(kind, pieces)))
            self._transfer.hand_over(t for b in bindings for t in _tensors(b))
        return Operands(tuple(bindings))

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
        operand = piece.operand
        yield from operand.parts if isinstance(operand, LaidOut) else operand.tensors.values()


def _mergeable(layer: DeltaModule, leaf: str, entries: list[TensorEntry]) -> TypeGuard[DeltaLinear]:
    """A packed projection: whole values need no merging, and low rank is cheap as it is."""
    packed = any(entry.codec in MERGEABLE for entry in entries)
    return packed and leaf == "weight" and isinstance(layer, DeltaLinear)


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
    own = (outputs or layer.inner.weight.shape[0], layer.inner.weight.shape[1])
    if isinstance(module, DeltaHead | DeltaEmbedding):
        return leaf == "weight" and len(entry.shape) == 2 and entry.shape[1:] == own[1:]
    return leaf == "weight" and entry.shape == own
