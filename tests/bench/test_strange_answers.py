"""Answers that nobody should give, beside those of the odd servers: none of them ends the test."""

from __future__ import annotations

import json
import zlib
from typing import Any

import pytest

from deltaserve.bench.load.execute import Target, measure
from deltaserve.bench.load.page import report
from deltaserve.bench.load.target import TargetError, check_url
from deltaserve.bench.load.text import render
from deltaserve.bench.load.workload import make_workload
from deltaserve.errors import ConfigError, DeltaServeError
from tests.bench.raw_server import Pieces, head, whole
from tests.bench.test_odd_servers import COUNT, END, SAID, late_parts, load, part, stream

GOOD = stream(*SAID, END, COUNT)
BODY = b"".join(GOOD[1:])
DEEP = b"[" * 100_000


def compressed(coder: str, body: bytes) -> list[bytes]:
    return [head("text/event-stream", f"content-encoding: {coder}") + body]


def in_time(bits: int) -> list[bytes]:
    """Each part compressed on its own, so that it can be read when it comes."""
    coder = zlib.compressobj(9, zlib.DEFLATED, bits)
    parts = [coder.compress(each) + coder.flush(zlib.Z_SYNC_FLUSH) for each in GOOD[1:]]
    return [head("text/event-stream", "content-encoding: gzip"), *parts, coder.flush()]


@pytest.mark.parametrize(
    "answer",
    [[GOOD[0], b"\xef\xbb\xbf" + GOOD[1], *GOOD[2:]], in_time(31)],
    ids=["a byte order mark", "gzip"],
)
def test_it_is_an_answer_all_the_same(answer):
    result = load(answer)
    assert (result["summary"]["completed"], result["summary"]["output_tokens"]) == (3, 18)
    assert [len(times) for times in result["requests"]["token_times"]] == [3, 3, 3]
    assert result["summary"]["itl"]["p50"] > 0.005


@pytest.mark.parametrize("count", [b"1" + b"0" * 400, b"true"])
def test_no_number_of_tokens_is_believed_that_cannot_be(count):
    usage = b'{"choices": [], "usage": {"prompt_tokens": %b, "completion_tokens": %b}}'
    result = load(late_parts(*(b"data: %b\n\n" % each for each in (END, usage % (count, count)))))
    found = result["summary"]
    assert (found["output_tokens"], found["input_tokens"], found["uncounted"]) == (6, 0, 3)


REDIRECTION = whole(b"", "text/html", "location: http://127.0.0.1:9/x", status="307 Moved")
FAILURES: dict[str, tuple[Any, str, str]] = {
    "cut, with an empty finish_reason in each part": (
        [head(), *(b"data: %b\n\n" % part(word, "") for word in ("a", "b"))],
        "disconnected",
        "without a finish_reason",
    ),
    "JSON without bottom": (stream(b'{"choices": ' + DEEP), "malformed answer", "too deeply"),
    "JSON without bottom, refused": (whole(DEEP, status="500 x"), "http 500", "[[["),
    "bytes that are not gzip": (compressed("gzip", b"no" + BODY), "malformed answer", "gzip"),
    "an encoding nobody asked for": (compressed("br", BODY), "malformed answer", "brotli"),
    "a place elsewhere": (REDIRECTION, "http 307", "redirects to http://127.0.0.1:9/x"),
    "commands for the terminal": (
        stream(json.dumps({"error": {"message": "a\x1b[2Jb\x07"}}).encode()),
        "error in the stream",
        "a[2Jb",
    ),
}


@pytest.mark.parametrize(("answer", "kind", "message"), FAILURES.values(), ids=FAILURES)
def test_it_is_a_failure_of_its_kind(answer, kind, message):
    result = load(lambda body: GOOD if body["max_tokens"] == 1 else answer)
    assert result["summary"]["errors"] == {kind: 3}
    assert all(message in each for each in result["requests"]["message"])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/version", b'["1.0"]'),
        ("/version", b"null"),
        ("/version", DEEP),
        ("/metrics", b"\xff\xfe\x00 1\n"),
        ("/metrics", b"a 1e308\na 1e308\n"),
        ("/v1/stats", b'{"a": NaN, "b": Infinity}'),
        ("/v1/stats", b'{"a": 1%b}' % (b"0" * 400)),
        ("/v1/stats", DEEP),
    ],
)
def test_what_it_says_of_itself_does_not_lose_the_run(path, body):
    result = load(GOOD, others={path: whole(body, "text/plain")})
    assert result["summary"]["completed"] == 3
    json.dumps(result, allow_nan=False)
    assert render(result)
    assert report(result)


@pytest.mark.parametrize("body", [b'{"version": "1.2"}', b'"1.2"'])
def test_its_version_is_recorded(body):
    assert load(GOOD, others={"/version": whole(body)})["target"]["version"] == "1.2"


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (whole(b'{"data": [{"id": null}, {"id": "x"}]}'), "lists no models, so name them"),
        (whole(b'{"data": %b' % DEEP), "lists no models, so name them"),
        (REDIRECTION, "redirects to http://127.0.0.1:9/x"),
    ],
)
def test_a_list_that_is_none_is_refused(models: Pieces, message: str):
    with pytest.raises(DeltaServeError, match=message):
        load(GOOD, models)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://[::1", "is no address: Invalid IPv6"),
        ("http://127.0.0.1:99999", "is no address: Port out of range"),
        (f"http://{'a' * 70}.example", "no host is called so"),
        ("http://me:secret@127.0.0.1", "--api-key takes a key"),
        ("http://127.0.0.1?version=1", "without user"),
    ],
)
def test_an_address_that_is_none_is_refused_in_plain_words(url, message):
    with pytest.raises(ConfigError, match=message):
        check_url(url, allow_remote=True)


def test_a_key_with_a_line_end_is_refused_before_anything_is_asked():
    target = Target("http://127.0.0.1:9", admin_key="secret\n")
    with pytest.raises(ConfigError, match="the key of the metrics holds a line end"):
        measure(target, make_workload({}), lambda name, run: None)
    with pytest.raises(ConfigError, match="the key of tenant 'default' holds a line end"):
        measure(Target("http://127.0.0.1:9", "secret\n"), make_workload({}), lambda *_: None)
    with pytest.raises(TargetError, match="connection refused"):
        measure(Target("http://127.0.0.1:9", "ключ"), make_workload({}), lambda *_: None)
