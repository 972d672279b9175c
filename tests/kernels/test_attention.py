"""Paged attention against dense attention in float64, over random layouts of the cache."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.kernels.attention import PagedBatch, paged_attention, write_kv

sequence = st.tuples(st.integers(0, 20), st.integers(1, 9))  # tokens before, new tokens


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, softcap: float | None
) -> torch.Tensor:
    """q [S, H, D] are the last S tokens of k, v [L, G, D]; float64."""
    group = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = torch.einsum("shd,lhd->hsl", q.double(), k) * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    q_pos = torch.arange(len(k) - len(q), len(k))[:, None]
    k_pos = torch.arange(len(k))[None]
    seen = (k_pos <= q_pos) & (k_pos > q_pos - (window or len(k) + 1))
    probs = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hsl,lhd->shd", probs, v)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(sequence, min_size=1, max_size=6),
    st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    st.sampled_from([1, 4, 16]),
    st.sampled_from([None, 1, 5, 64]),
    st.sampled_from([None, 2.0]),
    st.integers(0, 1000),
)
def test_paged_equals_dense(
    sequences: list[tuple[int, int]],
    heads: tuple[int, int],
    block_size: int,
    window: int | None,
    softcap: float | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    num_heads, num_kv_heads = heads
    dim = 8
    lens = [before + new for before, new in sequences]
    blocks_of = [-(-length // block_size) for length in lens]
    order = torch.randperm(sum(blocks_of) + 3)
    table = torch.zeros(len(lens), max(blocks_of), dtype=torch.long)
    k_cache = torch.zeros(len(order) * block_size, num_kv_heads, dim)
    v_cache = torch.zeros_like(k_cache)
    keys, values, queries, slot_mapping = [], [], [], []
    for row, ((before, new), length) in enumerate(zip(sequences, lens, strict=True)):
        used = sum(blocks_of[:row])
        table[row, : blocks_of[row]] = order[used : used + blocks_of[row]]
        positions = torch.arange(length)
        slots = table[row][positions // block_size] * block_size + positions % block_size
        k, v = torch.randn(2, length, num_kv_heads, dim).unbind(0)
        k_cache[slots[:before]], v_cache[slots[:before]] = k[:before], v[:before]
        keys.append(k), values.append(v), slot_mapping.append(slots[before:])
        queries.append(torch.randn(new, num_heads, dim))
    starts = [0]
    for _, new in sequences:
        starts.append(starts[-1] + new)
    batch = PagedBatch(torch.cat(slot_mapping), table, lens, starts, block_size)
    new_k = torch.cat([k[-len(q) :] for k, q in zip(keys, queries, strict=True)])
    new_v = torch.cat([v[-len(q) :] for v, q in zip(values, queries, strict=True)])
    write_kv(k_cache, v_cache, new_k, new_v, batch.slot_mapping_T)
    out = paged_attention(
        torch.cat(queries),
        k_cache,
        v_cache,
        batch,
        scale=dim**-0.5,
        window=window,
        softcap=softcap,
    )
    expected = [
        dense(q, k, v, window, softcap) for q, k, v in zip(queries, keys, values, strict=True)
    ]
    torch.testing.assert_close(out.double(), torch.cat(expected), atol=1e-5, rtol=1e-5)
