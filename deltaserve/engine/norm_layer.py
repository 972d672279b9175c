"""Normalisations whose weights each delta may change; see ``layers``."""

from __future__ import annotations

import torch
from torch import nn

from deltaserve.engine.delta_layer import DeltaLayer
from deltaserve.engine.pieces import Pieces, Rest, no_rest
from deltaserve.engine.routing import StepContext
from deltaserve.engine.slot_table import SlotTable


class DeltaNorm(DeltaLayer):
    """A normalisation; each row is scaled by its own delta's weight.

    token_dim: which dimension of the input counts the packed tokens (q/k norms see
    [1, T, heads, D] in Qwen 3 and [1, heads, T, D] in Gemma 3).
    """

    def __init__(self, inner: nn.Module, step: StepContext, token_dim: int) -> None:
        super().__init__(step)
        self.base_weight: torch.Tensor = inner.get_parameter("weight").detach()
        # A plain attribute from here on, so that each step can put its own rows in its place.
        del inner._parameters["weight"]
        self.inner = inner
        self.token_dim = token_dim
        self.table = SlotTable(self.base_weight)

    def prepare(self, parameter: str, pieces: Pieces, rest: Rest = no_rest) -> Pieces:
        return pieces

    @property
    def weights(self) -> set[int]:
        """The slots that change this norm."""
        return self.table.slots

    def reads_at_attach(self, parameter: str) -> bool:
        return True

    def attach(self, slot: int, parameter: str, pieces: Pieces) -> None:
        (piece,) = pieces
        self.step.changes += self.table.put(slot, piece.values)

    def detach(self, slot: int) -> None:
        self.table.drop(slot)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inner.weight = self._weight_for(x)
        y: torch.Tensor = self.inner(x)
        return y

    def _weight_for(self, x: torch.Tensor) -> torch.Tensor:
        routing = self.step.routing
        if not routing.has_any(self.table.slots):
            return self.base_weight
        shape = [1] * x.dim()
        shape[self.token_dim], shape[-1] = len(routing.slot_T), x.shape[-1]
        return self.table.of(routing.slot_T).view(shape)
