"""Several choices of one HTTP request, each its own engine request, as one stream of text."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from deltaserve.engine.client import EngineClient
from deltaserve.engine.types import (
    EngineRequest,
    FinishReason,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)
from deltaserve.errors import EngineDeadError
from deltaserve.server import traces
from deltaserve.server.billing import Bill, Used
from deltaserve.server.detokenize import Decoder, TextStream, Token
from deltaserve.server.errors import ApiError, GenerationError
from deltaserve.server.metrics import Metrics

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that choice ``index`` gained; the last of a choice says why it ended.

    tokens: behind the text, where somebody wants to know. prompt_logprobs: with the first piece.
    """

    index: int
    text: str
    finish_reason: FinishReason | None = None
    tokens: tuple[Token, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    embedding: tuple[float, ...] | None = None


def join(pieces: Sequence[Piece]) -> Piece:
    """All pieces of a choice as one."""
    first, last = pieces[0], pieces[-1]
    return Piece(
        first.index,
        "".join(piece.text for piece in pieces),
        last.finish_reason,
        tuple(token for piece in pieces for token in piece.tokens),
        first.prompt_logprobs,
        first.embedding,
    )


@dataclass(slots=True)
class Choice:
    index: int
    request: EngineRequest
    text: TextStream
    echo: bool
    """The prompt is still to be repeated."""
    keep_stop: bool
    num_cached: int = 0


class Generation:
    """What one HTTP request asked of the engine. ``abort`` must be called when it is over."""

    def __init__(
        self, client: EngineClient, decoder: Decoder, stops: Sequence[str], n: int,
        requests: Sequence[EngineRequest], *, metrics: Metrics, timeout_s: float,
        bill: Bill | None = None, echo: bool = False, keep_stop: bool = False, track: bool = False,
    ) -> None:  # fmt: skip
        """``requests``: one for each prompt; ``n`` choices are made of each.

        bill: of the tenant, if there is one. echo: texts begin with the prompt. keep_stop: what
        ended an answer is part of its text. track: pieces tell their tokens.
        """
        self._client = client
        self._n = n
        self._metrics = metrics
        self._bill = bill
        self._failed = False
        self._timeout_s = timeout_s
        self._choices = [
            Choice(
                index,
                _variant(requests[index // n], index, index % n),
                TextStream(decoder, stops, keep_stop=keep_stop, track=track),
                echo,
                keep_stop,
            )
            for index in range(n * len(requests))
        ]
        self._open: set[str] = set()
        self.prompt_tokens = sum(len(request.prompt_ids) for request in requests)

    def submit(self) -> None:
        """Queue all choices, or none. Raises what ``EngineClient.submit`` raises."""
        try:
            for choice in self._choices:
                self._client.submit(choice.request)
                self._open.add(choice.request.request_id)
        except BaseException:
            if self._bill is not None:
                self._bill.void()
            self.abort()
            raise

    async def pieces(self) -> AsyncIterator[Piece]:
        """The text of all choices as it comes.

        Raises:
            GenerationError, EngineDeadError: the engine failed.
            ApiError: it took too long; its grammar has no end.
        """
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        stream = merge([self._follow(choice) for choice in self._choices])
        while True:
            try:
                # Not around the yield: the time is the engine's, not that of a slow reader.
                async with asyncio.timeout_at(deadline):
                    piece = await anext(stream)
            except StopAsyncIteration:
                return
            except TimeoutError:
                message = f"the answer was not complete after {self._timeout_s:g} s"
                raise ApiError(504, message, code="timeout") from None
            yield piece

    async def settle(self) -> None:
        """Before the end of the answer is sent: record what it cost. Raises AccountingError."""
        if self._bill is not None:
            await self._bill.pay(self._used())

    def abort(self) -> None:
        """End what is unfinished and free its memory. May be called again."""
        while self._open:
            self._client.abort(self._open.pop())
        if self._bill is not None and self._failed:
            self._bill.drop("error", Used(0, 0, 0))  # nobody pays for what went wrong here
        elif self._bill is not None:
            self._bill.drop("cancelled", self._used())

    def usage(self) -> dict[str, Any]:
        used = self._used()
        return {
            "prompt_tokens": used.prompt_tokens,
            "completion_tokens": used.completion_tokens,
            "total_tokens": used.prompt_tokens + used.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": used.cached_tokens},
        }

    def _used(self) -> Used:
        completion = sum(choice.text.num_tokens for choice in self._choices)
        # A prompt counts once, however many choices are made of it.
        cached = sum(choice.num_cached for choice in self._choices[:: self._n])
        return Used(self.prompt_tokens, cached, completion)

    async def _follow(self, choice: Choice) -> AsyncIterator[Piece]:
        request_id = choice.request.request_id
        watch = self._metrics.watch(choice.request.model, len(choice.request.prompt_ids))
        began, reason, timing = traces.now_ns(), None, None
        try:
            async for event in self._client.stream(request_id):
                watch.see(event)
                reason, timing = event.finish_reason, event.timing
                piece = self._take(choice, event)
                if piece.text or piece.tokens or piece.finish_reason:
                    yield piece
                if piece.finish_reason:
                    reason = piece.finish_reason
                    break
        finally:
            if (span := traces.current.get()) is not None:
                span.answer(
                    choice.request, began, tokens=watch.tokens, cached=choice.num_cached,
                    reason=reason, timing=timing,
                )  # fmt: skip
        if request_id in self._open:  # a stop string: the engine does not know that it is over
            self._open.discard(request_id)
            self._client.abort(request_id)

    def _take(self, choice: Choice, event: TokenEvent) -> Piece:
        """Raises GenerationError, EngineDeadError, ApiError."""
        if event.finish_reason is not None:
            self._open.discard(choice.request.request_id)
        choice.num_cached = max(choice.num_cached, event.num_cached)
        if event.finish_reason is FinishReason.REFUSED:
            # Paid for: else a grammar without an end would buy answers for nothing.
            raise ApiError(400, event.error or "this cannot be generated")
        if event.finish_reason is FinishReason.ERROR:
            self._failed = True
            reason = event.error or "the engine failed on this request"
            raise GenerationError(reason) if self._client.alive() else EngineDeadError(reason)
        return _piece(choice, event)


def _piece(choice: Choice, event: TokenEvent) -> Piece:
    """Detokenise an event."""
    tokens, reason, logprobs = event.token_ids, event.finish_reason, event.logprobs
    stopped = reason is FinishReason.STOP and tokens and tokens[-1] in _stop_ids(choice)
    ending = stopped and not choice.keep_stop
    text = ""
    if choice.echo:
        choice.echo = False
        text = choice.text.echo(choice.request.prompt_ids, event.prompt_logprobs)
    text += choice.text.push(tokens[:-1] if ending else tokens, logprobs)
    if reason is not None and not choice.text.stopped:
        text += choice.text.finish()
        if ending:
            choice.text.push_end(tokens[-1], logprobs[-1] if logprobs else None)
    if choice.text.stopped:
        reason = FinishReason.STOP
    shown = choice.text.take(all_left=reason is not None)
    return Piece(choice.index, text, reason, shown, event.prompt_logprobs, event.embedding)


def _stop_ids(choice: Choice) -> frozenset[int]:
    return choice.request.sampling.stop_token_ids


def _variant(request: EngineRequest, index: int, choice: int) -> EngineRequest:
    """The request of one choice: an id and a seed of its own, the prompt of the first one."""
    sampling = replace(request.sampling, seed=derive_seed(request.sampling, choice))
    first = f"{request.request_id}-{index - choice}" if choice else None
    return replace(
        request, request_id=f"{request.request_id}-{index}", sampling=sampling, fork_of=first
    )


def derive_seed(sampling: SamplingParams, choice: int) -> int | None:
    """Seed of the n-th choice: repeatable, unlike its neighbours; the first keeps the given one."""
    if sampling.seed is None or choice == 0:
        return sampling.seed
    digest = hashlib.sha256(f"{sampling.seed}/{choice}".encode()).digest()
    return int.from_bytes(digest[:8], signed=True)


async def merge(streams: Sequence[AsyncIterator[T]]) -> AsyncIterator[T]:
    """Items of all streams as they come; the first exception ends it."""
    if len(streams) == 1:  # the usual case needs no tasks
        async for item in streams[0]:
            yield item
        return
    queue: asyncio.Queue[T | Exception | None] = asyncio.Queue()

    async def drain(stream: AsyncIterator[T]) -> None:
        try:
            async for item in stream:
                queue.put_nowait(item)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(drain(stream)) for stream in streams]
    running = len(tasks)
    try:
        while running:
            item_or_end = await queue.get()
            if item_or_end is None:
                running -= 1
            elif isinstance(item_or_end, Exception):
                raise item_or_end
            else:
                yield item_or_end
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
