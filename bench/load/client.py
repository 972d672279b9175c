"""One request to an OpenAI-compatible server, streamed, with the time of each of its parts.

aiohttp and not httpx: with 500 streams of 40 parts, each 0.1 s apart, httpx needed 5.4 s of CPU
and 18 s in all, aiohttp 1.0 s and 5.1 s (two cores, 2026-11).
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp

from deltaserve.bench.load.records import Outcome, Record
from deltaserve.bench.load.workload import Workload

MESSAGE_LENGTH = 300
Prompt = str | list[int] | list[dict[str, str]]
"""Text, token ids, or chat messages."""


class StreamError(Exception):
    """The stream carried an error instead of the rest of the answer."""


@dataclass
class Answer:
    """What has come of a streamed answer so far."""

    token_times: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    complete: bool = False

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def take(self, chunk: dict[str, Any], now: float) -> None:
        """Raises StreamError for an error, KeyError or TypeError for something else."""
        if "error" in chunk:
            error = chunk["error"]
            raise StreamError(error.get("message") if isinstance(error, dict) else str(error))
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk["choices"]:
            if text := _text(choice):
                self.token_times.append(now)
                self.texts.append(text)
            self.complete |= choice.get("finish_reason") is not None


class Asker(Protocol):
    """Who answers the requests of a run: a server, or a simulation of one."""

    @property
    def url(self) -> str: ...

    async def ask(
        self,
        record: Record,
        prompt: Prompt,
        output_tokens: int,
        key: str,
        cancel_after: float | None = None,
    ) -> tuple[Record, str]: ...


@dataclass(frozen=True)
class Client:
    """Sends requests of a workload. clock: seconds since the start of the run."""

    http: aiohttp.ClientSession
    url: str
    workload: Workload
    clock: Callable[[], float]

    async def ask(
        self,
        record: Record,
        prompt: Prompt,
        output_tokens: int,
        key: str,
        cancel_after: float | None = None,
    ) -> tuple[Record, str]:
        """Send it now, follow it to its end; failures are outcomes, not exceptions.

        record: who asks what, and when it was scheduled. Returns it completed, and the text.
        """
        answer = Answer()
        sent = self.clock()
        status, message, outcome = None, "", Outcome.OK
        try:
            async with asyncio.timeout(cancel_after):
                status, message, outcome = await self._stream(
                    answer, self._body(record.model, prompt, output_tokens), key
                )
        except TimeoutError:
            outcome = Outcome.CANCELLED
        except asyncio.CancelledError:
            outcome, message = Outcome.UNFINISHED, "the run ended first"
        usage = answer.usage
        done = dataclasses.replace(
            record,
            sent=sent,
            finished=self.clock(),
            outcome=outcome,
            token_times=tuple(answer.token_times),
            prompt_tokens=usage.get("prompt_tokens") or 0,
            output_tokens=usage.get("completion_tokens") or len(answer.token_times),
            cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            status=status,
            message=message[:MESSAGE_LENGTH],
        )
        return done, answer.text

    async def _stream(
        self, answer: Answer, body: dict[str, Any], key: str
    ) -> tuple[int | None, str, Outcome]:
        """Status, message and outcome."""
        chat = "/chat" if self.workload.endpoint == "chat" else ""
        status = None
        try:
            async with self.http.post(
                f"{self.url}/v1{chat}/completions", json=body, headers=authorization(key)
            ) as response:
                status = response.status
                if status != 200:
                    message = error_message(await response.text())
                    if status >= 500:
                        response.close()  # or the next request meets a closing connection
                    return status, message, Outcome.HTTP
                async for data in _events(response.content):
                    answer.take(json.loads(data), self.clock())
        except StreamError as error:
            return status, str(error), Outcome.STREAM
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return status, f"not a completion: {error!r}", Outcome.MALFORMED
        except TimeoutError:
            seconds = self.workload.request_timeout
            return status, f"no end after {seconds:g} s", Outcome.TIMEOUT
        except (aiohttp.ClientConnectorError, ConnectionRefusedError) as error:
            return status, str(error), Outcome.CONNECT
        except (aiohttp.ClientError, ConnectionError) as error:
            return status, str(error) or type(error).__name__, Outcome.DISCONNECTED
        if not answer.complete:
            return status, "the stream ended without a finish_reason", Outcome.DISCONNECTED
        return status, "", Outcome.OK

    def _body(self, model: str, prompt: Prompt, output_tokens: int) -> dict[str, Any]:
        name = "messages" if self.workload.endpoint == "chat" else "prompt"
        body = {
            "model": model,
            name: prompt,
            "max_tokens": output_tokens,
            "temperature": self.workload.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return body | ({"ignore_eos": True} if self.workload.ignore_eos else {})


def authorization(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def error_message(body: str) -> str:
    """Of OpenAI's error body, or the body itself."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(body.split())[:MESSAGE_LENGTH]


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The data of server-sent events, up to [DONE]."""
    async for line in content:
        if line.startswith(b"data:"):
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            yield data


def _text(choice: dict[str, Any]) -> str:
    """What a choice of a chunk says: a completion's text, or a chat's content or reasoning."""
    if "text" in choice:
        return choice["text"] or ""
    delta = choice.get("delta") or {}
    return delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""
