"""Scores of a real causal model: batched as alone, on answers only, against a reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaserve.errors import SelectionError
from deltaserve.select.pool import Pool, Sample
from deltaserve.select.tokens import ModelOptions, batches, tokenise
from deltaserve.select.utility import (
    SCORES,
    logit_scores,
    loss_difference,
    relevance,
    score_pool,
)
from tests.select.pools import make_causal, sentences, word_tokenizer, write_lines


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return str(make_causal(root / "base")), str(make_causal(root / "other", seed=1))


def chat(question, answer):
    turns = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    root = tmp_path_factory.mktemp("pools")
    texts, answers = sentences(30), sentences(30, seed=1)
    plain = write_lines(root / "text.jsonl", [{"text": text} for text in texts])
    chats = [chat(q, a) for q, a in zip(texts, answers, strict=True)]
    return {"text": Pool(plain), "messages": Pool(write_lines(root / "chat.jsonl", chats))}


@pytest.mark.parametrize("shape", ["text", "messages"])
def test_scores_are_means_over_the_answer_of_each_sample_alone(models, pools, shape):
    found = score_pool(pools[shape], ModelOptions(models[0], batch_tokens=60))
    model = AutoModelForCausalLM.from_pretrained(models[0]).eval()
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    for row, sample in enumerate(pools[shape].samples()):
        first = 1
        text = sample.text
        if sample.messages:
            question, answer = (m["content"] for m in sample.messages)
            text = f"user {question} assistant {answer}"
            first = 2 + len(question.split())
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        expected = logit_scores(logits[first - 1 :], ids[0, first:])
        for name in SCORES:
            assert found[name][row] == pytest.approx(float(expected[name].mean()), abs=1e-4)


def test_every_sample_is_in_one_batch_and_batches_keep_to_their_tokens():
    samples = [Sample(text) for text in sentences(300, seed=2, low=1, high=40)]
    options = ModelOptions("none", batch_tokens=100)
    rows = []
    for batch in batches(samples, word_tokenizer(), options):
        rows += batch.rows
        assert batch.ids_BT.numel() <= 100
        assert batch.ids_BT.shape[1] == batch.lengths_B.max()
    assert sorted(rows) == list(range(300))


def test_samples_longer_than_a_batch_go_alone():
    samples = [Sample(text) for text in sentences(5, low=30, high=40)]
    for batch in batches(samples, word_tokenizer(), ModelOptions("none", batch_tokens=8)):
        assert len(batch.rows) == 1


def test_a_sample_with_nothing_to_predict_scores_zero(tmp_path, models):
    long = " ".join(["red"] * 40)
    records = [{"text": ""}, {"text": "red"}]
    texts = Pool(write_lines(tmp_path / "a.jsonl", records))
    chats = Pool(write_lines(tmp_path / "b.jsonl", [chat(long, "blue")]))
    for pool in (texts, chats):
        for values in score_pool(pool, ModelOptions(models[0], max_length=30)).values():
            assert (values == 0).all()


def test_messages_need_a_chat_template(tmp_path, pools):
    path = make_causal(tmp_path / "model")
    word_tokenizer(chat=False).save_pretrained(path)
    (path / "chat_template.jinja").unlink()
    with pytest.raises(SelectionError, match="has no chat template: give text"):
        score_pool(pools["messages"], ModelOptions(str(path)))


def test_a_question_without_answer_is_scored_whole():
    only = Sample("red fox", ({"role": "user", "content": "red fox"},))
    tokens = tokenise(0, only, word_tokenizer(), 50)
    assert tokens.prompt == 1


def test_the_loss_difference_is_high_where_the_reference_knows_more(models, pools):
    pool = pools["messages"]
    options = ModelOptions(models[0])
    own, other = (score_pool(pool, ModelOptions(m))["loss"] for m in models)
    np.testing.assert_allclose(loss_difference(pool, options, models[1]), own - other)
    assert (loss_difference(pool, options, models[0]) == 0).all()


def test_relevance_is_the_cosine_to_the_nearest_target():
    rng = np.random.default_rng(0)
    x, targets = rng.normal(size=(30, 4)), rng.normal(size=(3, 4))
    cosines = (x @ targets.T) / np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(targets, axis=1))
    np.testing.assert_allclose(relevance(x, targets), cosines.max(axis=1), atol=1e-5)


def test_a_template_that_refuses_is_an_error():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(SelectionError, match="sample 7: the chat template refuses it: no system"):
        tokenise(7, Sample("x", ({"role": "system", "content": "x"},)), tokenizer, 50)


@pytest.mark.parametrize(
    ("options", "message"), [({"max_length": 1}, "2 tokens"), ({"batch_tokens": 0}, "1 up")]
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(SelectionError, match=message):
        ModelOptions("m", **options)
