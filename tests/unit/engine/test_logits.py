"""What requests may ask of their logits, one by one, and that neighbours do not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from deltaserve.engine.logits import adjust
from deltaserve.engine.sequence import Sequence
from deltaserve.engine.types import EngineRequest, SamplingParams
from tests.engine_helpers import BASE, make_engine, run
from tests.families import make_base

VOCAB = 20


def sequence(prompt: list[int], answer: list[int], **params: Any) -> Sequence:
    request = EngineRequest("r", BASE, tuple(prompt), SamplingParams(max_tokens=9, **params))
    seq = Sequence(request, slot=0, seed=0)
    seq.token_ids += answer
    return seq


def adjusted(seq: Sequence, logits_V: torch.Tensor) -> torch.Tensor:
    logits_SV = logits_V[None].clone()
    adjust(logits_SV, [seq])
    return logits_SV[0]


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(3))


def test_neutral_settings_change_nothing(logits: torch.Tensor) -> None:
    assert torch.equal(adjusted(sequence([1, 2], [3]), logits), logits)


def test_logit_bias(logits: torch.Tensor) -> None:
    changed = adjusted(sequence([1], [], logit_bias=((4, 2.5), (7, -100.0))), logits)
    expected = logits.clone()
    expected[4] += 2.5
    expected[7] -= 100
    assert torch.equal(changed, expected)


def test_frequency_and_presence_count_the_answer_only(logits: torch.Tensor) -> None:
    seq = sequence([5, 5, 6], [6, 8, 8, 8], frequency_penalty=0.5, presence_penalty=0.25)
    expected = logits.clone()
    expected[6] -= 0.5 + 0.25
    expected[8] -= 1.5 + 0.25
    torch.testing.assert_close(adjusted(seq, logits), expected)


def test_repetition_penalty_is_that_of_transformers(logits: torch.Tensor) -> None:
    seq = sequence([5, 5, 6], [8], repetition_penalty=1.3)
    ids = torch.tensor([seq.token_ids])
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits[None].clone())[0]
    torch.testing.assert_close(adjusted(seq, logits), expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_min_p_is_that_of_transformers(logits: torch.Tensor, temperature: float) -> None:
    changed = adjusted(sequence([1], [], min_p=0.2, temperature=temperature), logits)
    warped = MinPLogitsWarper(0.2)(torch.tensor([[1]]), logits[None] / temperature)[0]
    assert torch.equal(changed.isinf(), warped.isinf())
    assert changed.isinf().any()


def test_no_end_before_min_tokens(logits: torch.Tensor) -> None:
    params: dict[str, Any] = {"min_tokens": 2, "stop_token_ids": frozenset({3, 9, 500})}
    early = adjusted(sequence([1], [7], **params), logits)
    assert early.isinf().nonzero().flatten().tolist() == [3, 9]
    assert torch.equal(adjusted(sequence([1], [7, 7], **params), logits), logits)


def test_rows_do_not_touch_each_other(logits: torch.Tensor) -> None:
    both = torch.stack([logits, logits])
    adjust(both, [sequence([1], [2]), sequence([1], [2], presence_penalty=1.0)])
    assert torch.equal(both[0], logits)
    assert not torch.equal(both[1], logits)


def test_they_hold_through_a_whole_answer(tmp_path: Path) -> None:
    engine = make_engine(make_base("llama", tmp_path / "base"), {})

    def ask(name: str, **params: Any) -> list[int]:
        sampling = SamplingParams(max_tokens=30, temperature=0.0, **params)
        request = EngineRequest(name, BASE, (5, 6, 7), sampling)
        return run(engine, [request]).tokens[name]

    free = ask("free")
    assert len(set(free)) < 30
    unrepeated = ask("unrepeated", logit_bias=((free[0], -100.0),), presence_penalty=2.0)
    assert free[0] not in unrepeated
    ends = frozenset(free)
    assert len(ask("ends", stop_token_ids=ends)) == 1
    late = ask("late", stop_token_ids=ends, min_tokens=12)
    assert not ends & set(late[:12])
