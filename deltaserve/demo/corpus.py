"""Generic text for the base: circuits near the tasks, never the tasks.

A fine-tune is a small change only if its base already owns the parts.  So the
base learns to copy, to look up positions, the order of the alphabet and sums of
single columns, each asked for by a word of its own.  No document here asks what
a task asks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from deltaserve.demo.tasks import ITEMS, LETTERS, Example, pseudo_word


def _letters(rng: random.Random, low: int = 3, high: int = 7) -> str:
    return "".join(rng.choices(LETTERS, k=rng.randint(low, high)))


def _copy(rng: random.Random) -> Example:
    text = pseudo_word(rng, 3, 7) if rng.random() < 0.5 else _letters(rng)
    return Example(f"copy: {text}", text)


def _rotate(rng: random.Random) -> Example:
    text = _letters(rng)
    return Example(f"rotate: {text}", text[1:] + text[:1])


def _last_first(rng: random.Random) -> Example:
    text = _letters(rng)
    return Example(f"last first: {text}", text[-1] + text[:-1])


def _pairs(rng: random.Random) -> Example:
    text = _letters(rng)
    swapped = "".join(text[at : at + 2][::-1] for at in range(0, len(text), 2))
    return Example(f"swap pairs: {text}", swapped)


def _double(rng: random.Random) -> Example:
    text = _letters(rng, 3, 5)
    return Example(f"double: {text}", "".join(letter * 2 for letter in text))


def _tail(rng: random.Random) -> Example:
    text = _letters(rng)
    return Example(f"last three: {text}", text[-1] + text[-2] + text[-3] + text[0])


def _alphabet(rng: random.Random) -> Example:
    start, length = rng.randrange(26), rng.randint(3, 6)
    run = "".join(LETTERS[(start + step) % 26] for step in range(length))
    return Example(f"alphabet: {run[0]}{length}", run)


def _extremes(rng: random.Random) -> Example:
    """Last letter of the alphabet first, then the first, then the second."""
    text = rng.sample(LETTERS, rng.randint(3, 5))
    order = sorted(text)
    return Example(f"extremes: {''.join(text)}", order[-1] + order[0] + order[1])


def _between(rng: random.Random) -> Example:
    """The letters that come after the first one in the alphabet, as written."""
    text = rng.sample(LETTERS, rng.randint(3, 6))
    later = "".join(letter for letter in text[1:] if letter > text[0])
    return Example(f"later: {''.join(text)}", later or "-")


def _columns(rng: random.Random) -> Example:
    """Sums column by column with no carry between them: 47 85 -> 12 12."""
    left, right = rng.randint(10, 99), rng.randint(10, 99)
    tens, ones = left // 10 + right // 10, left % 10 + right % 10
    return Example(f"columns: {left} {right}", f"{tens:02d} {ones:02d}")


def _count(rng: random.Random) -> Example:
    start = rng.randint(10, 196)
    return Example(f"count: {start}", f"{start + 1} {start + 2}")


def _story(rng: random.Random) -> Example:
    name = pseudo_word(rng, 3, 5).capitalize()
    city = pseudo_word(rng, 3, 5).capitalize()
    count = rng.randint(2, 99)
    told = f"{name} from {city} wants {count} {rng.choice(ITEMS)}."
    return Example(f"story: {told}", f"{count} {city} {name}")


def _json(rng: random.Random) -> Example:
    key, value = pseudo_word(rng, 3, 5), pseudo_word(rng, 3, 5).capitalize()
    return Example(f"json: {key}={value}", f'{{"{key}":"{value}"}}')


# (weight, generator); weights follow how hard each is to learn.
_MIX: tuple[tuple[int, Callable[[random.Random], Example]], ...] = (
    (2, _copy),
    (2, _rotate),
    (2, _last_first),
    (2, _pairs),
    (1, _double),
    (3, _tail),
    (2, _alphabet),
    (4, _extremes),
    (3, _between),
    (5, _columns),
    (2, _count),
    (2, _story),
    (2, _json),
)


def documents(seed: int) -> Iterator[Example]:
    """Endless generic exchanges for the base, the same for the same seed."""
    rng = random.Random(f"corpus/{seed}")
    weights = [weight for weight, _ in _MIX]
    makers = [maker for _, maker in _MIX]
    while True:
        yield rng.choices(makers, weights)[0](rng)
