"""Passes over a vocabulary in blocks: what one softmax over all of it gives."""

from __future__ import annotations

import pytest
import torch

from deltaserve.compress import weights
from deltaserve.compress.compare import compare_tokens
from deltaserve.compress.sensitivity import _drawn
from deltaserve.compress.weights import Table

TOKENS, WIDTH, VOCABULARY = 23, 8, 50
# Values at a time: everything, blocks of 7 tokens and a last one of 1, one token each.
CHUNKS = [1 << 20, 7 * TOKENS, 1]


def bent(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    return cap * (logits / cap).tanh() if cap else logits


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_two_models_are_compared_as_by_whole_softmaxes(
    chunk: int, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    states = [torch.randn(TOKENS, WIDTH) for _ in range(2)]
    heads = [torch.randn(VOCABULARY, WIDTH) for _ in range(2)]
    targets = torch.randint(VOCABULARY, (TOKENS,))
    monkeypatch.setattr(weights, "CHUNK", chunk)
    found = compare_tokens(*states, *(Table(None, head) for head in heads), targets, cap)
    p, q = (
        bent(x.double() @ head.double().T, cap).log_softmax(1)
        for x, head in zip(states, heads, strict=True)
    )
    kl = (p.exp() * (p - q)).sum(1)
    torch.testing.assert_close(found.kl_N, kl.float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.top_fine_tune_N, p.argmax(1))
    assert torch.equal(found.top_delta_N, q.argmax(1))
    for mine, whole in ((found.nll_fine_tune_N, p), (found.nll_delta_N, q)):
        wanted = -whole.gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(mine, wanted.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_equal_models_do_not_diverge(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    state, head = torch.randn(TOKENS, WIDTH), Table(None, torch.randn(VOCABULARY, WIDTH))
    monkeypatch.setattr(weights, "CHUNK", chunk)
    found = compare_tokens(state, state, head, head, torch.zeros(TOKENS, dtype=torch.long), None)
    assert found.kl_N.tolist() == [0.0] * TOKENS
    assert bool(found.agrees_N.all())


def test_nearly_equal_models_diverge_by_as_much_as_they_do() -> None:
    """A thousandth of what single precision leaves of logits of this size."""
    torch.manual_seed(2)
    state, head = torch.randn(TOKENS, WIDTH), 3 * torch.randn(20_000, WIDTH)
    other = state + 1e-3 * torch.randn(TOKENS, WIDTH)
    targets = torch.zeros(TOKENS, dtype=torch.long)
    found = compare_tokens(state, other, Table(None, head), Table(None, head), targets, None)
    p, q = ((x.double() @ head.double().T).log_softmax(1) for x in (state, other))
    kl = (p.exp() * (p - q)).sum(1)
    assert float(found.kl_N.double().mean()) == pytest.approx(float(kl.mean()), rel=0.1)


@pytest.mark.parametrize("cap", [None, 3.0])
def test_gradients_are_those_of_tokens_that_the_model_draws(
    cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    head, lots = torch.randn(VOCABULARY, WIDTH), torch.rand(TOKENS, dtype=torch.float64)
    state = torch.randn(TOKENS, WIDTH).requires_grad_()
    p = bent(state @ head.T, cap).softmax(1)
    drawn = (p.detach().double().cumsum(1) <= lots[:, None]).sum(1)
    nll = -p.gather(1, drawn[:, None]).log().sum()
    (wanted,) = torch.autograd.grad(nll, state)
    bend = 1 - (state @ head.T / cap).tanh().square() if cap else torch.ones(())
    squares = (p * (1 - p) * bend.square()).sum(0).detach()
    for chunk in CHUNKS:
        monkeypatch.setattr(weights, "CHUNK", chunk)
        total = torch.zeros(VOCABULARY)
        found = _drawn(state.detach(), Table(None, head), cap, lots, total)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(total, squares, rtol=1e-4, atol=1e-6)


def test_the_highest_lot_draws_a_token() -> None:
    state, head = torch.randn(1, WIDTH), torch.randn(VOCABULARY, WIDTH)
    lots = torch.tensor([1 - 2**-53], dtype=torch.float64)
    found = _drawn(state, Table(None, head), None, lots, torch.zeros(VOCABULARY))
    p = (state @ head.T).softmax(1)
    gaps = (p @ head - head - found).norm(dim=1)
    assert float(gaps.min()) < 1e-4
