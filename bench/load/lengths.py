"""How many tokens a prompt has, and how many are generated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from deltaserve.bench.load.reading import count_of, csv_lines, read_json, read_text
from deltaserve.bench.load.schema import positive
from deltaserve.errors import ConfigError

TOKENS_PER_WORD = 4 / 3
"""Of English, to tell the length of an answer of which only the text is known."""


@dataclass(frozen=True)
class Fixed:
    kind: ClassVar[str] = "fixed"
    SHORT: ClassVar[str] = "tokens"
    tokens: int

    def __post_init__(self) -> None:
        positive(tokens=self.tokens)

    def draws(self, rng: np.random.Generator) -> Iterator[int]:
        while True:
            yield self.tokens


@dataclass(frozen=True)
class Lognormal:
    """Of mean ``mean`` and coefficient of variation ``cv`` before it is cut to [min, max]."""

    kind: ClassVar[str] = "lognormal"
    mean: float
    cv: float = 1.0
    min: int = 1
    max: int = 1 << 20

    def __post_init__(self) -> None:
        positive(mean=self.mean, cv=self.cv, min=self.min)
        if self.max < self.min:
            raise ValueError(f"max is {self.max}, less than min, which is {self.min}")

    def draws(self, rng: np.random.Generator) -> Iterator[int]:
        sigma = math.sqrt(2 * math.log(math.hypot(1.0, self.cv)))
        mu = math.log(self.mean) - sigma**2 / 2
        while True:
            yield min(self.max, max(self.min, round(rng.lognormal(mu, sigma))))


@dataclass(frozen=True)
class Data:
    """Drawn from a column of a CSV file."""

    kind: ClassVar[str] = "data"
    path: str
    column: str

    def draws(self, rng: np.random.Generator) -> Iterator[int]:
        values = read_column(Path(self.path), self.column)
        while True:
            yield int(rng.choice(values))


@dataclass(frozen=True)
class ShareGpt:
    """First question and length of its answer, of conversations drawn from a file in ShareGPT's
    format (a JSON list of objects with ``conversations``). Only for prompts."""

    kind: ClassVar[str] = "sharegpt"
    path: str

    def pairs(self, rng: np.random.Generator) -> Iterator[tuple[str, int]]:
        """(question, tokens of the answer)"""
        found = read_sharegpt(Path(self.path))
        while True:
            yield found[int(rng.integers(len(found)))]


Lengths = Fixed | Lognormal | Data
Prompts = Fixed | Lognormal | Data | ShareGpt


def read_column(path: Path, column: str) -> list[int]:
    """Raises ConfigError: unreadable, no such column, or a value that is not a positive number."""
    values = []
    for number, line in csv_lines(path, read_text(path)):
        try:
            values.append(count_of(line, column, 1))
        except KeyError:
            columns = ", ".join(map(str, line))
            raise ConfigError(f"{path}: no column {column!r}; it has {columns}") from None
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
    if not values:
        raise ConfigError(f"{path}: holds no lengths")
    return values


def read_sharegpt(path: Path) -> list[tuple[str, int]]:
    content = read_json(path)
    pairs = [pair for each in content for pair in _first_pair(each)] if _is_list(content) else []
    if not pairs:
        raise ConfigError(
            f"{path}: no conversation in ShareGPT's format, a list of objects with "
            "'conversations' of {'from', 'value'}"
        )
    return pairs


def _first_pair(conversation: dict) -> Iterator[tuple[str, int]]:
    turns = conversation.get("conversations")
    if not isinstance(turns, list) or not _is_list(turns) or len(turns) < 2:
        return
    question, answer = (turn.get("value") for turn in turns[:2])
    if isinstance(question, str) and isinstance(answer, str) and question and answer:
        yield question, max(1, round(len(answer.split()) * TOKENS_PER_WORD))


def _is_list(content: object) -> bool:
    return isinstance(content, list) and all(isinstance(each, dict) for each in content)
