"""Draws are repeatable, independent of the batch, and follow the distribution asked for."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from deltaserve.kernels.sampling import Draw, counter_uniform
from deltaserve.kernels.sampling import sample as sample_fast
from deltaserve.kernels.sampling.batched import CANDIDATES, launch
from deltaserve.kernels.sampling.reference import sample

seeds = st.integers(-(2**63), 2**64)


def draw(
    logits: torch.Tensor, *, temperature: float, top_k: int, top_p: float, uniform: torch.Tensor
) -> torch.Tensor:
    rows = len(uniform)
    return sample(
        logits.expand(rows, -1),
        torch.full((rows,), temperature),
        torch.full((rows,), top_k),
        torch.full((rows,), top_p, dtype=torch.float64),
        uniform,
    )


@given(seeds, st.integers(0, 10**6))
def test_uniform_is_in_range_and_repeatable(seed: int, position: int) -> None:
    value = counter_uniform(seed, position)
    assert 0.0 <= value < 1.0
    assert value == counter_uniform(seed, position)


def test_uniform_is_uniform_over_positions_and_over_seeds() -> None:
    for values in (
        [counter_uniform(1, position) for position in range(20_000)],
        [counter_uniform(seed, 3) for seed in range(20_000)],
    ):
        counts = torch.histc(torch.tensor(values), bins=20, min=0, max=1)
        # Each bin expects 1000 with a standard deviation of 31.
        assert (counts - 1000).abs().max() < 160


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=40),
    st.floats(0.1, 3.0),
    st.integers(0, 45),
    st.floats(0.01, 1.0),
)
def test_only_tokens_inside_top_k_and_top_p_are_drawn(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    row = torch.tensor(logits)
    uniform = torch.linspace(0, 1 - 1e-12, 101, dtype=torch.float64)
    drawn = draw(row, temperature=temperature, top_k=top_k, top_p=top_p, uniform=uniform)
    probs, order = (row / temperature).sort(descending=True, stable=True)
    if 0 < top_k < len(logits):  # with what is as likely as the k-th
        probs = probs[probs >= probs[top_k - 1]]
    size = len(probs)
    probs = probs.softmax(0, dtype=torch.float64)
    before = probs.cumsum(0) - probs
    allowed = order[:size][(before < top_p + 1e-9)]
    assert set(drawn.tolist()) <= {*allowed.tolist(), int(order[0])}


def test_frequencies_follow_the_probabilities() -> None:
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    uniform = torch.tensor([counter_uniform(7, i) for i in range(40_000)], dtype=torch.float64)
    drawn = draw(probs.log(), temperature=1.0, top_k=0, top_p=1.0, uniform=uniform)
    shares = torch.bincount(drawn, minlength=4) / len(uniform)
    assert (shares - probs).abs().max() < 0.01


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 50)
    temperature = torch.tensor([0.0, 0.7, 1.0, 0.0, 1.5])
    top_k, top_p = torch.tensor([0, 5, 0, 3, 9]), torch.tensor([1.0, 0.9, 0.5, 1.0, 1.0]).double()
    uniform = torch.rand(5, dtype=torch.float64)
    together = sample(logits, temperature, top_k, top_p, uniform)
    for i in range(5):
        one = slice(i, i + 1)
        alone = sample(logits[one], temperature[one], top_k[one], top_p[one], uniform[one])
        assert alone.item() == together[i].item()
    assert together[0] == logits[0].argmax()


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.tensor([0.0, float("-inf"), 1.0, float("-inf")])
    uniform = torch.linspace(0, 1 - 1e-15, 64, dtype=torch.float64)
    drawn = draw(logits, temperature=2.0, top_k=0, top_p=1.0, uniform=uniform)
    assert set(drawn.tolist()) == {0, 2}


settings_of_a_row = st.tuples(
    st.sampled_from([0.0, 0.3, 1.0, 2.0]),  # temperature
    st.sampled_from([0, 0, 1, 2, 50, 5000]),  # top_k
    st.sampled_from([1.0, 1.0, 0.95, 0.5, 0.01]),  # top_p
    st.floats(0, 1, exclude_max=True),
)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(settings_of_a_row, min_size=1, max_size=6),
    size=st.sampled_from([1, 3, 255, 256, 257, 1024, 3000]),
    spread=st.sampled_from([0.0, 0.1, 3.0, 30.0]),
    coarse=st.booleans(),
    masked=st.sampled_from([0.0, 0.5, 0.97]),
    seed=st.integers(0, 10**6),
)
def test_the_fast_path_draws_the_tokens_of_the_reference(
    rows, size: int, spread: float, coarse: bool, masked: float, seed: int
) -> None:
    """Flat and peaked distributions, many equal logits, masked tokens, candidates that suffice
    and that do not."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(len(rows), size, generator=generator)
    if coarse:
        logits = logits.to(torch.bfloat16).float().round()
    gone = torch.rand(logits.shape, generator=generator) < masked
    gone[:, seed % size] = False
    logits.masked_fill_(gone, float("-inf"))
    temperature, top_k, top_p, uniform = zip(*rows, strict=True)
    expected = sample(
        logits,
        torch.tensor(temperature),
        torch.tensor(top_k),
        torch.tensor(top_p, dtype=torch.float64),
        torch.tensor(uniform, dtype=torch.float64),
    )
    draws = [Draw(t, k, p, u) if t else None for t, k, p, u in rows]
    assert sample_fast(logits.clone(), draws) == expected.tolist()
    for row, token in enumerate(expected.tolist()):
        assert logits[row, token] > float("-inf")


def test_the_fast_path_leaves_the_logits_alone() -> None:
    logits = torch.randn(3, 4 * CANDIDATES)
    before = logits.clone()
    sample_fast(logits, [Draw(1.0, 0, 1.0, 0.3), None, Draw(1.0, 0, 0.9, 0.3)])
    sample_fast(logits[:1], [Draw(1.0, 0, 1.0, 0.3)])
    assert torch.equal(logits, before)


def test_frequencies_of_the_fast_path_follow_the_probabilities() -> None:
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = torch.full((5000, 600), float("-inf"))
    logits[:, [0, 255, 256, 599]] = probs.log()
    for top_p in (1.0, 0.999):
        draws = [Draw(1.0, 0, top_p, counter_uniform(3, i)) for i in range(len(logits))]
        drawn = torch.tensor(sample_fast(logits, draws))
        shares = torch.tensor([(drawn == token).float().mean() for token in (0, 255, 256, 599)])
        assert (shares - probs).abs().max() < 0.03


def test_nothing_waits_for_the_device_before_the_tokens_are_read() -> None:
    """Operations whose shapes or control flow need values raise in fake tensors."""
    draws = [None, Draw(0.7, 0, 1.0, 0.3), Draw(1.0, 5, 0.9, 0.6), Draw(1.3, 0, 0.4, 0.1)]
    with FakeTensorMode():
        logits = torch.empty(4, 3 * CANDIDATES)
        for some in (draws, draws[:1] * 4, draws[1:2] * 4, draws[2:] * 2):
            tokens, enough = launch(logits, some)
            assert (tokens.shape, tokens.dtype) == ((4,), torch.long)
            assert (enough.shape, enough.dtype) == ((4,), torch.bool)
