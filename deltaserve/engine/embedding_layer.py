"""Token embeddings that each delta may change; see ``layers``."""

from __future__ import annotations

import torch
from torch import nn

from deltaserve.artifact.codecs.base import Encoded
from deltaserve.engine.delta_layer import DeltaLayer
from deltaserve.engine.pieces import Piece, Pieces, Rest, no_rest
from deltaserve.engine.routing import StepContext
from deltaserve.kernels.delta_embedding import GroupedEmbeddings, delta_embedding
from deltaserve.kernels.delta_matmul import LaidOut


class DeltaEmbedding(DeltaLayer):
    """Token embeddings; added tokens lie past the base's rows."""

    def __init__(self, inner: nn.Embedding, step: StepContext) -> None:
        super().__init__(step)
        self.inner = inner
        self.grouped = GroupedEmbeddings("embed_tokens.weight", inner.weight, False)
        self.weights: dict[int, Encoded] = {}

    def prepare(self, parameter: str, pieces: Pieces, rest: Rest = no_rest) -> Pieces:
        (piece,) = pieces
        if self.grouped.serves_layer() and self.grouped.takes(piece.enc.codec):
            return (Piece(piece.start, self.grouped.prepare(piece.enc) or piece.enc),)
        return pieces

    def attach(self, slot: int, parameter: str, pieces: Pieces) -> None:
        (piece,) = pieces
        if isinstance(piece.operand, LaidOut):
            self.grouped.put(slot, piece.operand)
        else:
            self.weights[slot] = piece.enc

    def detach(self, slot: int) -> None:
        self.grouped.detach(slot)
        self.weights.pop(slot, None)
        self.forget_arrival(slot)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [1, T] -> [1, T, D], scaled where the model scales (Gemma 3)."""
        self.await_operands()
        weight_VD = self.inner.weight
        out: torch.Tensor = self.inner(ids.clamp(max=weight_VD.shape[0] - 1))
        scale: torch.Tensor | None = getattr(self.inner, "embed_scale", None)
        routing = self.step.routing
        if routing.has_any(self._grouped_slots()):
            out *= (ids < weight_VD.shape[0])[..., None]  # added tokens: the base counts as zero
            factor = getattr(self.inner, "scalar_embed_scale", 1.0)
            self.grouped.look_up(out[0], ids[0], routing.slot_T, factor)
        for segment in routing.tokens if self.weights else ():
            operand = self.weights.get(segment.slot)
            if operand is None:
                continue
            rows = slice(segment.start, segment.end)
            own_TD = delta_embedding(ids[0, rows], weight_VD, operand)
            out[0, rows] = own_TD if scale is None else own_TD * scale.to(own_TD.dtype)
        return out

    def _grouped_slots(self) -> set[int]:
        return {slot for table in self.grouped.tables.values() for slot in table.operands}
