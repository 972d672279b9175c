"""From an artifact to what the layers hold: which layer each parameter belongs to, and as what.

``Operands`` are made in a background thread and attached between two steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.artifact.codecs.base import Encoded
from deltaserve.artifact.manifest import Manifest, TensorEntry
from deltaserve.artifact.reader import Delta
from deltaserve.engine.layers import DeltaEmbedding, DeltaHead, DeltaLinear, DeltaModule, DeltaNorm
from deltaserve.engine.transfer import Transfer
from deltaserve.errors import ArtifactError
from deltaserve.kernels.delta_matmul import LaidOut

HEAD = "lm_head"
MERGEABLE = ("int", "nm24", "nf4")


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
    """One parameter for one layer, as the layer wants it."""

    module: DeltaModule
    leaf: str
    operand: Encoded | LaidOut


@dataclass(frozen=True, eq=False)
class Operands:
    """Everything that the layers hold of a delta. An operand of two layers counts once."""

    bindings: tuple[Binding, ...]

    def attach(self, slot: int) -> Iterator[None]:
        """Give them to the layers, one with each ``next``: nothing is copied but norms."""
        for binding in self.bindings:
            binding.module.attach(slot, binding.leaf, binding.operand)  # type: ignore[arg-type]
            yield

    def detach(self, slot: int) -> None:
        for binding in self.bindings:
            binding.module.detach(slot)

    def replaced_by(self, merged: Operands) -> Operands:
        """Those whose place ``merged`` takes."""
        places = {(id(b.module), b.leaf) for b in merged.bindings}
        return Operands(tuple(b for b in self.bindings if (id(b.module), b.leaf) in places))

    @cached_property
    def num_bytes(self) -> int:
        return sum(self._by_address.values())

    def bytes_shared_with(self, tensors: Iterable[torch.Tensor]) -> int:
        """How many bytes of ``tensors`` are operands themselves."""
        return sum(t.nbytes for t in tensors if t.data_ptr() in self._by_address)

    @cached_property
    def _by_address(self) -> dict[int, int]:
        tensors = (tensor for b in self.bindings for tensor in _tensors(b.operand))
        return {tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.nbytes}


class OperandMaker:
    """Knows the base and its layers; makes operands for them. Thread-safe."""

    def __init__(
        self,
        base: Checkpoint,
        modules: dict[str, DeltaModule],
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
        manifest = delta.manifest
        total = step = merged = 0
        vocab_size = self.vocab_size
        for name, entry in manifest.tensors.items():
            targets = self._targets(delta, name)
            size = self._operand_bytes(entry)
            total += size
            heads = any(isinstance(module, DeltaHead) for module, _ in targets)
            if heads or not isinstance(targets[0][0], DeltaEmbedding):
                step += size
            if heads and name.endswith(".weight"):
                vocab_size = entry.shape[0]
            if self._mergeable(manifest, name):
                merged += math.prod(entry.shape) * self._dtype.itemsize
        image = sum(entry.bytes for entry in manifest.tensors.values())
        return Needs(total, step, merged, image, vocab_size)

    def make(self, delta: Delta) -> Operands:
        """All of a delta, packed where its codecs are applied packed."""
        return self._bind(delta, delta.names(), merge=False)

    def merge(self, delta: Delta) -> Operands:
        """Its packed projections as base + delta, dense, rounded once to the engine's dtype.

        So one rounding differs from the packed computation, base's output + delta's output.
        """
        names = [name for name in delta.names() if self._mergeable(delta.manifest, name)]
        return self._bind(delta, names, merge=True)

    def _bind(self, delta: Delta, names: list[str], *, merge: bool) -> Operands:
        bindings = []
        with self._transfer.stream():
            for name in names:
                operand = self._operand(delta, name, merge)
                for module, leaf in self._targets(delta, name):
                    prepared = module.prepare(leaf, operand)
                    bindings.append(Binding(module, leaf, prepared))
            self._transfer.hand_over(t for b in bindings for t in _tensors(b.operand))
        return Operands(tuple(bindings))

    def _targets(self, delta: Delta, parameter: str) -> list[tuple[DeltaModule, str]]:
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
        targets = [(module, leaf)]
        if isinstance(module, DeltaEmbedding) and self._tied(delta):
            targets.append((self.modules[HEAD], leaf))
        return targets

    def _tied(self, delta: Delta) -> bool:
        return self.base.tied and f"{HEAD}.weight" not in delta.manifest.tensors

    def _mergeable(self, manifest: Manifest, parameter: str) -> bool:
        """A packed projection: embeddings are read by the row, and low rank is cheap as it is."""
        module = self.modules.get(parameter.rpartition(".")[0])
        packed = manifest.tensors[parameter].codec in MERGEABLE
        return packed and isinstance(module, DeltaLinear)

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


def _tensors(operand: Encoded | LaidOut) -> Iterable[torch.Tensor]:
    return operand.parts if isinstance(operand, LaidOut) else operand.tensors.values()


def _fits(module: DeltaModule, leaf: str, entry: TensorEntry) -> bool:
    """Whether the layer can take the parameter: only vocabularies may differ from the base's."""
    if not entry.torch_dtype.is_floating_point:
        return False
    if isinstance(module, DeltaNorm):
        return leaf == "weight" and entry.shape == tuple(module.base_weight.shape)
    if leaf == "bias":
        return isinstance(module, DeltaLinear) and (
            module.inner.bias is not None and entry.shape == tuple(module.inner.bias.shape)
        )
    own = tuple(module.inner.weight.shape)
    if isinstance(module, DeltaHead | DeltaEmbedding):
        return leaf == "weight" and len(entry.shape) == 2 and entry.shape[1:] == own[1:]
    return leaf == "weight" and entry.shape == own
