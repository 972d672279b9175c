"""The official client against the server: whole and streamed answers, counts, choices, errors."""

from __future__ import annotations

import openai
import pytest
from fake_engine import KEY, FakeEngine
from tiny_tokenizer import TEMPLATE

from deltaserve.engine.types import FinishReason, TokenEvent

HELLO = "Hello world, hello 😀 there."


def scripted(*texts_tokens):
    """Every request answers with these groups of tokens, and ends for length."""

    def script(request):
        last = len(texts_tokens) - 1
        for i, tokens in enumerate(texts_tokens):
            reason = FinishReason.LENGTH if i == last else None
            yield TokenEvent(request.request_id, tuple(tokens), reason)

    return script


def test_models(client):
    cards = client.models.list().data
    assert [card.id for card in cards] == ["base", "chatty", "team/grown"]
    assert [card.parent for card in cards] == [None, "base", "base"]
    assert {card.root for card in cards} == {"base"}
    card = client.models.retrieve("team/grown")
    assert card.digest == "sha256:team/grown"
    assert card.bytes == {"full": 1000, "resident": 100, "disk": 90}


def test_completion(client, engine, tokenizers):
    answer = client.completions.create(model="chatty", prompt=HELLO, max_tokens=50)
    ids = tokenizers["chatty"].encode(HELLO)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == "chatty"
    assert answer.system_fingerprint.startswith("fp_")
    assert answer.choices[0].text == HELLO
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == len(ids) + 1  # the end of the sequence counts
    assert answer.usage.total_tokens == 2 * len(ids) + 1
    assert engine.submitted[0].prompt_ids == tuple(ids)
    assert engine.aborted == []


def test_defaults_are_those_of_openai(client, engine):
    client.completions.create(model="base", prompt=HELLO)
    client.chat.completions.create(model="chatty", messages=[{"role": "user", "content": "hi"}])
    completion, chat = (request.sampling for request in engine.submitted)
    assert (completion.max_tokens, completion.temperature, completion.top_p) == (16, 1.0, 1.0)
    assert (completion.top_k, completion.seed) == (0, None)
    assert chat.max_tokens == engine.max_model_len - len(engine.submitted[1].prompt_ids)


def test_sampling_values_reach_the_engine(client, engine):
    client.completions.create(
        model="base", prompt="a", temperature=0.5, top_p=0.9, seed=-3, max_tokens=7,
        extra_body={"top_k": 5},
    )  # fmt: skip
    client.completions.create(model="base", prompt="a", temperature=1e-9, extra_body={"top_k": -1})
    first, second = (request.sampling for request in engine.submitted)
    assert (first.temperature, first.top_p, first.top_k) == (0.5, 0.9, 5)
    assert (first.seed, first.max_tokens) == (-3, 7)
    assert (second.temperature, second.top_k) == (0.0, 0)


def test_what_is_asked_of_the_logits_reaches_the_engine(client, engine):
    client.completions.create(
        model="base", prompt="a", max_tokens=7, frequency_penalty=0.5, presence_penalty=-1,
        logit_bias={"5": -100, "7": 2.5},
        extra_body={"repetition_penalty": 1.2, "min_p": 0.1, "min_tokens": 3,
                    "stop_token_ids": [4, 9]},
    )  # fmt: skip
    sampling = engine.submitted[0].sampling
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.5, -1.0)
    assert (sampling.repetition_penalty, sampling.min_p, sampling.min_tokens) == (1.2, 0.1, 3)
    assert dict(sampling.logit_bias) == {5: -100.0, 7: 2.5}
    assert sampling.stop_token_ids == {1, 4, 9}


def test_ends_of_the_model_can_be_ignored(client, engine):
    client.completions.create(
        model="base", prompt="a", extra_body={"ignore_eos": True, "stop_token_ids": [4]}
    )
    assert engine.submitted[0].sampling.stop_token_ids == {4}


@pytest.mark.parametrize("model", ["base", "chatty"])
def test_end_tokens_are_the_models_own(client, engine, model):
    client.completions.create(model=model, prompt="a")
    assert engine.submitted[0].sampling.stop_token_ids == {"base": {1}, "chatty": {1, 2}}[model]


def test_prompts_in_every_form(client, engine, tokenizers):
    ids = tokenizers["base"].encode("the fox")
    for prompt in ("the fox", ["the fox"], ids, [ids]):
        answer = client.completions.create(model="base", prompt=prompt)
        assert answer.choices[0].text == "the fox"
    several = client.completions.create(model="base", prompt=["a", "the fox"], n=2)
    assert [choice.text for choice in several.choices] == ["a", "a", "the fox", "the fox"]
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.usage.prompt_tokens == 1 + len(ids)  # each prompt once, however many choices


def test_choices_have_seeds_of_their_own(client, engine):
    for _ in range(2):
        client.completions.create(model="base", prompt="a", n=3, seed=11)
    seeds = [request.sampling.seed for request in engine.submitted]
    assert seeds[:3] == seeds[3:]
    assert seeds[0] == 11
    assert len(set(seeds)) == 3
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)


def test_completion_stream(client):
    stream = client.completions.create(
        model="base", prompt=HELLO, max_tokens=50, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks[:-1]) == HELLO
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "stop"
    assert all(c.usage is None for c in chunks[:-1])
    assert chunks[-1].choices == []
    whole = client.completions.create(model="base", prompt=HELLO, max_tokens=50)
    assert chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1


def test_stream_of_several_choices(client):
    texts = {}
    for chunk in client.completions.create(model="base", prompt=["a b", "fox"], n=2, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == {0: "a b", 1: "a b", 2: "fox", 3: "fox"}


def test_chat(client, engine, tokenizers):
    messages = [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "2"}],
        },
        {"role": "assistant", "content": None},
    ]
    answer = client.chat.completions.create(model="chatty", messages=messages)
    prompt = "system: be brief\nuser: one\n2\nassistant: \nassistant:"
    assert engine.submitted[0].prompt_ids == tuple(tokenizers["chatty"].encode(prompt))
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == prompt
    assert answer.choices[0].finish_reason == "stop"


def test_an_answer_can_be_sent_back(client):
    messages = [{"role": "user", "content": "hi"}]
    answer = client.chat.completions.create(model="chatty", messages=messages)
    messages.append(answer.choices[0].message)
    assert client.chat.completions.create(model="chatty", messages=messages).choices


def test_chat_stream(client):
    chunks = list(
        client.chat.completions.create(
            model="chatty", messages=[{"role": "user", "content": HELLO}], stream=True, n=2
        )
    )
    for index in (0, 1):
        mine = [c.choices[0] for c in chunks if c.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert mine[0].delta.content == ""
        text = "".join(c.delta.content or "" for c in mine)
        assert text == f"user: {HELLO}\nassistant:"
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_of_chat(client, name):
    answer = client.chat.completions.create(
        model="chatty", messages=[{"role": "user", "content": HELLO}], **{name: 3}
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3


def test_a_stop_string_across_tokens_ends_the_work(client, engine, tokenizers):
    ids = tokenizers["base"].encode("one two\n\nUser: three")
    engine.script = scripted(*[[token] for token in ids])
    answer = client.completions.create(model="base", prompt="x", stop=["\n\nUser:", "zzz"])
    assert answer.choices[0].text == "one two"
    assert answer.choices[0].finish_reason == "stop"
    used = answer.usage.completion_tokens
    assert used < len(ids)
    assert "User:" in tokenizers["base"].decode(ids[:used])
    assert engine.aborted == [engine.submitted[0].request_id]

    chunks = client.completions.create(model="base", prompt="x", stop="\n\nUser:", stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "one two"


def test_a_special_end_token_is_never_text(client, engine, tokenizers):
    text = tokenizers["base"].encode("hi")
    engine.script = lambda r: [TokenEvent(r.request_id, (*text, 1), FinishReason.STOP)]
    answer = client.completions.create(model="base", prompt="x")
    assert answer.choices[0].text == "hi"
    assert answer.usage.completion_tokens == len(text) + 1


def test_unfinished_characters_come_at_the_end(client, engine, tokenizers):
    smile = tokenizers["base"].encode("ab😀")
    engine.script = scripted(*[[token] for token in smile[:-1]])
    chunks = list(client.completions.create(model="base", prompt="x", stream=True))
    assert [c.choices[0].text for c in chunks][-1] == "\ufffd"
    assert "".join(c.choices[0].text for c in chunks) == "ab\ufffd"


def test_a_fine_tune_has_its_own_tokens(client, engine, tokenizers):
    client.completions.create(model="team/grown", prompt="<<tool>>")
    client.completions.create(model="base", prompt="<<tool>>")
    grown, base = (request.prompt_ids for request in engine.submitted)
    assert len(grown) == 1
    assert len(base) > 1
    assert tokenizers["chatty"]._tokenizer is tokenizers["base"]._tokenizer  # shared in memory


def test_without_a_chat_template(client):
    with pytest.raises(openai.BadRequestError, match="has no chat template"):
        client.chat.completions.create(model="base", messages=[{"role": "user", "content": "x"}])


def test_a_template_may_refuse(client):
    assert "no aliens" in TEMPLATE
    with pytest.raises(openai.BadRequestError, match="no aliens"):
        client.chat.completions.create(model="chatty", messages=[{"role": "alien", "content": "x"}])


def test_unknown_model(client):
    with pytest.raises(openai.NotFoundError, match="/v1/models") as caught:
        client.completions.create(model="nope", prompt="x")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")


def test_prompt_longer_than_the_context(client, engine):
    for max_tokens, total in ((150, 230), (None, None)):
        prompt = [5] * (80 if max_tokens else 300)
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="base", prompt=prompt, max_tokens=max_tokens)
        assert caught.value.code == "context_length_exceeded"
        for number in (engine.max_model_len, len(prompt), total or 301):
            assert str(number) in caught.value.message
        # LiteLLM and others know the failure by these words of OpenAI's.
        assert f"maximum context length is {engine.max_model_len} tokens" in caught.value.message
    assert engine.submitted == []


def test_the_default_length_fits_in_what_is_left(client, engine):
    client.completions.create(model="base", prompt=[5] * 195)
    assert engine.submitted[0].sampling.max_tokens == 5


def test_a_failure_of_the_engine(client, engine, tokenizers):
    hi = tokenizers["base"].encode("hi")

    def script(request):
        yield TokenEvent(request.request_id, tuple(hi))
        yield TokenEvent(request.request_id, (), FinishReason.ERROR, "out of luck")

    engine.script = script
    with pytest.raises(openai.InternalServerError, match="out of luck"):
        client.completions.create(model="base", prompt="x")
    stream = client.completions.create(model="base", prompt="x", stream=True)
    assert next(stream).choices[0].text == "hi"
    with pytest.raises(openai.APIError, match="out of luck"):
        next(stream)


def test_an_unforeseen_failure_shows_nothing(client, engine):
    def script(request):
        raise ZeroDivisionError("secret")
        yield

    engine.script = script
    for n in (1, 2):
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="base", prompt="x", n=n)
        assert "secret" not in str(caught.value)
    assert len(engine.aborted) >= 1


def test_a_dead_engine(client, engine):
    engine.dead = True
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="base", prompt="x", stream=True)
    assert caught.value.status_code == 503


def test_api_key(locked_url, engine: FakeEngine):
    with openai.OpenAI(base_url=f"{locked_url}/v1", api_key=KEY, max_retries=0) as client:
        assert client.models.list().data
    with (
        openai.OpenAI(base_url=f"{locked_url}/v1", api_key="sk-wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.completions.create(model="base", prompt="x")
    assert caught.value.code == "invalid_api_key"
    assert engine.submitted == []
