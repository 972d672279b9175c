"""Draws are repeatable, independent of the batch, and follow the distribution asked for."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.kernels.sampling import counter_uniform, sample

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
    size = top_k if 0 < top_k < len(logits) else len(logits)
    probs = probs[:size].softmax(0, dtype=torch.float64)
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
