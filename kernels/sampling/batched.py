"""Sampling at the cost of what each row asks for. R rows, V vocabulary, C candidates, N blocks.

Same tokens as ``reference``, without sorting the vocabulary: greedy rows take the argmax, rows
that cut nothing add up blocks of weights and look into one, and rows with top_k or top_p sort
some of the likeliest tokens only. Where these turn out to be too few, the reference decides: that
is found out on the device, and told with the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from deltaserve.kernels.sampling import reference
from deltaserve.kernels.staging import to_device

BLOCK = 256
CANDIDATES = 1024
"""Tokens that are sorted for top_p; few distributions need more."""
SPARE = 64
"""Tokens beyond the k-th that are sorted for top_k, in case they are as likely."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One row's settings; temperature above 0, top_k 0 and top_p 1 are off, uniform in [0, 1)."""

    temperature: float
    top_k: int
    top_p: float
    uniform: float

    @property
    def cuts(self) -> bool:
        return self.top_k > 0 or self.top_p < 1


def sample(logits_RV: torch.Tensor, draws: Sequence[Draw | None]) -> list[int]:
    """Token of each row of float32 logits; None is the likeliest. See ``reference.sample``.

    Waits for the device once, when everything has been launched.
    """
    tokens_R, enough_R = launch(logits_RV, draws)
    tokens, enough = torch.stack([tokens_R, enough_R.long()]).tolist()
    return [
        token if right else _settle(logits_RV[row : row + 1], draws[row])
        for row, (token, right) in enumerate(zip(tokens, enough, strict=True))
    ]


def launch(
    logits_RV: torch.Tensor, draws: Sequence[Draw | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens [R], whether they are right [R]) on the device; waits for nothing."""
    kinds = [0 if draw is None else 1 + draw.cuts for draw in draws]
    tokens_R = torch.zeros(len(draws), dtype=torch.long, device=logits_RV.device)
    enough_R = torch.ones(len(draws), dtype=torch.bool, device=logits_RV.device)
    for kind, pick in enumerate((_greedy, _whole, _cut)):
        rows = [row for row, own in enumerate(kinds) if own == kind]
        if len(rows) == len(draws):
            return pick(logits_RV, [draw for draw in draws if draw is not None])
        if rows:
            index = _on_device(rows, torch.long, logits_RV)
            chosen = [draw for row in rows if (draw := draws[row]) is not None]
            tokens_R[index], enough_R[index] = pick(logits_RV[index], chosen)
    return tokens_R, enough_R


Picked = tuple[torch.Tensor, torch.Tensor]


def _greedy(logits_RV: torch.Tensor, draws: list[Draw]) -> Picked:
    return _surely(logits_RV.argmax(-1))


def _surely(tokens_R: torch.Tensor) -> Picked:
    return tokens_R, torch.ones_like(tokens_R, dtype=torch.bool)


def _whole(logits_RV: torch.Tensor, draws: list[Draw]) -> Picked:
    """From the whole distribution: first the block, then the token in it."""
    weights_RNB = _weights(_scaled(logits_RV, draws))
    cdf_RN = weights_RNB.sum(-1, dtype=torch.float64).cumsum(-1)
    uniform_R = _doubles([draw.uniform for draw in draws], logits_RV)
    block_R1 = reference.pick(cdf_RN, uniform_R)
    row_R = torch.arange(len(draws), device=logits_RV.device)
    weights_RB = weights_RNB[row_R, block_R1[:, 0]].double()
    before_R1 = F.pad(cdf_RN, (1, 0)).gather(1, block_R1)
    inner_RB = weights_RB.cumsum(-1)
    rest_R1 = uniform_R[:, None] * cdf_RN[:, -1:] - before_R1
    place_R1 = torch.searchsorted(inner_RB, rest_R1, right=True)
    last_R1 = (inner_RB < inner_RB[:, -1:]).sum(-1, keepdim=True)
    return _surely((block_R1 * BLOCK + torch.minimum(place_R1, last_R1))[:, 0])


def _cut(logits_RV: torch.Tensor, draws: list[Draw]) -> Picked:
    """From the likeliest tokens."""
    size = logits_RV.shape[1]
    tops = [draw.top_k for draw in draws]
    wanted = max(tops) + SPARE if min(tops) > 0 else max(CANDIDATES, max(tops) + SPARE)
    values_RC, ids_RC = _likeliest(logits_RV, draws, min(wanted, size))
    top_k_R1 = _on_device(tops, torch.long, logits_RV)[:, None]
    kth_R1 = values_RC.gather(1, top_k_R1.clamp(1, values_RC.shape[1]) - 1)
    dropped_RC = (top_k_R1 > 0) & (values_RC < kth_R1)
    weights_RC = torch.exp(values_RC - values_RC[:, :1]).double().masked_fill(dropped_RC, 0.0)
    total_R1 = weights_RC.sum(-1, keepdim=True)
    if min(tops) == 0 and values_RC.shape[1] < size:
        whole = _weights(_scaled(logits_RV, draws)).sum((1, 2), dtype=torch.float64)
        total_R1 = torch.where(top_k_R1 > 0, total_R1, whole[:, None])
    top_p_R1 = _doubles([draw.top_p for draw in draws], logits_RV)[:, None]
    before_RC = weights_RC.cumsum(-1) - weights_RC
    over_RC = (top_p_R1 < 1) & (before_RC >= top_p_R1 * total_R1)
    over_RC[:, 0] = False
    kept_RC = weights_RC.masked_fill(over_RC, 0.0)
    uniform_R = _doubles([draw.uniform for draw in draws], logits_RV)
    place_R1 = reference.pick(kept_RC.cumsum(-1), uniform_R)
    tokens_R = ids_RC.gather(1, place_R1)[:, 0]
    if values_RC.shape[1] == size:
        return _surely(tokens_R)
    # Are all that belong to the kept ones among the candidates? Equals of the last may not be.
    ends_RC = torch.where(top_k_R1 > 0, dropped_RC, over_RC)
    masked_R = values_RC[:, -1] == -torch.inf  # and so is what follows
    return tokens_R, masked_R | (ends_RC[:, -1] & _falls(values_RC, ends_RC))


def _falls(values_RC: torch.Tensor, ends_RC: torch.Tensor) -> torch.Tensor:
    """[R] bool: the last kept candidate is likelier than the last candidate of all."""
    last_R1 = ((~ends_RC).sum(-1, keepdim=True) - 1).clamp(min=0)
    return (values_RC.gather(1, last_R1) > values_RC[:, -1:])[:, 0]


def _settle(logits_1V: torch.Tensor, draw: Draw | None) -> int:
    """Draw one row again, from the whole vocabulary: its candidates were not enough."""
    assert draw is not None
    token_1 = reference.sample(
        logits_1V,
        _on_device([draw.temperature], torch.float32, logits_1V),
        _on_device([draw.top_k], torch.long, logits_1V),
        _doubles([draw.top_p], logits_1V),
        _doubles([draw.uniform], logits_1V),
    )
    return int(token_1[0])


def _likeliest(
    logits_RV: torch.Tensor, draws: list[Draw], count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits over temperature, ids) of the likeliest tokens, among equals by id; both [R, C]."""
    ids_RC = logits_RV.topk(count).indices.sort(-1).values
    values_RC = _scaled(logits_RV.gather(1, ids_RC), draws)
    values_RC, order = values_RC.sort(dim=-1, descending=True, stable=True)
    return values_RC, ids_RC.gather(1, order)


def _scaled(logits: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    temperature_R = _on_device([d.temperature for d in draws], torch.float32, logits)
    return logits / temperature_R[:, None]


def _weights(scaled_RV: torch.Tensor) -> torch.Tensor:
    """[R, N, BLOCK]: unnormalised probabilities, zero past the vocabulary. Sums over blocks,
    unlike those over rows, do not depend on how many threads share a row."""
    weights_RV = scaled_RV.sub_(scaled_RV.amax(-1, keepdim=True)).exp_()
    return F.pad(weights_RV, (0, -weights_RV.shape[1] % BLOCK)).view(len(weights_RV), -1, BLOCK)


def _doubles(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return _on_device(values, torch.float64, like)


def _on_device(values: Sequence[float], dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    return to_device(torch.tensor(values, dtype=dtype), like.device)
