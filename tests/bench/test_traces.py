"""Recorded loads in their published formats; a malformed one is refused by its line."""

from __future__ import annotations

import json

import pytest

from deltaserve.bench.load.lengths import read_column, read_sharegpt
from deltaserve.bench.load.traces import read_trace
from deltaserve.errors import ConfigError

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:17:03.9799600,4808,10\r\n"
    "2023-11-16 18:17:04.0319600,3180,8\r\n"
)
AZURE_2024 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-10 00:00:00.009930+00:00,2162,5\n"
    "2024-05-10 00:01:00.017335+00:00,2399,6\n"
)
BURST = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,,1.5,ChatGPT,472,18,490,Conversation log\n"
    "45,,2.5,ChatGPT,1087,0,1087,Conversation log\n"
    "118.5,,3,GPT-4,417,276,693,API log\n"
)
MOONCAKE = (
    '{"timestamp": 27482, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47, 48]}\n'
    '{"timestamp": 30535, "input_length": 1030, "output_length": 26, "hash_ids": [46, 47, 60]}\n'
)


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "trace"
        path.write_bytes(text.encode())
        return path

    return write


def test_azure(write):
    first, second = read_trace(write(AZURE))
    assert (first.time, first.prompt_tokens, first.output_tokens) == (0.0, 4808, 10)
    assert second.time == pytest.approx(0.052, abs=1e-6)
    assert read_trace(write(AZURE_2024))[1].time == pytest.approx(60.007405, abs=1e-5)


def test_burstgpt_leaves_out_what_had_failed(write):
    first, second = read_trace(write(BURST))
    assert (first.model, first.prompt_tokens, first.output_tokens) == ("ChatGPT", 472, 18)
    assert (second.model, second.time) == ("GPT-4", 113.5)


def test_mooncake(write):
    first, second = read_trace(write(MOONCAKE))
    assert (first.time, first.blocks) == (0.0, (46, 47, 48))
    assert second.time == pytest.approx(3.053)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (AZURE + "2023-11-16 18:17:05.1,many,3\n", "line 4: ContextTokens is 'many', .*mend"),
        (AZURE + "yesterday,3,3\n", "line 4: TIMESTAMP is 'yesterday', .*like 2023.*mend"),
        (AZURE + "2023-11-16 18:17:05.1,5\n", "line 4: GeneratedTokens is None"),
        (BURST + "1,,1,GPT-4,-3,4,1,API log\n", "line 5: Request tokens is '-3', .*0 or more"),
        (BURST + "1,,1,GPT-4,3,4.5,1,API log\n", "line 5: Response tokens is '4.5', .*whole"),
        (BURST + "nan,,1,GPT-4,3,4,7,API log\n", "line 5: Timestamp is 'nan', .*a number"),
        (MOONCAKE + '{"timestamp": 1, "input_length": "x"}\n', "line 3: input_length is 'x'"),
        (MOONCAKE + '{"timestamp": 1, "input_length": 3}\n', "line 3: 'output_length' is missing"),
        (MOONCAKE.replace("[46, 47, 60]", '"x"'), "line 2: hash_ids is 'x', .*a list"),
        (MOONCAKE + "{oops\n", "line 3: not JSON"),
        (MOONCAKE + "[]\n", "line 3: not a JSON object"),
        (MOONCAKE + '{"a": ' + "[" * 100_000, "line 3: not JSON: nested too deeply"),
        (AZURE + "x" * 200_000 + ",1,2\n", "line 4: field larger than"),
        (
            AZURE + f"2023-11-16 18:17:05.1,{'9' * 400},3\n",
            "line 4: ContextTokens is '999.* \\.\\.\\.,",
        ),
        ("a,b\n1,2\n", "line 1: no known trace"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no requests"),
        ("", "line 1: no known trace"),
    ],
)
def test_malformed_traces_are_refused_by_line(write, text, message):
    with pytest.raises(ConfigError, match=message):
        read_trace(write(text))


def test_a_blank_first_line_changes_no_format(write):
    assert read_trace(write("\n " + MOONCAKE)) == read_trace(write(MOONCAKE))


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="nowhere: No such file"):
        read_trace(tmp_path / "nowhere")


def test_lengths_from_a_column(write):
    assert read_column(write("a,b\n3,4\n5,6\n"), "b") == [4, 6]
    with pytest.raises(ConfigError, match="no column 'c'; it has a, b"):
        read_column(write("a,b\n3,4\n"), "c")
    with pytest.raises(ConfigError, match="line 2: b is '0'"):
        read_column(write("a,b\n3,0\n"), "b")
    with pytest.raises(ConfigError, match=r"line 2: b is None, .*1 or more: mend"):
        read_column(write("a,b\n3\n"), "b")


def test_sharegpt(write):
    talk = [{"from": "human", "value": "What now?"}, {"from": "gpt", "value": "one two three"}]
    path = write(json.dumps([{"conversations": talk}, {"conversations": []}]))
    assert read_sharegpt(path) == [("What now?", 4)]
    with pytest.raises(ConfigError, match="no conversation"):
        read_sharegpt(write('[{"text": "x"}]'))
    with pytest.raises(ConfigError, match="line 1: not JSON"):
        read_sharegpt(write("[oops"))
    with pytest.raises(ConfigError, match="not JSON: nested too deeply"):
        read_sharegpt(write("[" * 100_000))


@pytest.mark.parametrize("read", [read_trace, read_sharegpt, lambda path: read_column(path, "a")])
def test_what_is_no_text_is_refused(tmp_path, read):
    path = tmp_path / "picture"
    path.write_bytes(b"a\n\xff\xfe\n")
    with pytest.raises(ConfigError, match="picture: not UTF-8 text, from byte 2 on"):
        read(path)
