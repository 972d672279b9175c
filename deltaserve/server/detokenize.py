"""From token ids to text while they arrive: whole characters only, up to a stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from deltaserve.engine.types import TokenLogprobs


class Decoder(Protocol):
    """What the detokeniser needs of a tokenizer."""

    special_ids: frozenset[int]
    """Tokens that never show in text."""
    byte_ids: frozenset[int]
    """Tokens such as ``<0xE2>`` that stand for one byte (SentencePiece's byte fallback)."""

    def decode(self, token_ids: Sequence[int]) -> str: ...


class Detokenizer:
    """Text of a growing sequence; the parts together equal ``decode`` of the whole.

    A token's text depends on what stands before it (a leading space is dropped at the
    start of a sequence; a character may span tokens), so each part is the difference of two
    decodings that both begin at the previous part: ``decode(context + new) - decode(context)``.
    The cost per token does not grow with the sequence.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._window: list[int] = []
        self._context_tokens = 0
        self._context_chars = 0

    def push(self, token_id: int) -> str:
        """Text that this token completes, perhaps none."""
        if token_id in self._decoder.special_ids:
            return ""
        self._window.append(token_id)
        # A run of byte tokens is decided as a whole: one bad byte spoils the others' characters.
        if token_id in self._decoder.byte_ids:
            return ""
        text = self._decoder.decode(self._window)
        # U+FFFD at the end: the first bytes of a character whose rest has not arrived.
        if text.endswith("\ufffd") or len(text) <= self._context_chars:
            return ""
        return self._take(text)

    def finish(self) -> str:
        """Text that was waiting for bytes that will not come."""
        return self._take(self._decoder.decode(self._window))

    def _take(self, text: str) -> str:
        new = text[self._context_chars :]
        self._window = self._window[self._context_tokens :]
        self._context_tokens = len(self._window)
        self._context_chars = len(self._decoder.decode(self._window))
        return new


class StopStrings:
    """Cuts a stream of text before the stop string that is complete first.

    Text that may be the beginning of a stop string is held back until that is decided.
    """

    def __init__(self, stops: Sequence[str], *, keep: bool = False) -> None:
        """keep: cut behind it instead."""
        self._stops = stops
        self._keep = keep
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """Text that is certain to precede any stop string."""
        text = self._held + text
        ends = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        if ends:
            self.hit = True
            self._held = ""
            end, start = min(ends)
            return text[: end if self._keep else start]
        cut = len(text) - self._undecided(text)
        self._held = text[cut:]
        return text[:cut]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop string begins."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


@dataclass(frozen=True, slots=True)
class Token:
    """A token whose text is visible. offset: where in the text it begins, in characters."""

    token_id: int
    offset: int
    logprobs: TokenLogprobs | None
    echoed: bool = False
    """Of the prompt."""


class TextStream:
    """The visible text of one choice: detokenised, cut at stop strings."""

    def __init__(
        self,
        decoder: Decoder,
        stops: Sequence[str],
        *,
        keep_stop: bool = False,
        track: bool = False,
    ) -> None:
        """keep_stop: the stop string is part of the text. track: remember the tokens behind the
        text, for ``take``."""
        self._detokenizer = Detokenizer(decoder)
        self._stops = StopStrings(stops, keep=keep_stop)
        self._track = track
        self._tokens: deque[Token] = deque()
        self._length = 0  # of all text so far
        self._visible = 0  # of what was given out
        self.num_tokens = 0
        """Tokens used, those of the stop string included, those after it not."""

    @property
    def stopped(self) -> bool:
        """A stop string was found; nothing follows."""
        return self._stops.hit

    def echo(self, prompt_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None) -> str:
        """The prompt's text, which no stop string cuts. ``logprobs``: from its second token on."""
        known = [None, *logprobs] if logprobs is not None else [None] * len(prompt_ids)
        parts = [
            self._detokenise(token_id, found, echoed=True)
            for token_id, found in zip(prompt_ids, known, strict=True)
        ]
        self._visible = self._length
        return "".join(parts)

    def push(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None = None
    ) -> str:
        parts = []
        for index, token_id in enumerate(token_ids):
            self.num_tokens += 1
            text = self._detokenise(token_id, logprobs[index] if logprobs else None)
            if text:
                parts.append(self._stops.push(text))
                if self.stopped:
                    break
        return self._show("".join(parts))

    def push_end(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """The stop token that ended the answer: it counts as generated, but is not text."""
        self.num_tokens += 1
        if self._track:
            self._tokens.append(Token(token_id, self._length, logprobs))

    def finish(self) -> str:
        """What is left once the last token has been pushed."""
        rest = self._detokenizer.finish()
        self._length += len(rest)
        text = self._stops.push(rest)
        return self._show(text if self.stopped else text + self._stops.finish())

    def take(self, *, all_left: bool = False) -> tuple[Token, ...]:
        """The tokens, in order, whose text has become visible since the last call.

        all_left: at the end, those without text too; but none that a stop string cut away.
        """
        taken = []
        while self._tokens:
            first = self._tokens[0]
            if not (
                first.echoed or first.offset < self._visible or (all_left and not self.stopped)
            ):
                break
            taken.append(self._tokens.popleft())
        return tuple(taken)

    def _detokenise(
        self, token_id: int, logprobs: TokenLogprobs | None, *, echoed: bool = False
    ) -> str:
        if self._track:
            self._tokens.append(Token(token_id, self._length, logprobs, echoed))
        text = self._detokenizer.push(token_id)
        self._length += len(text)
        return text

    def _show(self, text: str) -> str:
        self._visible += len(text)
        return text
