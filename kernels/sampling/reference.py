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

    top_k 0 and top_p 1 are off. top_p keeps the smallest set of tokens whose probability
    reaches it (after top_k), always at least one. uniform_R in [0, 1), float64.
    """
    greedy_R = temperature_R == 0
    if bool(greedy_R.all()):
        return logits_RV.argmax(dim=-1)
    safe_R1 = torch.where(greedy_R, torch.ones_like(temperature_R), temperature_R)[:, None]
    scaled, order = (logits_RV.float() / safe_R1).sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(scaled.shape[-1], device=scaled.device)
    cut_R1 = torch.where(top_k_R > 0, top_k_R, scaled.shape[-1])[:, None]
    probs = scaled.masked_fill(rank_V >= cut_R1, float("-inf")).softmax(-1, dtype=torch.float64)
    before = probs.cumsum(-1) - probs
    probs = probs.masked_fill((before >= top_p_R[:, None]) & (rank_V > 0), 0.0)
    cdf = probs.cumsum(-1)
    picked = torch.searchsorted(cdf, (uniform_R * cdf[:, -1])[:, None], right=True)
    # Rounding may push the draw past the last kept token.
    last_kept = (probs > 0).sum(-1, keepdim=True) - 1
    drawn = order.gather(-1, torch.minimum(picked, last_kept))[:, 0]
    return torch.where(greedy_R, logits_RV.argmax(dim=-1), drawn)
