"""An OpenAI-compatible server that misbehaves exactly as told."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

KEY = web.RequestKey("key", str)


@dataclass
class Behaviour:
    """Seconds; the hooks get the request's body and key."""

    models: tuple[str, ...] = ("base", "alpha", "beta")
    first: Callable[[dict[str, Any], str], float] = lambda body, key: 0.0
    gap: float = 0.0
    keys: frozenset[str] | None = None
    failure: Callable[[int, dict[str, Any], str], str | None] = lambda number, body, key: None
    """Kind of failure of the n-th request: a status such as "429", "cut", "event", "garbage",
    "empty", "die"."""
    slots: int = 1 << 30
    """Requests that generate at one time."""
    metrics: str = ""
    stats: dict[str, Any] | None = None
    seen: list[dict[str, Any]] = field(default_factory=list)
    keys_seen: list[str] = field(default_factory=list)


class FakeServer:
    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.loop = asyncio.new_event_loop()
        self.url = ""
        self._runner: web.AppRunner | None = None
        self._slots: asyncio.Semaphore | None = None

    def serve(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self._start())
        ready.set()
        self.loop.run_forever()
        self.loop.run_until_complete(self._stop())
        late = asyncio.all_tasks(self.loop)  # answers that nobody waits for any more
        for task in late:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*late, return_exceptions=True))
        self.loop.close()

    async def _start(self) -> None:
        self._slots = asyncio.Semaphore(self.behaviour.slots)
        app = web.Application(middlewares=[self._authorize])
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/stats", self._stats)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _stop(self) -> None:
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    @web.middleware
    async def _authorize(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        key = request.headers.get("Authorization", "").removeprefix("Bearer ")
        request[KEY] = key
        allowed = self.behaviour.keys
        if allowed is not None and key not in allowed and request.path.startswith("/v1"):
            return web.json_response({"error": {"message": "no such key"}}, status=401)
        return await handler(request)

    async def _models(self, request: web.Request) -> web.Response:
        first, *others = self.behaviour.models
        cards = [{"id": first}, *({"id": name, "parent": first} for name in others)]
        return web.json_response({"data": cards})

    async def _stats(self, request: web.Request) -> web.Response:
        stats = self.behaviour.stats
        return web.json_response(stats, status=200 if stats is not None else 404)

    async def _metrics(self, request: web.Request) -> web.Response:
        metrics = self.behaviour.metrics
        return web.Response(text=metrics, status=200 if metrics else 404)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.behaviour.seen.append(body)
        self.behaviour.keys_seen.append(request[KEY])
        failure = self.behaviour.failure(len(self.behaviour.seen), body, request[KEY])
        if failure and failure.isdigit():
            return web.json_response({"error": {"message": "as told"}}, status=int(failure))
        if failure == "die":
            self.loop.create_task(self._stop())
        assert self._slots is not None
        if not body.get("stream"):
            return await self._whole(request, body, failure)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        async with self._slots:
            with suppress(ConnectionResetError):  # the client has gone
                await self._stream(request, response, body, failure)
        return response

    async def _whole(
        self, request: web.Request, body: dict[str, Any], failure: str | None
    ) -> web.Response:
        await asyncio.sleep(self.behaviour.first(body, request[KEY]))
        count = 0 if failure == "empty" else body["max_tokens"]
        said = {"role": "assistant", "content": "tok " * count}
        choice = {"index": 0, "message": said, "finish_reason": "length"}
        about = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
        return web.json_response(about | {"choices": [choice], "usage": _usage(body, count)})

    async def _stream(
        self,
        request: web.Request,
        response: web.StreamResponse,
        body: dict[str, Any],
        failure: str | None,
    ) -> None:
        await response.prepare(request)
        await asyncio.sleep(self.behaviour.first(body, request[KEY]))
        count = 0 if failure == "empty" else body["max_tokens"]
        for i in range(count):
            if failure in ("cut", "die") and i == count // 2:
                assert request.transport is not None
                request.transport.abort()
                return
            if failure == "event" and i == count // 2:
                await _send(response, {"error": {"message": "the engine stopped"}})
                return
            if failure == "garbage":
                await response.write(b"data: {oops\n\n")
            await _send(response, {"choices": [_choice(body, "tok ", None)]})
            await asyncio.sleep(self.behaviour.gap)
        await _send(response, {"choices": [_choice(body, "", "length")]})
        await _send(response, {"choices": [], "usage": _usage(body, count)})
        await response.write(b"data: [DONE]\n\n")


def _choice(body: dict[str, Any], text: str, reason: str | None) -> dict[str, Any]:
    said = {"delta": {"content": text}} if "messages" in body else {"text": text}
    return {"index": 0, **said, "finish_reason": reason}


def _usage(body: dict[str, Any], count: int) -> dict[str, Any]:
    prompt = body.get("prompt") or " ".join(m["content"] for m in body["messages"])
    # Two tokens for each word and one more, so that a client has something to find out.
    words = 2 * len(prompt.split()) + 1 if isinstance(prompt, str) else len(prompt)
    return {"prompt_tokens": words, "completion_tokens": count}


async def _send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps(event)}\n\n".encode())


@contextmanager
def fake_server(behaviour: Behaviour) -> Iterator[FakeServer]:
    server = FakeServer(behaviour)
    ready = threading.Event()
    thread = threading.Thread(target=server.serve, args=(ready,), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        server.loop.call_soon_threadsafe(server.loop.stop)
        thread.join(10)
