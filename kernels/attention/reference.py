"""Paged attention in plain torch: the CPU path, and the oracle of every kernel.

Shapes: T packed tokens, R sequences, H query heads, G key/value heads, D head size,
L longest context among the rows at hand, B blocks in the longest block table.
A *slot* is one token's place in the cache: block * block_size + offset.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from deltaserve.kernels.attention.batch import PagedBatch


def write_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    slot_mapping_T: torch.Tensor,
) -> None:
    """Store the new tokens' keys and values; the caches are [slots, G, D]."""
    k_cache.index_copy_(0, slot_mapping_T, k_TGD)
    v_cache.index_copy_(0, slot_mapping_T, v_TGD)


def paged_attention(
    q_THD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention of every packed token over its own sequence -> [T, H, D].

    window: a token sees itself and the ``window - 1`` before it. softcap: scores become
    softcap * tanh(scores / softcap) (Gemma 2). New keys must have been written before.
    """
    if len(batch.decode_rows) == len(q_THD):
        return _decode(q_THD, k_cache, v_cache, batch, scale, window, softcap)
    out_THD = torch.empty_like(q_THD)
    if batch.decode_rows:
        index, _, _ = batch.decode_index
        out_THD[index] = _decode(q_THD[index], k_cache, v_cache, batch, scale, window, softcap)
    for row in batch.prefill_rows:
        start, end = batch.query_starts[row], batch.query_starts[row + 1]
        context_len = batch.context_lens[row]
        table = batch.block_table_RB[row : row + 1, : -(-context_len // batch.block_size)]
        k, v = (
            _gather(cache, table, batch.block_size)[0, :context_len] for cache in (k_cache, v_cache)
        )
        out_THD[start:end] = _prefill(q_THD[start:end], k, v, scale, window, softcap)
    return out_THD


def _gather(cache: torch.Tensor, table_RB: torch.Tensor, block_size: int) -> torch.Tensor:
    """What the blocks of each sequence hold -> [R, B * block_size, G, D].

    By whole blocks: copying token by token takes six times as long.
    """
    blocks = cache.view(-1, block_size * cache[0].numel())
    held = blocks.index_select(0, table_RB.flatten())
    return held.view(len(table_RB), -1, *cache.shape[1:])


def _decode(
    q_RHD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One query per sequence; the query heads that share a key head are its 'queries'."""
    num_rows, num_heads, head_dim = q_RHD.shape
    num_kv_heads = k_cache.shape[1]
    q = q_RHD.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    _, _, table_RB = batch.decode_index
    k, v = (_gather(c, table_RB, batch.block_size).transpose(1, 2) for c in (k_cache, v_cache))
    mask = batch.decode_mask(window, q.dtype)
    return _attend(q, k, v, mask, scale, softcap).reshape(q_RHD.shape)


def _prefill(
    q_SHD: torch.Tensor,
    k_LGD: torch.Tensor,
    v_LGD: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """The last S tokens of one sequence over all its L tokens."""
    num_new, context_len = q_SHD.shape[0], k_LGD.shape[0]
    group = q_SHD.shape[1] // k_LGD.shape[1]
    q_HSD = q_SHD.transpose(0, 1)[None]
    k_HLD = k_LGD.transpose(0, 1).repeat_interleave(group, dim=0)[None]
    v_HLD = v_LGD.transpose(0, 1).repeat_interleave(group, dim=0)[None]
    q_pos = torch.arange(context_len - num_new, context_len, device=q_SHD.device)[:, None]
    k_pos = torch.arange(context_len, device=q_SHD.device)[None]
    unseen_SL = k_pos > q_pos
    if window is not None:
        unseen_SL |= k_pos <= q_pos - window
    mask_SL = torch.zeros(unseen_SL.shape, dtype=q_SHD.dtype, device=q_SHD.device)
    mask_SL.masked_fill_(unseen_SL, float("-inf"))
    return _attend(q_HSD, k_HLD, v_HLD, mask_SL, scale, softcap)[0].transpose(0, 1)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """softmax(q k^T + mask) v over the last two dims; ``mask`` is 0 or -inf."""
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    scores = softcap * torch.tanh(scores / softcap)
    probs = (scores + mask).softmax(dim=-1, dtype=torch.float32)
    return torch.matmul(probs.to(v.dtype), v)
