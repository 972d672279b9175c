"""Logprobs are those of transformers' log_softmax, whatever else the step computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.compress.plan import make_plan
from deltaserve.compress.run import compress
from deltaserve.engine import logprobs
from deltaserve.engine.core import Engine
from deltaserve.engine.model import KVCache
from deltaserve.engine.types import EngineRequest, SamplingParams, TokenEvent, TokenLogprobs
from deltaserve.errors import RequestError
from tests.engine_helpers import BASE, make_engine, prompts
from tests.families import VOCAB, make_base, make_fine_tune

TOP = 3


def drain(engine: Engine, requests: list[EngineRequest]) -> dict[str, list[TokenEvent]]:
    """All events of each request."""
    events: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.check(request)
        engine.add(request)
    while engine.has_work():
        for event in engine.step():
            events[event.request_id].append(event)
    return events


def ask(name: str, model: str, prompt: list[int], **params: object) -> EngineRequest:
    defaults = {"max_tokens": 6, "logprobs": TOP, "prompt_logprobs": TOP, "seed": 1}
    sampling = SamplingParams(**{**defaults, **params})  # type: ignore[arg-type]
    return EngineRequest(name, model, tuple(prompt), sampling)


@torch.inference_mode()
def log_softmax(checkpoint: Path, ids: list[int]) -> torch.Tensor:
    """[T, V]: of each position, how likely each next token is."""
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)


def check_token(found: TokenLogprobs, token: int, expected_V: torch.Tensor) -> None:
    assert found.token_id == token
    assert found.logprob == pytest.approx(expected_V[token].item(), abs=1e-4)
    better = int((expected_V > expected_V[token] + 1e-4).sum())
    assert better < found.rank <= 1 + int((expected_V > expected_V[token] - 1e-4).sum())
    values, _ = expected_V.topk(TOP)
    assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert len(found.top) == TOP
    for token_id, value in found.top:
        assert value == pytest.approx(expected_V[token_id].item(), abs=1e-4)


def check_request(request: EngineRequest, events: list[TokenEvent], checkpoint: Path) -> None:
    prompt = list(request.prompt_ids)
    answer = [token for event in events for token in event.token_ids]
    expected_TV = log_softmax(checkpoint, prompt + answer)
    of_prompt = events[0].prompt_logprobs
    assert of_prompt is not None
    assert len(of_prompt) == len(prompt) - 1
    assert all(event.prompt_logprobs is None for event in events[1:])
    of_answer = [found for event in events for found in event.logprobs or ()]
    found = [*of_prompt, *of_answer]
    assert len(found) == len(prompt) + len(answer) - 1
    for position, (token, one) in enumerate(zip((prompt + answer)[1:], found, strict=True)):
        check_token(one, token, expected_TV[position])


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma2", "mistral"])
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Path], dict[str, Path]]:
    """A base, two deltas (one with added tokens), and every model's checkpoint."""
    root = tmp_path_factory.mktemp(request.param)
    base = make_base(request.param, root / "base")
    deltas, checkpoints = {}, {BASE: base}
    for seed, grown in ((1, 0), (2, 3)):
        name = f"tune{seed}"
        checkpoints[name] = make_fine_tune(base, root / name, seed=seed, added_tokens=grown)
        deltas[name] = root / f"{name}.delta"
        compress(base, checkpoints[name], deltas[name], make_plan(codec="raw"))
    return base, deltas, checkpoints


def test_they_are_those_of_transformers_in_a_mixed_batch(family) -> None:
    base, deltas, checkpoints = family
    names = [BASE, *deltas] * 2
    requests = [
        # What is asked of the logits does not show in the logprobs.
        ask(f"{name}{i}", name, prompt, temperature=0.7, presence_penalty=1.0)
        for i, (name, prompt) in enumerate(zip(names, prompts(6, vocab=VOCAB), strict=True))
    ]
    events = drain(make_engine(base, deltas), requests)
    for request in requests:
        check_request(request, events[request.request_id], checkpoints[request.model])


def test_chunked_prefill_and_preemption_keep_them_right(family, monkeypatch) -> None:
    base, deltas, checkpoints = family
    per_token = KVCache.bytes_per_token(Checkpoint.open(base).hf_config, torch.float32)
    engine = make_engine(
        base,
        deltas,
        max_num_batched_tokens=7,
        max_num_seqs=4,
        block_size=4,
        max_model_len=48,
        kv_cache_memory_bytes=48 * per_token,
    )
    # Prompts' logits a few rows at a time, as with a large vocabulary.
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 3 * 4 * VOCAB)
    names = [BASE, *deltas] * 2
    requests = [
        ask(f"{name}{i}", name, prompt, max_tokens=14)
        for i, (name, prompt) in enumerate(zip(names, prompts(6, vocab=VOCAB), strict=True))
    ]
    events = drain(engine, requests)
    assert engine.stats().preemptions > 0
    for request in requests:
        check_request(request, events[request.request_id], checkpoints[request.model])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base("llama", tmp_path_factory.mktemp("llama") / "base")


def test_a_cached_prompt_is_computed_again_for_its_logprobs(llama: Path) -> None:
    engine = make_engine(llama, {}, block_size=4)
    prompt = prompts(1, vocab=VOCAB, seed=5)[0] * 3
    plain = ask("plain", BASE, prompt, logprobs=None, prompt_logprobs=None)
    assert drain(engine, [plain])["plain"][0].num_cached == 0
    events = drain(engine, [ask("scored", BASE, prompt)])["scored"]
    check_request(ask("scored", BASE, prompt), events, llama)
    assert events[0].num_cached == 0
    assert drain(engine, [replace(plain, request_id="again")])["again"][0].num_cached > 0


def test_a_prompt_can_be_scored_without_an_answer(llama: Path) -> None:
    engine = make_engine(llama, {}, max_model_len=32)
    prompt = (prompts(1, vocab=VOCAB, seed=6, longest=40)[0] * 32)[:32]  # the whole context
    request = ask("scored", BASE, prompt, max_tokens=0, logprobs=None)
    (event,) = drain(engine, [request])["scored"]
    assert (event.token_ids, event.logprobs, event.finish_reason) == ((), None, "length")
    check_request(request, [event], llama)
    assert engine.stats().generation_tokens == 0
    with pytest.raises(RequestError, match="max_tokens must be at least 1"):
        engine.check(ask("nothing", BASE, prompt, max_tokens=0, prompt_logprobs=None))


def test_no_top_tokens_still_gives_the_tokens_own(llama: Path) -> None:
    request = ask("r", BASE, [5, 6, 7], logprobs=0, prompt_logprobs=0)
    events = drain(make_engine(llama, {}), [request])["r"]
    found = [*(events[0].prompt_logprobs or ()), *(one for e in events for one in e.logprobs or ())]
    assert len(found) == 8
    assert all(one.top == () and one.logprob < 0 and one.rank >= 1 for one in found)


def test_who_does_not_ask_does_not_pay(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_: object) -> None:
        raise AssertionError("logprobs were computed")

    monkeypatch.setattr(logprobs, "describe", unexpected)
    request = ask("r", BASE, [5, 6, 7], logprobs=None, prompt_logprobs=None)
    events = drain(make_engine(llama, {}), [request])["r"]
    assert all(event.logprobs is None and event.prompt_logprobs is None for event in events)
