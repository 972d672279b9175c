"""Embeddings: a prompt's last states, pooled while the prompt is computed. D hidden size."""

from __future__ import annotations

import torch

from deltaserve.engine.scheduler import Row


class Pooled:
    """Sum over the positions from ``begin`` on; a sequence that is computed again after a
    preemption keeps what it had."""

    def __init__(self, begin: int) -> None:
        self.begin = begin
        self.end = begin
        self._sum_D: torch.Tensor | None = None

    def add(self, states_PD: torch.Tensor) -> None:
        """The states of the positions that follow, in float32."""
        sum_D = states_PD.float().sum(0)
        self._sum_D = sum_D if self._sum_D is None else self._sum_D + sum_D
        self.end += len(states_PD)

    def mean(self) -> tuple[float, ...]:
        assert self._sum_D is not None, "nothing was pooled"
        return tuple((self._sum_D / (self.end - self.begin)).tolist())


def pool(rows: tuple[Row, ...] | list[Row], hidden_TD: torch.Tensor) -> None:
    """Add what a step has computed of the prompts whose embeddings were asked for."""
    first = 0  # the row's first token in the packed step
    for row in rows:
        seq, how = row.seq, row.seq.request.sampling.pooling
        if how is not None:
            if seq.pooled is None:
                seq.pooled = Pooled(0 if how == "mean" else seq.num_prompt - 1)
            start = max(row.start, seq.pooled.end)
            stop = min(row.start + row.num_new, seq.num_prompt)
            if start < stop:
                seq.pooled.add(hidden_TD[first + start - row.start : first + stop - row.start])
        first += row.num_new
