"""Paged attention whose result for a token depends on that token's own sequence alone, to the bit.

Every operation has one shape, whatever the batch holds: R tokens, each its own query, times
``KEYS`` keys of its sequence. Further keys are merged tile by tile in order of position (online
softmax, Milakov and Gimelshein 2018), and a tile that a token does not see changes nothing. So
prefill, decode and recomputation agree. It is slow: each token reads its whole context.

Shapes: R tokens in a tile, H query heads, G key/value heads, D head size, L context slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

KEYS = 64


@dataclass(frozen=True, eq=False)
class TokenTile:
    """R tokens, whose number is always the same.

    slot_mapping_T: slot that receives each one's key and value. positions_T: their places in
    their sequences. slots_TL: slots of their contexts in order; L is a multiple of ``KEYS``, and
    what lies past a token's position is any slot.
    """

    slot_mapping_T: torch.Tensor
    positions_T: torch.Tensor
    slots_TL: torch.Tensor


def paged_attention(
    q_THD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tile: TokenTile,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """As ``reference.paged_attention``, computed in float32."""
    num_tokens, num_heads, head_dim = q_THD.shape
    num_kv_heads = k_cache.shape[1]
    shape = (num_tokens, num_kv_heads, num_heads // num_kv_heads)
    q = q_THD.float().reshape(-1, shape[2], head_dim)
    top = torch.full((*shape, 1), -1e30, device=q.device)
    total = torch.zeros_like(top)
    out = torch.zeros(*shape, head_dim, device=q.device)
    for start in range(0, tile.slots_TL.shape[1], KEYS):
        slots = tile.slots_TL[:, start : start + KEYS]
        seen_TK = _seen(tile.positions_T, start, window)
        k = k_cache[slots].float().permute(0, 2, 3, 1).reshape(-1, head_dim, KEYS)
        v = v_cache[slots].float().permute(0, 2, 1, 3).reshape(-1, KEYS, head_dim)
        scores = torch.bmm(q, k).view(*shape, KEYS) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen_TK[:, None, None], float("-inf"))
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        probs, fade = torch.exp(scores - new_top), torch.exp(top - new_top)
        part = torch.bmm(probs.view(-1, shape[2], KEYS), v).view(*shape, head_dim)
        active = seen_TK.any(1)[:, None, None, None]
        total = torch.where(active, total * fade + probs.sum(-1, keepdim=True), total)
        out = torch.where(active, out * fade + part, out)
        top = new_top
    return (out / total).reshape(q_THD.shape).to(q_THD.dtype)


def _seen(positions_T: torch.Tensor, start: int, window: int | None) -> torch.Tensor:
    """[R, KEYS] bool: which keys from ``start`` on each token sees."""
    key = torch.arange(start, start + KEYS, device=positions_T.device)
    seen_TK = key <= positions_T[:, None]
    if window is not None:
        seen_TK &= key > positions_T[:, None] - window
    return seen_TK
