"""What servers send as the answer to a completion, taken as it comes.

An OpenAI-compatible server streams server-sent events; servers differ in nearly everything else:
line ends, comments between the events, blanks after the colon, parts that hold only usage or no
error (``"error": null``) or an empty ``finish_reason``, no usage at all, or one JSON document
instead of a stream.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from deltaserve.bench.load.reading import parse_json

MESSAGE_LENGTH = 300
MOST_TOKENS = 1 << 40
"""Of one answer; a count of more is none."""
TAG = re.compile(r"<(style|script)\b.*?</\1>|<[^>]*>", re.DOTALL | re.IGNORECASE)


class StreamError(Exception):
    """The answer carried an error instead of its rest."""


@dataclass
class Answer:
    """What has come of an answer so far. parts: events, or the one document of an answer that
    was not streamed. retry_after: seconds, of a refusal."""

    token_times: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    complete: bool = False
    parts: int = 0
    retry_after: float | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def counted(self) -> int | None:
        """Generated tokens by the server's count; None where it gave none."""
        return _count(self.usage.get("completion_tokens"))

    @property
    def prompt_tokens(self) -> int:
        return _count(self.usage.get("prompt_tokens")) or 0

    @property
    def cached_tokens(self) -> int:
        details = self.usage.get("prompt_tokens_details")
        return _count(details.get("cached_tokens")) or 0 if isinstance(details, dict) else 0

    def take(self, part: dict[str, Any], now: float) -> None:
        """Raises StreamError for an error; KeyError, TypeError or AttributeError for what is no
        part of a completion."""
        if found := complaint(part):
            raise StreamError(found)
        if isinstance(usage := part.get("usage"), dict):
            self.usage = usage
        self.parts += 1
        for choice in part.get("choices") or ():
            if text := _text(choice):
                self.texts.append(text)
                self.token_times.append(now)
            self.complete |= bool(choice.get("finish_reason"))


async def follow(blocks: AsyncIterator[bytes], answer: Answer, clock: Callable[[], float]) -> None:
    """Take an answer to its end, which is ``[DONE]`` or that of the body.

    Raises:
        StreamError: it carried an error.
        ValueError, KeyError, TypeError, AttributeError: it is no completion.
    """
    lines = _lines(blocks)
    pending = b""
    async for line in lines:
        line = line.removeprefix(codecs.BOM_UTF8)  # only the first has one
        if line.lstrip().startswith(b"{"):  # no event begins like this: a document
            rest = [each async for each in lines]
            answer.take(parse_json(b"\n".join([line, *rest])), clock())
            return
        if not line.strip():
            if pending:
                parse_json(pending)  # says what is wrong with it
            continue
        name, _, data = line.partition(b":")
        if name != b"data" or not data.strip():
            continue
        if data.strip() == b"[DONE]":
            answer.complete = True
            return
        pending += data
        # Each line is tried, not each event: some servers leave out the line between events.
        try:
            part = parse_json(pending)
        except json.JSONDecodeError:
            continue
        pending = b""
        answer.take(part, clock())


def complaint(content: dict[str, Any]) -> str | None:
    """The message of an error body or part: OpenAI's shape, or one that other servers have."""
    error = content.get("error")
    if isinstance(error, dict) and error:
        error = error.get("message") or json.dumps(error)
    if not error and "choices" not in content:
        error = content.get("message") or content.get("detail")
    return str(error) if error else None


def error_message(body: bytes) -> str:
    """What a refusal says, in one line."""
    text = body.decode("utf-8", "replace")
    with contextlib.suppress(ValueError, AttributeError):
        text = complaint(parse_json(text)) or text
    return one_line(TAG.sub(" ", text) if text.lstrip().startswith("<") else text)


def one_line(text: str) -> str:
    """Without what a terminal would take for a command."""
    return "".join(filter(str.isprintable, " ".join(text.split())))[:MESSAGE_LENGTH]


async def _lines(blocks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Lines without their ends, each as soon as it is complete; ends are LF, CR LF or CR."""
    rest = b""
    async for block in blocks:
        lines = (rest + block).splitlines(keepends=True)
        # A CR at the end may be half of a CR LF; a blank line too many would end an event.
        rest = lines.pop() if not lines[-1].endswith(b"\n") else b""
        for line in lines:
            yield line.rstrip(b"\r\n")
    if rest:
        yield rest.rstrip(b"\r")


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value <= MOST_TOKENS else None


def _text(choice: dict[str, Any]) -> str:
    """What a choice says: a completion's text, or a chat's content or reasoning."""
    if "text" in choice:
        said = choice["text"]
    else:
        part = choice.get("delta") or choice.get("message") or {}
        names = ("content", "reasoning_content", "reasoning")
        said = next((part[name] for name in names if part.get(name)), "")
    if not isinstance(said or "", str):
        raise TypeError(f"text is {said!r}")
    return said or ""
