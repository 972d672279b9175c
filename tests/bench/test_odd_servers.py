"""Servers that the client has not met: their answers are taken as meant, their failures named."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import pytest

from deltaserve.bench.load.execute import Target, measure
from deltaserve.bench.load.result import document
from deltaserve.bench.load.target import TargetError
from deltaserve.bench.load.text import render
from deltaserve.bench.load.workload import make_workload
from deltaserve.errors import DeltaServeError
from tests.bench.raw_server import GAP, MODELS, Pieces, head, raw_server, whole

USAGE = {"prompt_tokens": 9, "completion_tokens": 6}
WORDS = ("ein ", "Käfer ", "läuft")


def load(
    answer: Any,
    models: Pieces = MODELS,
    others: Mapping[str, Pieces] | None = None,
    key: str = "",
    **content: Any,
) -> dict[str, Any]:
    """What three requests find; the first ones are answered too."""
    shape = {"arrivals": 50, "requests": 3, "output": 6, "give_up": 0.5, "warmup": 0}
    with raw_server(answer if callable(answer) else lambda body: answer, models, others) as url:
        workload = make_workload(shape | content)
        measured = measure(Target(url, key), workload, lambda name, run: None)
    return document(measured, detailed=True)


def part(text: str = "", reason: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": reason}
    return json.dumps({"choices": [choice], **more}, ensure_ascii=False).encode()


def stream(*parts: bytes, before: bytes = b"data: ", after: bytes = b"\n\n") -> Pieces:
    return [head(), *(before + each + after for each in (*parts, b"[DONE]"))]


SAID = [part(word) for word in WORDS]
END = part(reason="length")
COUNT = json.dumps({"choices": [], "usage": USAGE}).encode()


def chunked(pieces: Pieces, size: int) -> Pieces:
    """The same body in chunks of ``size`` bytes, each on its own on the wire."""
    body = b"".join(pieces[1:])
    blocks = [body[i : i + size] for i in range(0, len(body), size)]
    coded = [b"%x\r\n%b\r\n" % (len(block), block) for block in blocks]
    return [head("text/event-stream", "transfer-encoding: chunked"), *coded, b"0\r\n\r\n"]


def in_two_lines(each: bytes) -> bytes:
    return each.replace(b'"choices":', b'"choices":\r\ndata:')


ODD = {
    "no blank after the colon": stream(*SAID, END, COUNT, before=b"data:"),
    "CR LF": stream(*SAID, END, COUNT, after=b"\r\n\r\n"),
    "CR": stream(*SAID, END, COUNT, after=b"\r\r"),
    "no line between events": stream(*SAID, END, COUNT, after=b"\n"),
    "an event in two lines": stream(*map(in_two_lines, (*SAID, END, COUNT)), after=b"\r\n\r\n"),
    "comments, ids, names, blanks": stream(
        *SAID, END, COUNT, before=b": ping\n\nid: 7\nretry: 10\nevent: message\ndata:\n\ndata:  "
    ),
    "no error, no usage, in each part": stream(
        *(part(word, error=None, usage=None) for word in WORDS), END, COUNT
    ),
    "usage in each part": stream(*(part(word, usage=USAGE) for word in WORDS), END),
    "a last part without choices": stream(*SAID, END, json.dumps({"usage": USAGE}).encode()),
    "choices that are null": stream(
        *SAID, END, json.dumps({"choices": None, "usage": USAGE}).encode()
    ),
    "no finish_reason, but an end": stream(*SAID, COUNT),
    "no [DONE]": stream(*SAID, END, COUNT)[:-1],
    "in the midst of a character": chunked(stream(*SAID, END, COUNT), 13),
    "half a megabyte in a line": stream(part(WORDS[0], more="x" * 500_000), *SAID[1:], END, COUNT),
    "HTTP 1.0": [
        head().replace(b"HTTP/1.1", b"HTTP/1.0"),
        *stream(*SAID, END, COUNT)[1:],
    ],
    "called text/plain": [head("text/plain"), *stream(*SAID, END, COUNT)[1:]],
}


@pytest.mark.parametrize("answer", ODD.values(), ids=ODD)
def test_an_odd_stream_is_an_answer_like_any_other(answer):
    result = load(answer)
    found, requests = result["summary"], result["requests"]
    assert (found["completed"], found["errors"]) == (3, {})
    assert (found["output_tokens"], found["input_tokens"]) == (18, 27)
    assert (found["uncounted"], found["in_one_piece"]) == (0, 0)
    assert [len(times) for times in requests["token_times"]] == [3, 3, 3]
    spans = zip(requests["first"], requests["finished"], strict=True)
    assert (
        max(finished - first for first, finished in spans) > 2 * GAP
    )  # as it came, not at its end
    assert found["itl"]["count"] == 6


def test_chunks_do_cut_characters():
    """Or the case above would say nothing."""
    for piece in ODD["in the midst of a character"]:
        try:
            piece.decode()
        except UnicodeDecodeError:
            return
    raise AssertionError("no chunk ends within a character")


def test_a_conversation_repeats_what_was_said_to_the_letter():
    seen = []

    def answer(body: dict[str, Any]) -> Pieces:
        seen.append(body["prompt"])
        return ODD["in the midst of a character"]

    load(answer, turns={"count": 2}, requests=1)
    assert "\nein Käfer läuft\n" in seen[-1]


def test_without_usage_parts_are_counted_and_the_report_says_so():
    result = load(stream(part("two tokens"), part("three more tokens"), END))
    found = result["summary"]
    assert (found["output_tokens"], found["input_tokens"], found["uncounted"]) == (6, 0, 3)
    said = render(result)
    assert "3 answers came without usage" in said
    assert "in one piece" not in said


def test_several_tokens_in_a_part_are_counted_as_the_server_counts():
    result = load(stream(part("one two three"), part("four five six"), END, COUNT))
    found = result["summary"]
    assert (found["output_tokens"], found["uncounted"]) == (18, 0)
    assert [len(times) for times in result["requests"]["token_times"]] == [2, 2, 2]
    assert "without usage" not in render(result)


@pytest.mark.parametrize("usage", ["lots", {"completion_tokens": "6"}, {"completion_tokens": -1}])
def test_a_count_that_is_none_is_not_believed(usage):
    found = load(stream(*SAID, END, json.dumps({"choices": [], "usage": usage}).encode()))
    assert (found["summary"]["output_tokens"], found["summary"]["uncounted"]) == (9, 3)


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_server_that_does_not_stream(endpoint):
    said = {"text": "".join(WORDS)}
    if endpoint == "chat":
        said = {"message": {"role": "assistant", "content": "".join(WORDS)}}
    choice = {"index": 0, "finish_reason": "stop", **said}
    document = {"choices": [choice], "usage": USAGE, "error": None}
    pretty = json.dumps(document, indent=2).encode()
    result = load(whole(pretty), endpoint=endpoint)
    found = result["summary"]
    assert (found["completed"], found["output_tokens"], found["in_one_piece"]) == (3, 18, 3)
    assert found["tpot"] is None  # not one of zero seconds
    assert found["ttft"]["p50"] == pytest.approx(found["e2e"]["p50"], abs=0.01)
    assert "3 answers of several tokens came in one piece" in render(result)


def late_parts(*late: bytes, kind: str = "text/event-stream") -> Any:
    """A good answer to the first requests, and later two good parts and then this."""

    def answer(body: dict[str, Any]) -> Pieces:
        good = stream(*SAID, END, COUNT)
        return good if body["max_tokens"] == 1 else [head(kind), *good[1:3], *late]

    return answer


def event(content: Any) -> bytes:
    return b"data: %b\n\n" % json.dumps(content).encode()


FAILURES = {
    "the body of an error": (
        lambda body: whole(b'{"object":"error","message":"no such\\nadapter","code":404}'),
        "error in the stream",
        "no such adapter",
    ),
    "vLLM's part": (
        late_parts(event({"object": "error", "message": "engine died"})),
        "error in the stream",
        "engine died",
    ),
    "an event called error": (
        late_parts(b"event: error\n" + event({"message": "out of memory"})),
        "error in the stream",
        "out of memory",
    ),
    "an error that is text": (
        late_parts(event({"error": "overloaded", "choices": []})),
        "error in the stream",
        "overloaded",
    ),
    "an error without a message": (
        late_parts(event({"error": {"code": 500, "message": None}})),
        "error in the stream",
        '{"code": 500, "message": null}',
    ),
    "death in the midst": (late_parts(b'data: {"choi'), "disconnected", "without a finish_reason"),
    "death in a chunk": (
        lambda body: [
            head("text/event-stream", "transfer-encoding: chunked"),
            b"fff\r\ndata: " + SAID[0] + b"\n\n",
        ],
        "disconnected",
        "the connection closed within the answer",
    ),
    "a page": (
        lambda body: whole("<p>Please sign in".encode("utf-16"), "text/html"),
        "malformed answer",
        "not a completion: text/html",
    ),
    "another protocol": (
        lambda body: [b"SSH-2.0-x\r\n\r\n"],
        "malformed answer",
        "not a completion: Bad status line",
    ),
    "an end without a beginning": (
        lambda body: stream(),
        "malformed answer",
        "without a part",
    ),
    "a list": (lambda body: stream(b"[1, 2]"), "malformed answer", "not a completion"),
    "text that is a number": (
        late_parts(event({"choices": [{"text": 7}]})),
        "malformed answer",
        "text is 7",
    ),
    "half an event": (late_parts(b'data: {"a": \n\n'), "malformed answer", "not a completion"),
    "bytes that are no text": (
        late_parts(b'data: {"a": "\xff\xfe"}\n\n'),
        "malformed answer",
        "not a completion",
    ),
    "an HTML page of an error": (
        lambda body: whole(
            b"<html><head><style>p {x: y}</style><title>502 Bad Gateway</title></head>"
            b"<body>\n<center>nginx</center>\xff</body></html>",
            "text/html",
            status="502 Bad Gateway",
        ),
        "http 502",
        "502 Bad Gateway nginx",
    ),
    "FastAPI's detail": (
        lambda body: whole(b'{"detail": "Not Found"}', status="404 Not Found"),
        "http 404",
        "Not Found",
    ),
}


@pytest.mark.parametrize(("answer", "kind", "message"), FAILURES.values(), ids=FAILURES)
def test_a_failure_is_named(answer, kind, message):
    def late(body: dict[str, Any]) -> Pieces:
        return stream(*SAID, END, COUNT) if body["max_tokens"] == 1 else answer(body)

    result = load(late)
    assert result["summary"]["errors"] == {kind: 3}
    assert all(message in each for each in result["requests"]["message"])
    assert all("\n" not in each and "<" not in each for each in result["requests"]["message"])
    assert result["ended"] == "complete"


@pytest.mark.parametrize(
    ("scheme", "models", "message"),
    [
        ("https", whole(b"{}"), "TLS: wrong version number"),
        ("http", [b"SSH-2.0-x\r\n"], "what listens there is not HTTP"),
        ("http", [b""], "Server disconnected"),
        ("http", whole(b"<h1>Sign in</h1>", status="403 Forbidden"), "the key .*: Sign in"),
        ("http", whole(b"<h1>Oops</h1>", status="500 Oops"), "lists no models, so name them"),
        ("http", whole(b'{"data": ["a", 3]}'), "lists no models, so name them"),
        ("http", whole(b"\xff\xfe", "text/html"), "lists no models, so name them"),
    ],
)
def test_a_server_without_a_list_of_models_is_refused_in_plain_words(scheme, models, message):
    with raw_server(lambda body: [], models) as url:
        target = Target(url.replace("http", scheme))
        with pytest.raises(DeltaServeError, match=message):
            measure(target, make_workload({}), lambda name, run: None)


def test_a_first_request_waits_as_long_as_a_refusal_asks():
    times = []

    def answer(body: dict[str, Any]) -> Pieces:
        times.append(time.monotonic())
        refusal = b'{"error": {"message": "slowly"}}'
        if len(times) == 1:
            return whole(refusal, "application/json", "retry-after: 1", status="429 Too Many")
        return stream(*SAID, END, COUNT)

    assert load(answer)["summary"]["completed"] == 3
    assert 1.0 <= times[1] - times[0] < 2.0

    def never(body: dict[str, Any]) -> Pieces:
        return whole(refusal, "application/json", "retry-after: 3600", status="429 Too Many")

    refusal = b'{"error": {"message": "quota spent"}}'
    began = time.monotonic()
    with pytest.raises(TargetError, match="http 429: quota spent"):
        load(never)
    assert time.monotonic() - began < 2.0


def test_a_refusal_in_the_run_is_a_failure_and_not_repeated():
    asked = []

    def answer(body: dict[str, Any]) -> Pieces:
        if body["max_tokens"] == 1:
            return stream(*SAID, END, COUNT)
        asked.append(body)
        return whole(b"{}", "application/json", "retry-after: 1", status="429 Too Many Requests")

    found = load(answer)["summary"]
    assert (found["errors"], len(asked)) == ({"http 429": 3}, 3)
