"""The deltas in memory: which slot each has, and its operands in the layers that apply them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.artifact.codecs.base import Encoded
from deltaserve.artifact.reader import Delta
from deltaserve.engine.layers import (
    DeltaEmbedding,
    DeltaHead,
    DeltaLinear,
    DeltaModule,
    Piece,
    ProjectionPart,
    Wrapper,
    part_of,
)
from deltaserve.engine.routing import BASE_SLOT
from deltaserve.engine.types import ModelInfo
from deltaserve.errors import ArtifactError

HEAD = "lm_head"


@dataclass(frozen=True)
class Resident:
    """A loaded delta. vocab_size: of the fine-tune, which may have added tokens.

    merged: its projections are dense in memory, not packed.
    """

    slot: int
    delta: Delta
    vocab_size: int
    merged: bool


class Residency:
    """Loads deltas into the layers of one base."""

    def __init__(
        self,
        base: Checkpoint,
        base_digest: str,
        modules: dict[str, Wrapper],
        *,
        vocab_size: int,
        dtype: torch.dtype,
        device: str,
        merge_memory: int = 0,
    ) -> None:
        """merge_memory: bytes that merged weights may take, see ``load``."""
        self.base = base
        self.base_digest = base_digest
        self.vocab_size = vocab_size
        self.residents: dict[str, Resident] = {}
        self._modules = modules
        self._dtype = dtype
        self._device = device
        self._merge_memory = merge_memory

    def load(self, name: str, path: str) -> None:
        """Make a delta servable under ``name``.

        While the memory for it lasts, its projections are merged: kept as base + delta, dense,
        so that its rows cost one matmul and no decoding.

        Raises BaseMismatchError, or ArtifactError for damaged files and for parameters that
        no layer of this base has. Nothing stays attached when it raises.
        """
        delta = Delta.open(path)
        delta.check_base(self.base_digest)
        delta.verify_digest()
        slot = 1 + max((r.slot for r in self.residents.values()), default=BASE_SLOT)
        vocab_size = self.vocab_size
        merge = self._reserve_merged(delta)
        try:
            changes: dict[tuple[DeltaModule, str], list[Piece]] = {}
            merged: dict[DeltaLinear, list[Piece]] = {}
            for parameter in delta.names():
                operand = self._operand(delta, parameter, False)
                for module, leaf in self._targets(delta, parameter):
                    layer, start = part_of(module)
                    changes.setdefault((layer, leaf), []).append(Piece(start, operand))
                    if merge and isinstance(layer, DeltaLinear) and leaf == "weight":
                        values = self._operand(delta, parameter, True)
                        merged.setdefault(layer, []).append(Piece(start, values))
                    if isinstance(module, DeltaHead) and leaf == "weight":
                        vocab_size = operand.shape[0]
            for (layer, leaf), pieces in changes.items():
                layer.attach(slot, leaf, layer.prepare(leaf, pieces))
            for layer, pieces in merged.items():
                layer.attach_merged(slot, layer.merge(pieces))
        except BaseException:
            self._detach(slot)
            raise
        self.residents[name] = Resident(slot, delta, vocab_size, merge)

    def info(self, name: str, parent: str) -> ModelInfo:
        resident = self.residents[name]
        manifest = resident.delta.manifest
        return ModelInfo(
            name=name,
            path=str(resident.delta.path),
            parent=parent,
            digest=manifest.digest,
            codecs=tuple(sorted({entry.codec for entry in manifest.tensors.values()})),
            full_bytes=manifest.sizes.full.total,
            resident_bytes=manifest.sizes.resident.total,
            disk_bytes=manifest.sizes.disk.total,
            vocab_size=resident.vocab_size,
            merged=resident.merged,
        )

    def _targets(self, delta: Delta, parameter: str) -> list[tuple[Wrapper, str]]:
        """The layers that a parameter belongs to: two for an embedding that is also the head."""
        path, _, leaf = parameter.rpartition(".")
        module = self._modules.get(path)
        if module is None or (leaf == "bias" and not self._has_bias(module)):
            raise ArtifactError(
                f"{delta.path} changes {parameter}, which the base {self.base.name} does not "
                "have or the engine cannot change; compress the fine-tune against this base"
            )
        targets: list[tuple[Wrapper, str]] = [(module, leaf)]
        if isinstance(module, DeltaEmbedding) and self._tied(delta):
            targets.append((self._modules[HEAD], leaf))
        return targets

    def _tied(self, delta: Delta) -> bool:
        return self.base.tied and f"{HEAD}.weight" not in delta.manifest.tensors

    @staticmethod
    def _has_bias(module: Wrapper) -> bool:
        layer, _ = part_of(module)
        return isinstance(layer, DeltaLinear) and layer.inner.bias is not None

    def _reserve_merged(self, delta: Delta) -> bool:
        """Take the memory that merging this delta needs, if there is as much left."""
        shapes = [
            entry.shape
            for name, entry in delta.manifest.tensors.items()
            if self._mergeable(delta, name)
        ]
        needed = sum(math.prod(shape) for shape in shapes) * self._dtype.itemsize
        if not shapes or needed > self._merge_memory:
            return False
        self._merge_memory -= needed
        return True

    def _mergeable(self, delta: Delta, parameter: str) -> bool:
        """A packed projection: embeddings are read by the row, and low rank is cheap as it is."""
        module = self._modules.get(parameter.rpartition(".")[0])
        packed = delta.manifest.tensors[parameter].codec in ("int", "nm24", "nf4")
        return packed and isinstance(module, DeltaLinear | ProjectionPart)

    def _operand(self, delta: Delta, parameter: str, merge: bool) -> Encoded:
        """What the layer keeps: packed where the codec is applied packed, else the values."""
        enc = delta.encoded(parameter)
        if merge or enc.codec in ("raw", "xor") or len(enc.shape) < 2:
            values = delta.decode(parameter, self._base_tensor(parameter))
            return replace(enc, codec="raw", params={}, tensors={"values": self._cast(values)})
        if enc.codec in ("lowrank", "rows"):
            parts = {part: self._cast(t) for part, t in enc.tensors.items()}
        else:
            parts = {part: t.to(self._device) for part, t in enc.tensors.items()}
        return replace(enc, tensors=parts)

    def _base_tensor(self, parameter: str) -> torch.Tensor | None:
        return self.base.tensor(parameter) if self.base.has(parameter) else None

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Float operands compute in the engine's dtype; indices and codes stay as they are."""
        # Clone: a delta must not keep serving from a file that somebody may replace.
        dtype = self._dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(self._device, dtype, copy=True)

    def _detach(self, slot: int) -> None:
        for module in self._modules.values():
            part_of(module)[0].detach(slot)
