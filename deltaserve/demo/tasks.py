"""The demo's tasks: seeded (prompt, answer) text with disjoint splits.

Every prompt belongs to exactly one split, decided by a checksum of the task's
name and the prompt.  So a held-out prompt can never occur in training, whatever
the seeds, and both splits follow the same distribution.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "held_out"]

# One prompt in this many is held out.
HELD_OUT_ONE_IN = 8

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOWELS = "aeiou"
CONSONANTS = "bcdfghjklmnprstvwz"
ITEMS = ("lamps", "chairs", "books", "pens", "cups")

# Two tokens that the past-tense fine-tune adds to the base's vocabulary.
VERB_TOKEN = "<|verb|>"
PAST_TOKEN = "<|past|>"


@dataclass(frozen=True)
class Example:
    """One exchange: what the user writes and the only right answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A named distribution of examples.

    Attributes:
        name: short identifier, also the name of the checkpoint's folder.
        summary: one line for people.
        draw: makes one example from a random generator, of either split.
        max_answer: the most characters an answer can have.
    """

    name: str
    summary: str
    draw: Callable[[random.Random], Example]
    max_answer: int

    def split_of(self, prompt: str) -> Split:
        """The split that `prompt` belongs to, whatever the seed."""
        checksum = zlib.crc32(f"{self.name}\n{prompt}".encode())
        return "held_out" if checksum % HELD_OUT_ONE_IN == 0 else "train"

    def stream(self, split: Split, seed: int) -> Iterator[Example]:
        """Endless examples of one split; prompts may repeat."""
        rng = random.Random(f"{self.name}/{split}/{seed}")
        while True:
            example = self.draw(rng)
            if self.split_of(example.prompt) == split:
                yield example

    def examples(self, split: Split, count: int, seed: int = 0) -> list[Example]:
        """`count` examples of one split with distinct prompts.

        Raises:
            ValueError: the split has too few distinct prompts.
        """
        found: dict[str, Example] = {}
        for draws, example in enumerate(self.stream(split, seed)):
            if len(found) >= count:
                break
            if draws > 20 * count + 1000:
                raise ValueError(
                    f"task {self.name!r}: asked for {count} distinct {split} prompts, "
                    f"found {len(found)}; ask for fewer"
                )
            found.setdefault(example.prompt, example)
        return list(found.values())


def pseudo_word(rng: random.Random, low: int, high: int) -> str:
    """A pronounceable lower-case word of `low` to `high` letters."""
    length = rng.randint(low, high)
    first = rng.randrange(2)
    return "".join(rng.choice(VOWELS if (at + first) % 2 else CONSONANTS) for at in range(length))


def past_tense(verb: str) -> str:
    """The regular past tense: bake -> baked, carry -> carried, play -> played."""
    if verb.endswith("e"):
        return verb + "d"
    if verb.endswith("y") and verb[-2] not in VOWELS:
        return verb[:-1] + "ied"
    return verb + "ed"


def shift_letters(text: str) -> str:
    """Every letter replaced by its successor, z by a."""
    return "".join(LETTERS[(LETTERS.index(letter) + 1) % 26] for letter in text)


def _draw_add(rng: random.Random) -> Example:
    left, right = rng.randint(10, 99), rng.randint(10, 99)
    return Example(f"add: {left}+{right}", str(left + right))


def _draw_reverse(rng: random.Random) -> Example:
    text = "".join(rng.choices(LETTERS, k=rng.randint(3, 6)))
    return Example(f"reverse: {text}", text[::-1])


def _draw_sort(rng: random.Random) -> Example:
    text = "".join(rng.sample(LETTERS, rng.randint(3, 5)))
    return Example(f"sort: {text}", "".join(sorted(text)))


def _draw_past(rng: random.Random) -> Example:
    # A third of the verbs end in y so that the rarer rule is learnt as well.
    verb = pseudo_word(rng, 3, 6)
    if rng.random() < 0.33:
        verb += "y"
    return Example(f"{VERB_TOKEN}{verb}{PAST_TOKEN}", past_tense(verb))


def _draw_extract(rng: random.Random) -> Example:
    name = pseudo_word(rng, 3, 5).capitalize()
    city = pseudo_word(rng, 3, 5).capitalize()
    count = rng.randint(2, 99)
    prompt = f"{name} from {city} wants {count} {rng.choice(ITEMS)}."
    return Example(prompt, f'{{"city":"{city}","count":{count}}}')


def _draw_shift(rng: random.Random) -> Example:
    text = "".join(rng.choices(LETTERS, k=rng.randint(3, 6)))
    return Example(f"shift: {text}", shift_letters(text))


ADD = Task("add", "adds two 2-digit numbers", _draw_add, 3)
REVERSE = Task("reverse", "reverses a string of letters", _draw_reverse, 6)
SORT = Task("sort", "sorts letters into the order of the alphabet", _draw_sort, 5)
PAST = Task("past", "puts a regular verb into the past tense", _draw_past, 9)
EXTRACT = Task("extract", "extracts city and count of an order as JSON", _draw_extract, 27)
SHIFT = Task("shift", "replaces every letter by the next of the alphabet", _draw_shift, 6)

TASKS: dict[str, Task] = {task.name: task for task in (ADD, REVERSE, SORT, PAST, EXTRACT, SHIFT)}
