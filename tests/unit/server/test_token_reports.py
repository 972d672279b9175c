"""Logprobs, echo and token ids through the official client: they agree with the text."""

from __future__ import annotations

import openai
import pytest
from fake_engine import scored
from test_bad_requests import COMPLETION, COMPLETIONS, refused

from deltaserve.engine.types import FinishReason, TokenEvent

TEXT = "the fox 😀 jumps"


def spelled(tokens: list[str]) -> bytes:
    """The text behind tokens as OpenAI spells them."""
    parts = []
    for token in tokens:
        if token.startswith("bytes:"):
            parts.append(bytes(int(pair, 16) for pair in token[6:].split("\\x")[1:]))
        else:
            parts.append(token.encode())
    return b"".join(parts)


def completion(client: openai.OpenAI, **asked):
    """A whole completion's choice, and the same streamed: (choice, choice)."""
    extra = {"extra_body": asked.pop("extra_body")} if "extra_body" in asked else {}
    asked = {"model": "base", "prompt": TEXT, "max_tokens": 50} | asked
    whole = client.completions.create(**asked, **extra).choices[0]
    chunks = [c.choices[0] for c in client.completions.create(**asked, **extra, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        streamed = [x for c in chunks if c.logprobs for x in getattr(c.logprobs, field)]
        assert streamed == (getattr(whole.logprobs, field) if whole.logprobs else [])
    assert chunks[-1].finish_reason == whole.finish_reason
    return whole, chunks


def test_logprobs_of_a_completion(client, tokenizers):
    ids = tokenizers["base"].encode(TEXT)
    choice, _ = completion(client, logprobs=2)
    found = choice.logprobs
    assert spelled(found.tokens) == TEXT.encode() + b"</s>"
    assert found.token_logprobs == [scored(token, 0)[0].logprob for token in [*ids, 1]]
    assert all(len(top) == 2 for top in found.top_logprobs[:-1])
    assert all(
        top[token] == logprob == max(top.values())
        for token, logprob, top in zip(
            found.tokens, found.token_logprobs, found.top_logprobs, strict=True
        )
    )
    assert found.text_offset[0] == 0
    assert found.text_offset[-1] == len(TEXT)
    for start, end, token in zip(
        found.text_offset, found.text_offset[1:], found.tokens, strict=False
    ):
        if not token.startswith("bytes:"):
            assert choice.text[start:end] == token


def test_without_logprobs_nothing_is_reported(client, engine):
    choice, _ = completion(client)
    assert choice.logprobs is None
    assert not hasattr(choice, "token_ids")
    assert engine.submitted[0].sampling.logprobs is None
    assert engine.submitted[0].sampling.prompt_logprobs is None
    zero, _ = completion(client, logprobs=0)
    assert len(zero.logprobs.tokens) == len(zero.logprobs.token_logprobs) > 0


def test_echo(client, engine):
    choice, _ = completion(client, echo=True)
    assert choice.text == TEXT + TEXT
    assert choice.logprobs is None
    assert engine.submitted[0].sampling.prompt_logprobs is None
    both, _ = completion(client, echo=True, logprobs=3)
    assert spelled(both.logprobs.tokens) == (TEXT + TEXT).encode() + b"</s>"
    assert both.logprobs.token_logprobs[0] is None
    assert both.logprobs.top_logprobs[0] is None
    assert None not in both.logprobs.token_logprobs[1:]
    assert both.logprobs.text_offset[-1] == len(TEXT + TEXT)


def test_a_prompt_alone_is_scored(client, engine, tokenizers):
    ids = tokenizers["base"].encode(TEXT)
    choice, _ = completion(client, prompt=ids, echo=True, logprobs=1, max_tokens=0)
    assert choice.text == TEXT
    assert choice.finish_reason == "length"
    assert len(choice.logprobs.tokens) == len(ids)
    assert engine.submitted[0].sampling.max_tokens == 0
    usage = client.completions.create(model="base", prompt=ids, echo=True, max_tokens=0).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), 0)


def test_every_choice_is_echoed(client):
    answer = client.completions.create(
        model="base", prompt=["a b", "fox"], n=2, echo=True, logprobs=1, max_tokens=1
    )
    assert [choice.text[:3] for choice in answer.choices] == ["a b", "a b", "fox", "fox"]
    assert all(choice.logprobs.token_logprobs[0] is None for choice in answer.choices)


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize(
    ("stop", "left"),
    [("jump", "the fox 😀 "), ("😀", "the fox "), ("x 😀 jumps", "the fo"), ("the", "")],
)
def test_no_token_is_reported_of_cut_text(client, tokenizers, stop, left, echo):
    choice, chunks = completion(
        client, stop=stop, logprobs=1, echo=echo, extra_body={"return_token_ids": True}
    )
    shown = (TEXT if echo else "") + left
    assert choice.text == shown
    tokens = choice.logprobs.tokens
    assert spelled(tokens).startswith(shown.encode())
    # Each begins inside the text; the last may end behind it.
    assert all(offset < len(shown) for offset in choice.logprobs.text_offset)
    assert len(spelled(tokens[:-1]).decode(errors="replace")) < len(shown) + (not shown)
    own = len(tokens) - (len(tokenizers["base"].encode(TEXT)) if echo else 0)
    assert len(choice.token_ids) == own
    assert [i for chunk in chunks for i in chunk.token_ids] == choice.token_ids


def test_logprobs_of_a_chat(client):
    ask = {
        "model": "chatty", "messages": [{"role": "user", "content": TEXT}], "logprobs": True,
        "top_logprobs": 2,
    }  # fmt: skip
    answer = client.chat.completions.create(**ask)
    content = answer.choices[0].logprobs.content
    text = b"".join(bytes(token.bytes) for token in content)
    assert text == answer.choices[0].message.content.encode() + b"</s>"
    assert all(len(token.top_logprobs) == 2 for token in content)
    assert all(token.top_logprobs[0].token == token.token for token in content)
    streamed = [
        token
        for chunk in client.chat.completions.create(**ask, stream=True)
        for token in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert streamed == content
    alone = client.chat.completions.create(**ask | {"top_logprobs": None})
    assert all(token.top_logprobs == [] for token in alone.choices[0].logprobs.content)


def test_prompt_logprobs_are_those_of_vllm(client, tokenizers):
    ids = tokenizers["chatty"].encode(TEXT)
    extra = {"prompt_logprobs": 1, "return_token_ids": True}
    choice = client.completions.create(model="base", prompt=ids, extra_body=extra).choices[0]
    assert choice.prompt_token_ids == ids
    first, *rest = choice.prompt_logprobs
    assert first is None
    for token, entries in zip(ids[1:], rest, strict=True):
        assert set(entries) == {str(token)}
        assert entries[str(token)]["rank"] == 1
        assert entries[str(token)]["logprob"] == scored(token, 0)[0].logprob
    chat = client.chat.completions.create(
        model="chatty", messages=[{"role": "user", "content": TEXT}], extra_body=extra
    )
    assert len(chat.prompt_logprobs) == len(chat.prompt_token_ids) == chat.usage.prompt_tokens
    assert len(chat.choices[0].token_ids) == chat.usage.completion_tokens


def test_token_ids_of_streams(client, tokenizers):
    ids = tokenizers["base"].encode(TEXT)
    extra = {"return_token_ids": True}
    ask = {"model": "chatty", "messages": [{"role": "user", "content": TEXT}], "stream": True}
    chunks = list(client.chat.completions.create(**ask, extra_body=extra))
    found = [i for c in chunks for i in getattr(c.choices[0], "token_ids", None) or []]
    assert found == [*chunks[0].prompt_token_ids, 1]
    assert not any(hasattr(chunk, "prompt_token_ids") for chunk in chunks[1:])
    chunks = list(
        client.completions.create(model="base", prompt=TEXT, stream=True, extra_body=extra)
    )
    assert chunks[0].choices[0].prompt_token_ids == ids
    assert [i for c in chunks for i in c.choices[0].token_ids] == [*ids, 1]


def test_tokens_that_read_alike_keep_the_likelier(client, engine):
    """A token that is half a character is spelled by its bytes, and is never lost."""
    one = scored(7, 3)
    engine.script = lambda r: [TokenEvent(r.request_id, (7,), FinishReason.LENGTH, logprobs=one)]
    choice = client.completions.create(model="base", prompt="x", logprobs=3).choices[0]
    (top,) = choice.logprobs.top_logprobs
    assert max(top.values()) == choice.logprobs.token_logprobs[0] == one[0].logprob


@pytest.mark.parametrize(
    ("asked", "param"),
    [({"prompt_logprobs": 20}, "prompt_logprobs"), ({"echo": True, "logprobs": 20}, "logprobs")],
)
def test_no_answer_repeats_millions_of_logprobs(http, engine, asked, param):
    many = {"prompt": [[5] * 30] * 16, "n": 128, "max_tokens": 1}
    refused(http.post(COMPLETIONS, json=COMPLETION | many | asked), param=param)
    assert engine.submitted == []
    few = {"prompt": [[5] * 30] * 16, "n": 8, "max_tokens": 1}
    assert http.post(COMPLETIONS, json=COMPLETION | few | asked).status_code == 200
