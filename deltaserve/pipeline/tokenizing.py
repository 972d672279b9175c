"""From text to token ids, a list of rows at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from deltaserve.errors import PipelineError
from deltaserve.pipeline.elements import field_of
from deltaserve.pipeline.rows import Row, RowError
from deltaserve.pipeline.tokenizers import tokenizer_of


class Tokenize:
    """Adds "input_ids" int32 [T], and "loss_mask" uint8 [T] (1: the assistant's) where the row
    has "spans"; removes the text and the spans, which nothing after this needs."""

    def __init__(self, node: Any) -> None:
        self.name = node.name or node.op
        params = node.params
        self.tokenizer: str = params["tokenizer"]
        self.text: str = params["text"]
        self.max_length: int | None = params["max_length"]
        self.special: bool | None = params["special_tokens"]
        self.together: int = params["together"]
        tokenizer_of(self.tokenizer)  # a missing one is told before anything runs

    def __call__(self, rows: list[Row]) -> list[Row]:
        out: list[Row] = []
        for at in range(0, len(rows), self.together):
            out += self._tokenize(rows[at : at + self.together])
        return out

    def _tokenize(self, rows: list[Row]) -> list[Row]:
        texts = [field_of(row, self.text, self.name) for row in rows]
        for row, text in zip(rows, texts, strict=True):
            if not isinstance(text, str):
                what = f"{self.text!r} is a {type(text).__name__}, not a text"
                raise RowError(self.name, row.key, what)
        # A chat template has written its special tokens into the text.
        special = [self._special(row) for row in rows]
        if len(set(special)) > 1:
            return [made for row in rows for made in self._tokenize([row])]
        return self._encode(rows, texts, special[0])

    def _encode(self, rows: list[Row], texts: list[str], special: bool) -> list[Row]:
        masked = any("spans" in row.value for row in rows)
        tokenizer = tokenizer_of(self.tokenizer)
        if masked and not tokenizer.is_fast:
            raise PipelineError(
                f"{self.name}: a loss mask needs a fast tokenizer, which {self.tokenizer} is not"
            )
        encoded = tokenizer(
            texts,
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            truncation=self.max_length is not None,
            max_length=self.max_length,
            verbose=False,
        )
        out = []
        for at, row in enumerate(rows):
            value = {k: v for k, v in row.value.items() if k not in (self.text, "spans")}
            value["input_ids"] = np.asarray(encoded["input_ids"][at], np.int32)
            if "spans" in row.value:
                value["loss_mask"] = mask_of(row.value["spans"], encoded.encodings[at])
            out.append(Row(row.key, value))
        return out

    def _special(self, row: Row) -> bool:
        return "spans" not in row.value if self.special is None else self.special


def mask_of(spans: list[tuple[int, int]], encoding: Any) -> np.ndarray:
    """uint8 [T]: 1 from the first to the last token of which a character lies in a span. Tokens
    between them may have no characters (white space, where a tokenizer trims offsets).

    encoding: a fast tokenizer's (tokenizers.Encoding). Its offsets, a tuple for each token, cost
    a fifth of all that is done to a row, so it is asked for the tokens at the spans' ends alone.
    """
    mask = np.zeros(len(encoding), np.uint8)
    for start, end in spans:
        if start >= end:
            continue
        first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
        if first is None or last is None:
            # No token has the span's first or last character: white space, or cut off.
            mask |= _overlapping(start, end, encoding)
            continue
        # A character may be of several tokens, of which the first was named.
        while (chars := encoding.token_to_chars(last + 1)) and chars[0] < end and chars[1] >= end:
            last += 1
        mask[first : last + 1] = 1
    return mask


def _overlapping(start: int, end: int, encoding: Any) -> np.ndarray:
    places = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
    inside = (places[:, 0] < end) & (places[:, 1] > start) & (places[:, 1] > places[:, 0])
    mask = np.zeros(len(encoding), np.uint8)
    if inside.any():
        at = np.flatnonzero(inside)
        mask[at[0] : at[-1] + 1] = 1
    return mask
