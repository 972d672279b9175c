"""Two models behind their last layers: next-token distributions, token by token.

Neither logits nor heads are held whole: the vocabulary goes in blocks.
N tokens, D the hidden size, V the vocabulary, B a block of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltaserve.compress.weights import Table


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

    cap: of Gemma's logits, if the model has one. Both heads are read once: with
    KL = E_p[log p - log q], what is not normalised yet is summed up as it comes, and weighted
    anew where a larger logit turns up (as in Milakov and Gimelshein, 2018).
    """
    mine, theirs = _Side(mine_ND, targets_N, cap), _Side(theirs_ND, targets_N, cap)
    apart_N = torch.zeros(len(targets_N), dtype=torch.float64, device=mine_ND.device)
    blocks = (head_VD.blocks(len(targets_N)) for head_VD in (mine_VD, theirs_VD))
    for (some, mine_BD), (_, theirs_BD) in zip(*blocks, strict=True):
        p_NB, q_NB = mine.logits(mine_BD), theirs.logits(theirs_BD)
        weight_NB, shrink_N = mine.add(some.start, p_NB)
        theirs.add(some.start, q_NB)
        apart_N = apart_N * shrink_N + p_NB.sub_(q_NB).mul_(weight_NB).sum(1)
    kl_N = apart_N / mine.sum_N - (mine.total_N - theirs.total_N)
    # Rounding can leave a sum of -1e-8 where the two are equal.
    found = (kl_N.clamp(min=0), mine.top_N, theirs.top_N, mine.nll_N, theirs.nll_N)
    return Tokens(*(each.float().cpu() if each.is_floating_point() else each.cpu()
                    for each in found))  # fmt: skip


class _Side:
    """One of the two: normaliser, the most likely token, logit of the target, so far.

    sum_N: of exp(logit - best_N), in double precision.
    """

    def __init__(self, hidden_ND: torch.Tensor, targets_N: torch.Tensor, cap: float | None) -> None:
        device = hidden_ND.device
        self._hidden_ND, self._cap, self._targets_N = hidden_ND, cap, targets_N.to(device)
        self._best_N = torch.full((len(targets_N),), -torch.inf, device=device)
        self._target_N = torch.zeros(len(targets_N), device=device)
        self.sum_N = torch.zeros(len(targets_N), dtype=torch.float64, device=device)
        self.top_N = torch.zeros(len(targets_N), dtype=torch.long, device=device)

    def logits(self, rows_BD: torch.Tensor) -> torch.Tensor:
        """[N, B] of a block of the vocabulary."""
        logits_NB = self._hidden_ND @ rows_BD.to(self._hidden_ND.device).T
        return self._cap * (logits_NB / self._cap).tanh() if self._cap else logits_NB

    def add(self, start: int, logits_NB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Count a block that begins at ``start``; its exp(logit - best_N) [N, B], and by what
        [N] those of earlier blocks are to be multiplied."""
        high_N, place_N = logits_NB.max(1)
        self.top_N = torch.where(high_N > self._best_N, place_N + start, self.top_N)
        best_N = torch.maximum(self._best_N, high_N)
        shrink_N = (self._best_N - best_N).double().exp()
        weight_NB = (logits_NB - best_N[:, None]).exp_()
        self.sum_N = self.sum_N * shrink_N + weight_NB.sum(1)
        self._best_N = best_N
        place_N = self._targets_N - start
        here_N = ((place_N >= 0) & (place_N < logits_NB.shape[1])).nonzero()[:, 0]
        self._target_N[here_N] = logits_NB[here_N, place_N[here_N]]
        return weight_NB, shrink_N

    @property
    def total_N(self) -> torch.Tensor:
        """Log of the normaliser, in double precision."""
        return self._best_N.double() + self.sum_N.log()

    @property
    def nll_N(self) -> torch.Tensor:
        """-log p of the target, nats."""
        return self.total_N - self._target_N
