"""Texts of a wanted number of tokens, for a server whose tokenizer is not known here.

Prompts are made-up words of equal length, as many as two measured requests say are needed; the
server's own count is what gets reported. Or they are token ids, and then exact.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
WORDS = [a + b + c + d for a in CONSONANTS for b in VOWELS for c in CONSONANTS for d in VOWELS]

Segment = tuple[str, int]
"""A seed and a number of tokens: equal seeds begin with equal text."""


@dataclass(frozen=True)
class Renderer:
    """tokens_per_word and overhead (of the template and special tokens) are the server's."""

    tokens_per_word: float = 1.0
    overhead: float = 0.0
    token_ids: tuple[int, int] | None = None
    salt: str = ""
    """Other salts give other texts: a second run must not find the first one's in a cache."""

    def prompt(self, segments: Sequence[Segment]) -> str | list[int]:
        """A text, or token ids, of the segments one after the other."""
        if self.token_ids is not None:
            ids = range(*self.token_ids)
            parts = (self._random(seed).choices(ids, k=count) for seed, count in segments)
            return list(itertools.chain.from_iterable(parts))
        words: list[str] = []
        wanted = -self.overhead
        for seed, count in segments:
            wanted += count
            missing = round(wanted / self.tokens_per_word) - len(words)
            words += self._random(seed).choices(WORDS, k=max(0, missing))
        return " ".join(words) or WORDS[0]

    def _random(self, seed: str) -> random.Random:
        return random.Random(f"{self.salt} {seed}")

    @classmethod
    def calibrated(cls, short: tuple[int, int], long: tuple[int, int]) -> Renderer:
        """From two (words, tokens that the server counted)."""
        slope = (long[1] - short[1]) / (long[0] - short[0])
        # A count that does not grow with the text says nothing about its tokens.
        return cls(slope, short[1] - slope * short[0]) if slope > 0 else cls()
