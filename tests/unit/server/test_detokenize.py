"""Streamed text equals the decoding of the whole, cut where the first stop string is complete."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from deltaserve.server.detokenize import Detokenizer, StopStrings, TextStream
from deltaserve.server.tokenizers import ModelTokenizer


def sentencepiece_style() -> PreTrainedTokenizerFast:
    """As Llama 2's: U+2581 for spaces, byte tokens for what the vocabulary lacks."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["▁", "▁▁", "▁a", "a", "b", "▁the", "é", "\ufffd", "<x>"]
    backend = Tokenizer(
        models.BPE(
            {name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_tokens([AddedToken("<x>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def metaspace_style() -> PreTrainedTokenizerFast:
    names = ["<unk>", "<s>", "</s>", "▁", "▁a", "a", "b", "▁▁", "▁the", "é", "好"]
    backend = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def decoders_by_style(tokenizers: dict[str, ModelTokenizer]) -> dict[str, ModelTokenizer]:
    return {
        "bytes": tokenizers["team/grown"],
        "sentencepiece": ModelTokenizer(sentencepiece_style(), None, frozenset()),
        "metaspace": ModelTokenizer(metaspace_style(), None, frozenset()),
    }


STYLES = ("bytes", "sentencepiece", "metaspace")
SIZES = {"bytes": 341, "sentencepiece": 268, "metaspace": 11}


@given(style=st.sampled_from(STYLES), data=st.data())
def test_any_tokens_stream_to_the_decoding_of_the_whole(decoders_by_style, style, data):
    decoder = decoders_by_style[style]
    ids = data.draw(st.lists(st.integers(0, SIZES[style] - 1), max_size=40))
    detokenizer = Detokenizer(decoder)
    parts = [detokenizer.push(token) for token in ids]
    text = "".join(parts) + detokenizer.finish()
    assert text == decoder.decode(ids)
    if style == "bytes":  # whole characters only: what is unfinished comes at the end
        assert not any(part.endswith("\ufffd") for part in parts)


@given(text=st.text(max_size=60), stops=st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_text_stops_where_the_first_stop_string_is_complete(decoders_by_style, text, stops):
    decoder = decoders_by_style["bytes"]
    ids = decoder.encode(text)
    whole = decoder.decode(ids)
    stream = TextStream(decoder, stops)
    streamed = ""
    for token in ids:
        streamed += stream.push([token])
        assert whole.startswith(streamed)
        if stream.stopped:
            break
    if not stream.stopped:
        streamed += stream.finish()
    assert (streamed, stream.stopped) == expected(whole, stops)


@given(data=st.data(), text=st.text(alphabet="ab", max_size=30))
def test_chunking_never_changes_the_cut(data, text):
    stops = data.draw(st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4))
    matcher, streamed, rest = StopStrings(stops), "", text
    while rest and not matcher.hit:
        size = data.draw(st.integers(1, 6))
        streamed += matcher.push(rest[:size])
        rest = rest[size:]
    if not matcher.hit:
        streamed += matcher.finish()
    assert (streamed, matcher.hit) == expected(text, stops)


def expected(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Letter by letter: end as soon as some stop string is there, before the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - len(max(found, key=len))], True
    return text, False


def test_only_the_possible_beginning_of_a_stop_string_waits():
    matcher = StopStrings(["\n\nUser:"])
    assert matcher.push("fine.\n") == "fine."
    assert matcher.push("\nUsed") == "\n\nUsed"
    assert matcher.push("\n\nUser: x") == ""
    assert matcher.hit


def test_tokens_after_the_stop_string_are_not_counted(decoders_by_style):
    decoder = decoders_by_style["bytes"]
    ids = decoder.encode("a.b.c")
    stream = TextStream(decoder, ["."])
    assert stream.push(ids) == "a"
    assert stream.num_tokens == 2


def test_ordinary_text_is_not_delayed(decoders_by_style):
    decoder = decoders_by_style["bytes"]
    detokenizer = Detokenizer(decoder)
    ids = decoder.encode("the quick brown fox")
    assert all(detokenizer.push(token) for token in ids)
