"""What says how a prompt is made and an answer shown, through the official client."""

from __future__ import annotations

import httpx
import openai
import pytest
from fake_engine import KEY, FakeEngine
from test_bad_requests import CHAT, COMPLETION, COMPLETIONS, CONVERSATION, refused
from test_openai_client import scripted
from tiny_tokenizer import TEMPLATE

from deltaserve.engine.types import FinishReason, TokenEvent

HELLO = "Hello world, hello 😀 there."


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
def test_a_text_becomes_tokens_and_text_again(http, tokenizers, path):
    ids = tokenizers["chatty"].encode(HELLO)
    ask = {"model": "chatty", "prompt": HELLO, "return_token_strs": True}
    answer = http.post(path, json=ask).json()
    assert (answer["tokens"], answer["count"], answer["max_model_len"]) == (ids, len(ids), 200)
    assert len(answer["token_strs"]) == len(ids)
    back = http.post(path.replace("tokenize", "detokenize"), json={"tokens": [0, *ids]})
    assert back.json() == {"prompt": f"<s>{HELLO}"}


def test_a_conversation_becomes_the_tokens_of_its_prompt(http, engine):
    http.post(CHAT, json=CONVERSATION).raise_for_status()
    answer = http.post("/tokenize", json=CONVERSATION).json()
    assert tuple(answer["tokens"]) == engine.submitted[0].prompt_ids
    assert answer["token_strs"] is None
    without = http.post("/tokenize", json=CONVERSATION | {"add_generation_prompt": False}).json()
    assert without["count"] < answer["count"]


@pytest.mark.parametrize(("model", "template"), [("chatty", TEMPLATE), (None, None)])
def test_a_client_without_the_files_learns_what_prompts_are_made_of(http, model, template):
    answer = http.get("/tokenizer_info", params=model and {"model": model}).json()
    assert (answer["bos_token"], answer["eos_token"], answer["pad_token"]) == ("<s>", "</s>", None)
    assert answer["chat_template"] == template
    refused(http.get("/tokenizer_info", params={"model": "nope"}), 404)


def test_tokenize_needs_the_key(locked_url, engine):
    with httpx.Client(base_url=locked_url) as http:
        refused(http.get("/tokenizer_info"), 401)
        for path in ("/tokenize", "/detokenize"):
            refused(http.post(path, json={"prompt": "x"}), 401)
            right = {"authorization": f"Bearer {KEY}"}
            body = {"prompt": "x"} if path == "/tokenize" else {"tokens": [5]}
            assert http.post(path, json=body, headers=right).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", [], 400, None),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "model": "nope"}, 404, "model"),
        ("/tokenize", {"prompt": "x", "mood": 1}, 400, "mood"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", CONVERSATION | {"model": "base"}, 400, "model"),
        ("/tokenize", CONVERSATION | {"chat_template": "x"}, 400, "chat_template"),
        ("/detokenize", {"tokens": [400]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens.0"),
        ("/detokenize", {"tokens": "x"}, 400, "tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_tokenized(http, path, body, status, param):
    refused(http.post(path, json=body), status, param=param)


def test_prompts_are_cut_at_the_front(client, engine, tokenizers):
    ids = tokenizers["base"].encode(HELLO)
    ask = {"model": "base", "prompt": HELLO}
    client.completions.create(**ask, extra_body={"truncate_prompt_tokens": 3})
    client.completions.create(**ask, extra_body={"truncate_prompt_tokens": 500})
    client.completions.create(
        model="base", prompt=[5] * 300, max_tokens=50, extra_body={"truncate_prompt_tokens": -1}
    )
    found = [request.prompt_ids for request in engine.submitted]
    assert found == [tuple(ids[-3:]), tuple(ids), (5,) * 150]
    for wrong in (0, -2, 1.5):
        with pytest.raises(openai.BadRequestError, match="truncate_prompt_tokens"):
            client.completions.create(**ask, extra_body={"truncate_prompt_tokens": wrong})


def chat(client: openai.OpenAI, messages: list[dict], **extra) -> str:
    """The prompt, which the engine repeats."""
    answer = client.chat.completions.create(model="chatty", messages=messages, extra_body=extra)
    return answer.choices[0].message.content


def test_an_answer_may_go_on_with_the_last_message(client):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, I"}]
    asked = {"continue_final_message": True, "add_generation_prompt": False}
    assert chat(client, messages, **asked) == "user: hi\nassistant: Well, I"
    assert chat(client, messages, add_generation_prompt=False).endswith("Well, I\n")
    with pytest.raises(openai.BadRequestError, match="add_generation_prompt"):
        chat(client, messages, continue_final_message=True)


def test_templates_have_parameters(client):
    messages = [{"role": "user", "content": "hi"}]
    shouted = chat(client, messages, chat_template_kwargs={"mood": "loud"})
    assert shouted == "[loud]user: hi\nassistant:"
    for taken in ("messages", "tools", "tokenize", "chat_template"):
        with pytest.raises(openai.BadRequestError, match="chat_template_kwargs"):
            chat(client, messages, chat_template_kwargs={taken: 1})


def test_special_tokens_can_be_added_or_shown(client, engine, tokenizers):
    hi = tokenizers["base"].encode("hi")
    engine.script = lambda r: [TokenEvent(r.request_id, (2, *hi, 0, 1), FinishReason.STOP)]
    hidden = client.completions.create(model="base", prompt="x")
    shown = client.completions.create(
        model="base", prompt="x", extra_body={"skip_special_tokens": False}
    )
    assert hidden.choices[0].text == "hi"
    assert shown.choices[0].text == "<end>hi<s>"  # the end of the sequence is no text, as in vLLM
    assert shown.usage == hidden.usage


def test_what_ends_an_answer_can_be_kept(client, engine, tokenizers):
    ids = tokenizers["base"].encode("one two\n\nUser: three")
    engine.script = scripted(*[[token] for token in ids])
    ask = {"model": "base", "prompt": "x", "stop": ["\n\nUser:"]}
    keep = {"include_stop_str_in_output": True}
    assert client.completions.create(**ask).choices[0].text == "one two"
    kept = client.completions.create(**ask, extra_body=keep, logprobs=0)
    assert kept.choices[0].text == "one two\n\nUser:"
    chunks = client.completions.create(**ask, extra_body=keep, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "one two\n\nUser:"
    engine.script = lambda r: [TokenEvent(r.request_id, (*ids[:1], ids[1]), FinishReason.STOP)]
    stops = {"stop_token_ids": [ids[1]]}
    ended = client.completions.create(model="base", prompt="x", extra_body=stops | keep)
    assert ended.choices[0].text == tokenizers["base"].decode(ids[:2])


def test_priority_and_salt_reach_the_engine(client, engine: FakeEngine):
    extra = {"priority": -5, "cache_salt": "pepper"}
    client.completions.create(model="base", prompt="x", extra_body=extra, user="me")
    client.completions.create(model="base", prompt="x")
    found = [(request.priority, request.cache_salt) for request in engine.submitted]
    assert found == [(-5, "pepper"), (0, "")]


def test_counts_can_come_with_every_chunk(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.completions.create(
            model="base", prompt=HELLO, max_tokens=50, stream=True, stream_options=options
        )
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == counts[-2]


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("suffix", "x", "fill gaps"),
        ("best_of", 3, "ask for n"),
        ("bad_words", ["x"], "logit_bias"),
        ("request_id", "x", "x-request-id"),
        ("use_beam_search", True, "leave it out"),
        ("return_tokens_as_token_ids", True, "leave it out"),
        ("chat_template", "x", "chat_template_kwargs"),
        ("functions", [{}], "use tools"),
        ("priority", 2**40, "priority"),
        ("cache_salt", "", "cache_salt"),
    ],
)
def test_refusals_say_what_to_do(http, engine, field, value, remedy):
    for path, body in ((COMPLETIONS, COMPLETION), (CHAT, CONVERSATION)):
        assert remedy in refused(http.post(path, json=body | {field: value}), param=field)
    assert engine.submitted == []
