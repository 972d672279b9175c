"""Two models behind their last layers: next-token distributions, token by token.

Neither logits nor heads are held whole: tokens go in chunks, the vocabulary in blocks.
N tokens, D the hidden size, V the vocabulary, B a block of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from deltaserve.compress.weights import BLOCK, Table

# Elements of a chunk of logits.
CHUNK = 1 << 22


@dataclass(frozen=True)
class Tokens:
    """Per position that has a next token. kl_N: nats; top_*_N: the most likely next token;
    nll_*_N: of the token that follows in the text, nats."""

    kl_N: torch.Tensor
    top_fine_tune_N: torch.Tensor
    top_delta_N: torch.Tensor
    nll_fine_tune_N: torch.Tensor
    nll_delta_N: torch.Tensor

    @property
    def agrees_N(self) -> torch.Tensor:
        return self.top_fine_tune_N == self.top_delta_N

    def __getitem__(self, some: slice) -> Tokens:
        return Tokens(*(part[some] for part in vars(self).values()))

    @staticmethod
    def join(parts: list[Tokens]) -> Tokens:
        """One after the other."""
        return Tokens(
            *(torch.cat(each) for each in zip(*(vars(p).values() for p in parts), strict=True))
        )


@torch.inference_mode()
def compare_tokens(
    mine_ND: torch.Tensor,
    theirs_ND: torch.Tensor,
    mine_VD: Table,
    theirs_VD: Table,
    targets_N: torch.Tensor,
    cap: float | None,
) -> Tokens:
    """mine: the fine-tune's last hidden states and head; theirs: base + delta's.

    cap: of Gemma's logits, if the model has one.
    """
    step = max(1, CHUNK // min(BLOCK, len(mine_VD)))
    parts = [
        _compare(mine_ND[some], theirs_ND[some], mine_VD, theirs_VD, targets_N[some], cap)
        for some in (slice(i, i + step) for i in range(0, len(targets_N), step))
    ]
    return Tokens.join(parts)


def _compare(
    mine_ND: torch.Tensor,
    theirs_ND: torch.Tensor,
    mine_VD: Table,
    theirs_VD: Table,
    targets_N: torch.Tensor,
    cap: float | None,
) -> Tokens:
    """KL = sum p (log p - log q), with both normalisers found in a first pass."""
    mine, theirs = _Side(mine_ND, mine_VD, targets_N, cap), _Side(
        theirs_ND, theirs_VD, targets_N, cap
    )  # fmt: skip
    kl_N = torch.zeros(len(targets_N), dtype=torch.float64, device=mine_ND.device)
    for p_NB, q_NB in zip(mine.logits(), theirs.logits(), strict=True):
        log_p_NB = p_NB - mine.total_N[:, None]
        log_q_NB = q_NB - theirs.total_N[:, None]
        kl_N += (log_p_NB.exp() * (log_p_NB - log_q_NB)).double().sum(1)
    # Rounding can leave a sum of -1e-8 where the two are equal.
    found = (kl_N.float().clamp(min=0), mine.top_N, theirs.top_N, mine.nll_N, theirs.nll_N)
    return Tokens(*(each.cpu() for each in found))


class _Side:
    """One of the two: log of the normaliser, the most likely token, -log p of the target."""

    def __init__(
        self, hidden_ND: torch.Tensor, head_VD: Table, targets_N: torch.Tensor,
        cap: float | None,
    ) -> None:  # fmt: skip
        self._hidden_ND, self._head_VD, self._cap = hidden_ND, head_VD, cap
        device = hidden_ND.device
        targets_N = targets_N.to(device)
        best_N = torch.full((len(targets_N),), -torch.inf, device=device)
        self.total_N = best_N.clone()
        self.top_N = torch.zeros(len(targets_N), dtype=torch.long, device=device)
        target_N = torch.zeros(len(targets_N), device=device)
        for number, logits_NB in enumerate(self.logits()):
            start = number * BLOCK
            self.total_N = torch.logaddexp(self.total_N, logits_NB.logsumexp(1))
            high_N, place_N = logits_NB.max(1)
            self.top_N = torch.where(high_N > best_N, place_N + start, self.top_N)
            best_N = torch.maximum(best_N, high_N)
            here_N = (targets_N >= start) & (targets_N < start + logits_NB.shape[1])
            place_N = (targets_N - start).clamp(0, logits_NB.shape[1] - 1)
            target_N = torch.where(here_N, logits_NB.gather(1, place_N[:, None])[:, 0], target_N)
        self.nll_N = self.total_N - target_N

    def logits(self) -> Iterator[torch.Tensor]:
        """[N, B] of every block of the vocabulary."""
        for rows_BD in self._head_VD.blocks():
            logits_NB = self._hidden_ND @ rows_BD.to(self._hidden_ND.device).T
            yield self._cap * (logits_NB / self._cap).tanh() if self._cap else logits_NB
