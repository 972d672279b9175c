import itertools

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deltaserve.demo import corpus
from deltaserve.demo.tasks import PAST_TOKEN, TASKS, VERB_TOKEN, Example
from deltaserve.demo.tokenizer import (
    BOS,
    EOS,
    EXTRACT_CHAT_TEMPLATE,
    build_tokenizer,
    render,
)

ADDED = (VERB_TOKEN, PAST_TOKEN)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    found = list(itertools.islice(corpus.documents(0), 500))
    for task in TASKS.values():
        found += task.examples("train", 100) + task.examples("held_out", 100)
    return found


@pytest.mark.parametrize("added", [(), ADDED])
def test_every_prompt_and_answer_survives(examples: list[Example], added: tuple[str, ...]) -> None:
    tokenizer = build_tokenizer(added=added)
    texts = [text for example in examples for text in (example.prompt, example.answer)]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_letters_of_a_task_stay_single_tokens() -> None:
    tokenizer = build_tokenizer()
    for text in ("count", "json", "from"):
        assert len(tokenizer.encode(text, add_special_tokens=False)) == len(text)


def test_added_tokens_come_after_the_vocabulary() -> None:
    base, grown = build_tokenizer(), build_tokenizer(added=ADDED)
    assert len(grown) == len(base) + 2
    assert grown.convert_tokens_to_ids(list(ADDED)) == [len(base), len(base) + 1]
    prompt = f"{VERB_TOKEN}walk{PAST_TOKEN}"
    assert len(grown.encode(prompt, add_special_tokens=False)) == 6
    assert len(base.encode(prompt, add_special_tokens=False)) > 6


def test_plain_text_starts_with_bos_and_a_chat_has_one() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer("abc")["input_ids"][0] == tokenizer.bos_token_id
    chat = render(tokenizer, "copy: abc")
    assert chat == f"{BOS}<|user|>copy: abc<|assistant|>"
    assert tokenizer.encode(chat, add_special_tokens=False).count(tokenizer.bos_token_id) == 1


def test_templates_differ_and_close_answers() -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
    ]
    plain = build_tokenizer().apply_chat_template(messages, tokenize=False)
    own = build_tokenizer(EXTRACT_CHAT_TEMPLATE).apply_chat_template(messages, tokenize=False)
    assert plain == f"{BOS}<|system|>be brief<|user|>hi<|assistant|>ho{EOS}"
    assert own == f"{BOS}<|system|>JSON<|user|>hi<|assistant|>ho{EOS}"


def test_saved_tokenizer_is_the_same(tmp_path, examples: list[Example]) -> None:
    made = build_tokenizer(EXTRACT_CHAT_TEMPLATE, ADDED)
    made.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    assert loaded.chat_template == made.chat_template
    texts = [render(made, example.prompt) for example in examples]
    assert loaded(texts)["input_ids"] == made(texts)["input_ids"]
