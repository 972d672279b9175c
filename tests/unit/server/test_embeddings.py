"""Embeddings through the official client, which asks for base64 unless told otherwise."""

from __future__ import annotations

import openai
import pytest
from test_bad_requests import refused

EMBEDDINGS = "/v1/embeddings"


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_every_input_has_its_vector(client, engine, tokenizers, encoding):
    asked = {} if encoding is None else {"encoding_format": encoding}
    ids = tokenizers["chatty"].encode("the fox")
    answer = client.embeddings.create(model="chatty", input=["the fox", "a"], **asked)
    if encoding != "base64":  # the client decodes what it asked for itself
        first, second = (item.embedding for item in answer.data)
        assert first == pytest.approx([3 / (9 + 16 * len(ids) ** 2) ** 0.5, first[1]])
        assert sum(x * x for x in first) == pytest.approx(1)
        assert second == pytest.approx([0.6, 0.8])
    assert [item.index for item in answer.data] == [0, 1]
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (len(ids) + 1, len(ids) + 1)
    assert [r.sampling.pooling for r in engine.submitted] == ["last", "last"]
    assert [r.sampling.max_tokens for r in engine.submitted] == [0, 0]


def test_forms_of_input_and_fields(client, engine):
    extra = {"pooling": "mean", "truncate_prompt_tokens": 2, "cache_salt": "s", "priority": 3}
    client.embeddings.create(model="base", input=[[5, 6, 7]], extra_body=extra)
    client.embeddings.create(model="base", input=[5, 6, 7])
    first, second = engine.submitted
    assert (first.prompt_ids, first.sampling.pooling) == ((6, 7), "mean")
    assert (first.cache_salt, first.priority) == ("s", 3)
    assert second.prompt_ids == (5, 6, 7)


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("input", {"input": ""}), ("input", {"input": []}), ("input", {"input": ["a", ""]}),
        ("input", {"input": [400]}), ("input", {"input": [5] * 300}), ("input", {"input": 5}),
        ("dimensions", {"dimensions": 8}), ("pooling", {"pooling": "max"}),
        ("encoding_format", {"encoding_format": "int8"}), ("temperature", {"temperature": 1}),
    ],
)  # fmt: skip
def test_what_is_refused(http, engine, param, body):
    refused(http.post(EMBEDDINGS, json={"model": "base", "input": "x"} | body), param=param)
    assert engine.submitted == []


def test_unknown_models(client):
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="nope", input="x")
