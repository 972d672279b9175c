"""Chat templates with loss masks, tokenizing, length buckets, padding."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from deltaserve.errors import PipelineError
from deltaserve.pipeline import Plan, open_pipeline
from deltaserve.pipeline.tokenizers import tokenizer_of
from deltaserve.pipeline.tokenizing import mask_of
from tests.pipeline.pipelines import TEMPLATE, chats, stream, texts, tokenizer, write_lines

CHAT = [
    {"role": "user", "content": "the cat sees"},
    {"role": "assistant", "content": "a dog"},
    {"role": "user", "content": "red"},
    {"role": "assistant", "content": "house"},
]
MARKED = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|> {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} {{ eos_token }}{% endgeneration %} "
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
# Drops what the assistant said before the last turn.
REWRITING = (
    "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }} "
    "{% endif %}{% endfor %}"
)


def masked(folder: Path, name: str, messages: Any = CHAT) -> list[str]:
    """The tokens that the loss is taken of."""
    source = Plan.from_jsonl(write_lines(folder / "c.jsonl", [{"messages": messages}]))
    (row,) = open_pipeline(source.chat_template(name).tokenize(name))
    words = tokenizer_of(name).convert_ids_to_tokens(row["input_ids"].tolist())
    return [word for word, mask in zip(words, row["loss_mask"], strict=True) if mask]


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
def test_the_loss_is_on_the_assistants_words(tmp_path: Path, template: str) -> None:
    name = tokenizer(tmp_path / "tokenizer", template=template)
    assert masked(tmp_path, name) == ["a", "dog", "</s>", "house", "</s>"]


def test_an_assistant_that_opens(tmp_path: Path) -> None:
    name = tokenizer(tmp_path / "tokenizer")
    assert masked(tmp_path, name, CHAT[1:3]) == ["a", "dog", "</s>"]


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    name = tokenizer(tmp_path / "tokenizer", template=REWRITING)
    with pytest.raises(PipelineError, match=r"row 0 \(.*rewrites earlier turns.*generation"):
        masked(tmp_path, name)


@pytest.mark.parametrize("spaces", ["kept", "trimmed", "marked", "dropped"])
def test_masks_are_those_of_the_tokens_places(spaces: str) -> None:
    """Also where a character is of several tokens, or of none, and with tokens of no place."""
    draw = random.Random(spaces)
    letters = "ab  \n\t.é漢🙂👩‍👩‍👧"
    backend = _trained(spaces, ["".join(draw.choices("ab ", k=40)) for _ in range(50)])
    for _ in range(300):
        text = "".join(draw.choices(letters, k=draw.randint(1, 30)))
        ends = sorted(draw.choices(range(len(text) + 1), k=4))
        spans = [(ends[0], ends[1]), (ends[2], ends[3])]
        if draw.random() < 0.5:
            backend.enable_truncation(draw.randint(3, 12))
        encoding = backend.encode(text)
        backend.no_truncation()
        expected = [0] * len(encoding)
        for start, end in spans:
            inside = [max(a, start) < min(b, end) for a, b in encoding.offsets]
            at = [number for number, each in enumerate(inside) if each]
            for number in range(at[0], at[-1] + 1) if at else ():
                expected[number] = 1
        assert mask_of(spans, encoding).tolist() == expected, (text, spans)


def _trained(spaces: str, sentences: list[str]) -> Tokenizer:
    """Byte level BPE or words, with a token of the tokenizer's own at both ends."""
    made = Tokenizer(models.BPE(unk_token="?", byte_fallback=spaces == "marked"))
    before: Any = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if spaces in ("marked", "dropped"):
        made.normalizer = normalizers.NFKC()
        before = pre_tokenizers.Metaspace() if spaces == "marked" else pre_tokenizers.Whitespace()
    made.pre_tokenizer = before
    alphabet = pre_tokenizers.ByteLevel.alphabet() if spaces in ("kept", "trimmed") else []
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)] if spaces == "marked" else []
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<s>", "?", *bytes_],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    made.train_from_iterator(sentences, trainer)
    ends = processors.TemplateProcessing(single="<s> $A <s>", special_tokens=[("<s>", 0)])
    trim = processors.ByteLevel(trim_offsets=spaces == "trimmed")
    made.post_processor = processors.Sequence([trim, ends]) if alphabet else ends
    return made


def test_special_tokens_are_written_once(tmp_path: Path) -> None:
    name = tokenizer(tmp_path / "tokenizer")
    source = Plan.from_jsonl(chats(tmp_path / "c.jsonl", 30))
    for row in open_pipeline(source.chat_template(name).tokenize(name)):
        assert (row["input_ids"] == tokenizer_of(name).bos_token_id).sum() == 1


@pytest.mark.parametrize(
    ("messages", "message"),
    [([], "one or more entries"), ("hello", "messages"), ([{"content": "x"}], "role")],
)
def test_conversations_that_are_none(tmp_path: Path, messages: Any, message: str) -> None:
    name = tokenizer(tmp_path / "tokenizer")
    with pytest.raises(PipelineError, match=message):
        masked(tmp_path, name, messages)


def test_a_tokenizer_without_a_template_is_told_before_anything_runs(tmp_path: Path) -> None:
    name = tokenizer(tmp_path / "tokenizer", template=None)
    source = Plan.from_jsonl(chats(tmp_path / "c.jsonl", 3))
    with pytest.raises(PipelineError, match=r"no chat template: add chat_template\.jinja"):
        open_pipeline(source.chat_template(name))


def test_no_tokenizer(tmp_path: Path) -> None:
    source = Plan.from_jsonl(texts(tmp_path / "a.jsonl", 3))
    with pytest.raises(PipelineError, match="no usable tokenizer"):
        open_pipeline(source.tokenize(tmp_path))


def test_a_missing_field_names_row_and_fields(tmp_path: Path) -> None:
    name = tokenizer(tmp_path / "tokenizer")
    records = [{"text": "the cat"}] * 70 + [{"body": "x"}]
    source = Plan.from_jsonl(write_lines(tmp_path / "a.jsonl", records))
    with pytest.raises(
        PipelineError, match=r"row 70 \(.*line 71\): no field 'text'; its fields are body"
    ):
        stream(source.tokenize(name), threads=2)


def test_each_thread_has_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    """One shared by threads raises "Already borrowed"."""
    name = tokenizer(tmp_path / "tokenizer")
    source = Plan.from_jsonl(texts(tmp_path / "a.jsonl", 1500))
    plan = source.tokenize(name, max_length=8)
    assert stream(plan, threads=8) == stream(plan)


def test_buckets_give_batches_of_similar_length(tmp_path: Path) -> None:
    name = tokenizer(tmp_path / "tokenizer")
    source = Plan.from_jsonl(texts(tmp_path / "a.jsonl", 1000)).tokenize(name)
    plain = list(open_pipeline(source.batch(8, pad=0)))
    bucketed = list(open_pipeline(source.bucket([4, 8, 16, 32, 64]).batch(8, pad=0)))
    assert padding(bucketed) < padding(plain) / 2
    assert sorted(documents(bucketed)) == sorted(documents(plain))
    assert all(len(batch["id"]) == 8 for batch in bucketed)


def test_padded_batches(tmp_path: Path) -> None:
    records = [{"input_ids": [3, 4, 5], "loss_mask": [0, 1, 1]},
               {"input_ids": [6], "loss_mask": [1]}]  # fmt: skip
    source = Plan.from_jsonl(write_lines(tmp_path / "a.jsonl", records))
    (batch,) = open_pipeline(source.batch(2, pad=9))
    assert batch["input_ids"].tolist() == [[3, 4, 5], [6, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 4, 5], [6, -100, -100]]
    (batch,) = open_pipeline(source.batch(2, pad=9, pad_to=5))
    assert batch["input_ids"].shape == (2, 5)
    with pytest.raises(PipelineError, match="does not fit pad_to=2"):
        list(open_pipeline(source.batch(2, pad=9, pad_to=2)))
    with pytest.raises(PipelineError, match="different lengths: give pad="):
        list(open_pipeline(source.batch(2)))
    assert len(list(open_pipeline(source.repeat(3).batch(4, pad=0, drop_remainder=True)))) == 1


def padding(batches: list[Any]) -> float:
    places = sum(batch["input_ids"].size for batch in batches)
    return 1 - sum(int(batch["attention_mask"].sum()) for batch in batches) / places


def documents(batches: list[Any]) -> list[list[int]]:
    return [
        ids[mask > 0].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], np.asarray(batch["attention_mask"]), strict=True)
    ]
