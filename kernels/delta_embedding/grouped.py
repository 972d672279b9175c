"""The embeddings of all deltas as the kernels look them up."""

from __future__ import annotations

import torch

from deltaserve.kernels.delta_matmul.grouped import GroupedDeltas

CODECS = ("int", "rows")


class GroupedEmbeddings(GroupedDeltas):
    """As for a projection; what has no kernel is left to ``delta_embedding``."""

    def takes(self, codec: str) -> bool:
        return codec in CODECS

    def look_up(
        self, out_TD: torch.Tensor, ids_T: torch.Tensor, slot_T: torch.Tensor, scale: float
    ) -> None:
        """out: the base's embeddings of ids, zero past its vocabulary -> each token's delta's."""
        from deltaserve.kernels.delta_embedding import launch

        for (kind, *_), table in self.tables.items():
            if table.operands:
                launch.embed(kind, table, out_TD, ids_T, slot_T, scale)
