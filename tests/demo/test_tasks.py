import itertools
import re

import pytest

from deltaserve.demo import corpus
from deltaserve.demo.tasks import (
    PAST_TOKEN,
    TASKS,
    VERB_TOKEN,
    Task,
    past_tense,
    shift_letters,
)

NAMES = sorted(TASKS)


@pytest.mark.parametrize("name", NAMES)
def test_examples_repeat_with_their_seed(name: str) -> None:
    task = TASKS[name]
    assert task.examples("train", 50, seed=3) == task.examples("train", 50, seed=3)
    assert task.examples("train", 50, seed=3) != task.examples("train", 50, seed=4)


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_no_prompt(name: str) -> None:
    task = TASKS[name]
    held_out = {example.prompt for example in task.examples("held_out", 300, seed=1)}
    trained = {e.prompt for e in itertools.islice(task.stream("train", seed=2), 5000)}
    assert len(held_out) == 300
    assert not held_out & trained
    assert all(task.split_of(prompt) == "held_out" for prompt in held_out)


def _expected(task: Task, prompt: str) -> str:
    """The answer, worked out from the prompt in another way than the generator's."""
    asked = prompt.partition(": ")[2]
    if task.name == "add":
        return str(sum(map(int, asked.split("+"))))
    if task.name == "reverse":
        return "".join(reversed(asked))
    if task.name == "sort":
        return "".join(letter for letter in "abcdefghijklmnopqrstuvwxyz" if letter in asked)
    if task.name == "shift":
        return "".join(chr((ord(letter) - 96) % 26 + 97) for letter in asked)
    if task.name == "past":
        return past_tense(prompt.removeprefix(VERB_TOKEN).removesuffix(PAST_TOKEN))
    found = re.fullmatch(r"\w+ from (\w+) wants (\d+) \w+\.", prompt)
    assert found is not None
    return f'{{"city":"{found[1]}","count":{found[2]}}}'


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_right(name: str) -> None:
    task = TASKS[name]
    for example in task.examples("train", 200) + task.examples("held_out", 200):
        assert example.answer == _expected(task, example.prompt)
        assert 0 < len(example.answer) <= task.max_answer


def test_rules_of_the_rewriting_tasks() -> None:
    assert [past_tense(v) for v in ("walk", "bake", "carry", "play")] == [
        "walked", "baked", "carried", "played",
    ]  # fmt: skip
    assert shift_letters("azb") == "bac"


def test_too_many_distinct_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="distinct held_out prompts"):
        TASKS["add"].examples("held_out", 3000)


def test_generic_text_asks_no_task() -> None:
    documents = list(itertools.islice(corpus.documents(0), 5000))
    assert documents == list(itertools.islice(corpus.documents(0), 5000))
    asked = {document.prompt for document in documents}
    for task in TASKS.values():
        assert not asked & {e.prompt for e in task.examples("train", 500)}
    starts = tuple(f"{name}: " for name in NAMES)
    assert not [prompt for prompt in asked if prompt.startswith((*starts, VERB_TOKEN))]
