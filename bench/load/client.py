"""One request to an OpenAI-compatible server, streamed, with the time of each of its parts.

aiohttp and not httpx: with 500 streams of 40 parts, each 0.1 s apart, httpx needed 5.4 s of CPU
and 18 s in all, aiohttp 1.0 s and 5.1 s (two cores, 2026-11).
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp
from aiohttp.http_exceptions import ContentEncodingError

from deltaserve.bench.load.answer import Answer, StreamError, error_message, follow, one_line
from deltaserve.bench.load.records import Outcome, Record
from deltaserve.bench.load.workload import Workload

Prompt = str | list[int] | list[dict[str, str]]
"""Text, token ids, or chat messages."""


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
        done = dataclasses.replace(
            record,
            sent=sent,
            finished=self.clock(),
            outcome=outcome,
            token_times=tuple(answer.token_times),
            prompt_tokens=answer.prompt_tokens,
            output_tokens=answer.counted or len(answer.token_times),
            cached_tokens=answer.cached_tokens,
            counted=answer.counted is not None,
            status=status,
            message=one_line(message),
            retry_after=answer.retry_after,
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
                f"{self.url}/v1{chat}/completions",
                json=body,
                headers=authorization(key),
                allow_redirects=False,  # not to a machine that nobody allowed to be loaded
            ) as response:
                status = response.status
                if status != 200:
                    answer.retry_after = _seconds(response.headers.get("retry-after", ""))
                    message = error_message(await response.read()) or redirection(response)
                    if status >= 500:
                        response.close()  # or the next request meets a closing connection
                    return status, message, Outcome.HTTP
                await follow(response.content.iter_any(), answer, self.clock)
                kind = response.content_type
        except StreamError as error:
            return status, str(error), Outcome.STREAM
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return status, f"not a completion: {error!r}", Outcome.MALFORMED
        except TimeoutError:
            seconds = self.workload.request_timeout
            return status, f"no end after {seconds:g} s", Outcome.TIMEOUT
        except (aiohttp.ClientConnectorError, ConnectionRefusedError) as error:
            return status, connection_failure(error), Outcome.CONNECT
        except aiohttp.ClientPayloadError as error:
            if isinstance(error.__cause__, ContentEncodingError):
                return status, f"not a completion: {error.__cause__.message}", Outcome.MALFORMED
            return status, "the connection closed within the answer", Outcome.DISCONNECTED
        except aiohttp.ClientResponseError as error:  # no HTTP, or an encoding nobody knows
            return status, f"not a completion: {error.message}", Outcome.MALFORMED
        except (aiohttp.ClientError, ConnectionError) as error:
            return status, str(error) or type(error).__name__, Outcome.DISCONNECTED
        if not answer.parts and (answer.complete or kind != "text/event-stream"):
            return status, f"not a completion: {kind} without a part", Outcome.MALFORMED
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


def redirection(response: aiohttp.ClientResponse) -> str:
    """Where the server sends its client instead; empty where it does not."""
    place = response.headers.get("location", "")
    return f"the server redirects to {place}" if place else ""


def connection_failure(error: Exception) -> str:
    """Why nobody could be reached, without the client library's own words around it."""
    cause = getattr(error, "certificate_error", None) or getattr(error, "os_error", error)
    if isinstance(cause, ssl.SSLError):
        reason = getattr(cause, "verify_message", "") or cause.reason or str(cause)
        return f"TLS: {reason.lower().replace('_', ' ')}"
    number = getattr(cause, "errno", None) or 0
    # Those of name look-ups are negative, and not the system's.
    return os.strerror(number).lower() if number > 0 else str(cause) or type(cause).__name__


def _seconds(header: str) -> float | None:
    """Of Retry-After; None where it is absent or a date."""
    return float(header) if header.strip().isdecimal() else None
