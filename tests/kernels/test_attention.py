"""Paged attention against dense attention in float64, over random layouts of the cache.

The reference, and the kernel: on a GPU, or in Triton's interpreter without one.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.kernels.attention import PagedBatch, launch, reference
from deltaserve.kernels.attention.batch import MAX_SPANS, SPAN, span_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = [(reference, "cpu"), (launch, DEVICE)]

sequence = st.tuples(st.integers(0, 20), st.integers(1, 9))  # tokens before, new tokens


@dataclass
class Case:
    """A filled cache and one step over it; expected is computed densely in float64."""

    batch: PagedBatch
    cache: tuple[torch.Tensor, torch.Tensor]
    queries: list[torch.Tensor]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    def expected(self, window: int | None, softcap: float | None) -> torch.Tensor:
        rows = zip(self.queries, self.keys, self.values, strict=True)
        return torch.cat([dense(q, k, v, window, softcap) for q, k, v in rows])

    def run(
        self, implementation: ModuleType, window: int | None, softcap: float | None
    ) -> torch.Tensor:
        k_cache, v_cache = (cache.clone() for cache in self.cache)
        pairs = list(zip(self.queries, self.keys, self.values, strict=True))
        new_k = torch.cat([k[-len(q) :] for q, k, _ in pairs])
        new_v = torch.cat([v[-len(q) :] for q, _, v in pairs])
        implementation.write_kv(k_cache, v_cache, new_k, new_v, self.batch.slot_mapping_T)
        queries = torch.cat(self.queries)
        out: torch.Tensor = implementation.paged_attention(
            queries,
            k_cache,
            v_cache,
            self.batch,
            scale=queries.shape[-1] ** -0.5,
            window=window,
            softcap=softcap,
        )
        return out


def make(
    sequences: list[tuple[int, int]],
    heads: tuple[int, int],
    block_size: int,
    *,
    seed: int,
    dim: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    span: int = SPAN,
) -> Case:
    """Sequences of (tokens before, new tokens), their blocks scattered over the cache."""
    torch.manual_seed(seed)
    num_heads, num_kv_heads = heads
    lens = [before + new for before, new in sequences]
    blocks_of = [-(-length // block_size) for length in lens]
    order = torch.randperm(sum(blocks_of) + 3)
    table = torch.zeros(len(lens), max(blocks_of), dtype=torch.long)
    k_cache = torch.zeros(len(order) * block_size, num_kv_heads, dim, dtype=dtype)
    v_cache = torch.zeros_like(k_cache)
    keys, values, queries, slot_mapping, starts = [], [], [], [], [0]
    for row, ((before, new), length) in enumerate(zip(sequences, lens, strict=True)):
        used = sum(blocks_of[:row])
        table[row, : blocks_of[row]] = order[used : used + blocks_of[row]]
        positions = torch.arange(length)
        slots = table[row][positions // block_size] * block_size + positions % block_size
        k, v = torch.randn(2, length, num_kv_heads, dim).to(dtype).unbind(0)
        k_cache[slots[:before]], v_cache[slots[:before]] = k[:before], v[:before]
        keys.append(k.to(device))
        values.append(v.to(device))
        queries.append(torch.randn(new, num_heads, dim).to(device, dtype))
        slot_mapping.append(slots[before:])
        starts.append(starts[-1] + new)
    mapping = torch.cat(slot_mapping).to(device)
    batch = PagedBatch(mapping, table.to(device), lens, starts, block_size, span)
    return Case(batch, (k_cache.to(device), v_cache.to(device)), queries, keys, values)


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, softcap: float | None
) -> torch.Tensor:
    """q [S, H, D] are the last S tokens of k, v [L, G, D]; float64."""
    group = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = torch.einsum("shd,lhd->hsl", q.double(), k) * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    q_pos = torch.arange(len(k) - len(q), len(k), device=q.device)[:, None]
    k_pos = torch.arange(len(k), device=q.device)[None]
    seen = (k_pos <= q_pos) & (k_pos > q_pos - (window or len(k) + 1))
    probs = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hsl,lhd->shd", probs, v)


@settings(max_examples=20, deadline=None)
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
    for implementation, device in IMPLEMENTATIONS:
        case = make(sequences, heads, block_size, seed=seed, device=device)
        out = case.run(implementation, window, softcap)
        expected = case.expected(window, softcap)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize(("dim", "dtype"), [(24, torch.float32), (64, torch.float16)])
def test_long_contexts_are_cut_into_spans(dim: int, dtype: torch.dtype, window: int | None) -> None:
    """Decode rows of one to four spans beside a prefill of more than one block of queries."""
    sequences = [(200, 1), (0, 1), (63, 1), (90, 40)]
    case = make(sequences, (6, 2), 16, seed=1, dim=dim, dtype=dtype, device=DEVICE, span=64)
    out = case.run(launch, window, None)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(
        out.double(), case.expected(window, None), atol=tolerance, rtol=tolerance
    )


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Bit for bit: alone, where one span suffices, and beside a sequence that has many."""
    for before in (40, 130):
        among = make([(before, 1), (300, 1)], (4, 2), 16, seed=before, device=DEVICE, span=64)
        batch = among.batch
        alone = Case(
            PagedBatch(
                batch.slot_mapping_T[:1],
                batch.block_table_RB[:1],
                batch.context_lens[:1],
                batch.query_starts[:2],
                batch.block_size,
                64,
            ),
            among.cache,
            among.queries[:1],
            among.keys[:1],
            among.values[:1],
        )
        assert torch.equal(alone.run(launch, None, None), among.run(launch, None, None)[:1])


@pytest.mark.parametrize("implementation", [reference, launch])
@pytest.mark.parametrize("window", [None, 70])
def test_a_static_batch_gives_what_its_rows_give(
    implementation: ModuleType, window: int | None
) -> None:
    """Launched for the longest context, filled with shorter ones and a row of padding."""
    device = DEVICE if implementation is launch else "cpu"
    case = make([(130, 1), (0, 1), (63, 1)], (4, 2), 16, seed=2, device=device, span=64)
    table = torch.zeros(4, 20, dtype=torch.long, device=device)
    table[:3, : case.batch.block_table_RB.shape[1]] = case.batch.block_table_RB
    unused = set(range(len(case.cache[0]) // 16)) - set(
        case.batch.block_table_RB.flatten().tolist()
    )
    spare = 16 * unused.pop()
    batch = PagedBatch.static(
        torch.cat([case.batch.slot_mapping_T, torch.tensor([spare], device=device)]),
        table,
        torch.tensor([131, 1, 64, 1], dtype=torch.int32, device=device),
        longest=300,
        block_size=16,
        span=64,
    )
    padding = [torch.randn_like(part[0][-1:]) for part in (case.queries, case.keys, case.values)]
    static = Case(
        batch,
        case.cache,
        [*case.queries, padding[0]],
        [*case.keys, padding[1]],
        [*case.values, padding[2]],
    )
    out = static.run(implementation, window, None)
    assert torch.isfinite(out).all()
    expected = case.run(implementation, window, None)
    if implementation is launch:
        assert torch.equal(out[:3], expected)
    else:
        torch.testing.assert_close(out[:3], expected)


def test_an_engine_cuts_contexts_into_few_spans() -> None:
    assert span_of(100) == span_of(SPAN * MAX_SPANS) == SPAN
    assert span_of(131072) == 8192


def test_padding_slots_are_not_written() -> None:
    cache = torch.zeros(2, 4, 1, 8, device=DEVICE)
    new = torch.randn(2, 1, 8, device=DEVICE)
    launch.write_kv(cache[0], cache[1], new, new, torch.tensor([-1, 2], device=DEVICE))
    assert torch.equal(cache[0, 2], new[1])
    assert torch.count_nonzero(cache[0]) == torch.count_nonzero(new[1])
