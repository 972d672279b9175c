"""Sampling in plain torch. R rows, V vocabulary."""

from __future__ import annotations

import torch

_MASK64 = (1 << 64) - 1


def counter_uniform(seed: int, position: int) -> float:
    """A uniform number in [0, 1) that depends on (seed, position) alone.

    Counter-based, so that a seeded request draws the same numbers whatever shares its
    batch and however often it was preempted. The mixer is SplitMix64 (Steele, Lea and
    Flood, OOPSLA 2014), applied to the seed and then to the position.
    """
    state = _splitmix64(seed & _MASK64)
    return (_splitmix64((state + position) & _MASK64) >> 11) / (1 << 53)


def _splitmix64(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def sample(
    logits_RV: torch.Tensor,
    temperature_R: torch.Tensor,
    top_k_R: torch.Tensor,
    top_p_R: torch.Tensor,
    uniform_R: torch.Tensor,
) -> torch.Tensor:
    """Token of each row: argmax where temperature is 0, else one inverse-CDF draw.

    top_k 0 and top_p 1 are off. top_k keeps what is as likely as the k-th (ties stay, as in
    transformers), then top_p the smallest set of tokens whose probability reaches it, always at
    least one. Where either is on, the CDF runs from the likeliest token down, among equals by
    id; else in the order of the vocabulary, which needs no sorting. uniform_R in [0, 1), float64.
    Weights are float32, their sums float64.
    """
    greedy_R = temperature_R == 0
    safe_R1 = torch.where(greedy_R, torch.ones_like(temperature_R), temperature_R)[:, None]
    scaled_RV = logits_RV.float() / safe_R1
    in_vocabulary = torch.arange(scaled_RV.shape[1], device=scaled_RV.device)
    cut_R1 = ((top_k_R > 0) | (top_p_R < 1))[:, None]
    order = torch.where(
        cut_R1, scaled_RV.argsort(dim=-1, descending=True, stable=True), in_vocabulary
    )
    values = scaled_RV.gather(1, order)
    weights = torch.exp(values - values.amax(-1, keepdim=True)).double()
    kth_R1 = values.gather(1, (top_k_R.clamp(1, values.shape[1]) - 1)[:, None])
    weights.masked_fill_((top_k_R > 0)[:, None] & (values < kth_R1), 0.0)
    before = weights.cumsum(-1) - weights
    reached = before >= top_p_R[:, None] * weights.sum(-1, keepdim=True)
    weights.masked_fill_((top_p_R < 1)[:, None] & reached & (in_vocabulary > 0), 0.0)
    picked = pick(weights.cumsum(-1), uniform_R)
    return torch.where(greedy_R, logits_RV.argmax(dim=-1), order.gather(1, picked)[:, 0])


def pick(cdf_RN: torch.Tensor, uniform_R: torch.Tensor) -> torch.Tensor:
    """[R, 1]: where a draw falls in an unnormalised CDF; never on a weight of zero."""
    total_R1 = cdf_RN[:, -1:]
    picked = torch.searchsorted(cdf_RN, uniform_R[:, None] * total_R1, right=True)
    # Rounding may push the draw past the last weight that counts.
    return torch.minimum(picked, (cdf_RN < total_R1).sum(-1, keepdim=True))
