"""The servers that ``bench.peers`` compares: how each is started, loaded and ended.

No load waits for ever: what is not answered within its limit counts as a failure of that kind.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx
import torch
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError

from deltaserve.bench.peer_models import PeerModels, prompt
from deltaserve.bench.peer_peft import PeftProcess, Question
from deltaserve.kernels.dense import has_arithmetic

START_SECONDS = 120.0
MERGE_BYTES = 4 << 30
OURS, OURS_LORA = "deltaserve", "deltaserve, LoRA adapters"
LATE = "no answer within the limit"
NOTHING = "an answer without a token"


class StartError(Exception):
    """A server that did not become ready; says why."""


@dataclass(frozen=True)
class Load:
    """What became of the requests that were sent at once: tokens of an answer, or the kind of
    failure. seconds: to the last answer; where there is none, until it was given up."""

    answers: list[int | str]
    seconds: float

    @property
    def tokens(self) -> int:
        return sum(answer for answer in self.answers if isinstance(answer, int))

    @property
    def complete(self) -> bool:
        return all(isinstance(answer, int) for answer in self.answers)


class Running(Protocol):
    """A server that accepts requests."""

    def load(
        self, models: Sequence[str], requests: int, tokens: int, first: int, limit: float
    ) -> Load:
        """``requests`` at once, the models taking turns. first: number of the first prompt;
        limit: seconds after which what is still missing is given up."""
        ...


@dataclass(frozen=True)
class Peer:
    """Something to compare: how it names the models, whose tokens/s its own are the measure of,
    and how it starts. ``start`` gets its log and raises StartError."""

    name: str
    models: tuple[str, ...]
    against: str
    start: Callable[[Path], AbstractContextManager[Running]]


def peers(models: PeerModels) -> list[Peer]:
    """Each comes after the one that it is compared with."""
    full = tuple(str(tune) for tune in models.tunes)
    other = (str(Path(sys.executable).with_name("transformers")), "serve", "--host", "127.0.0.1")
    # Stored in bfloat16, in memory as this processor computes.
    wider = 1 if has_arithmetic(torch.bfloat16) else 2
    size = sum(file.stat().st_size for file in models.wholes[0].iterdir()) * wider
    swap = (
        f"--delta-memory-bytes={size * 3 // 2}",
        f"--host-memory-bytes={size * len(full) * 2}",
        "--merge-memory-bytes=0",
    )
    merged = f"--merge-memory-bytes={MERGE_BYTES}"
    base = models.base

    def ours(name: str, artifacts: Sequence[Path], *options: str, against: str = OURS) -> Peer:
        deltas = (f"--delta={path.stem}={path}" for path in artifacts)
        command = (sys.executable, "-m", "deltaserve", "serve", str(base), *deltas, *options)
        names = tuple(path.stem for path in artifacts)
        return Peer(name, names, against, lambda log: _process(command, log, "/ready"))

    def theirs(name: str, *options: str) -> Peer:
        return Peer(name, full, OURS, lambda log: _process((*other, *options), log, "/health"))

    return [
        ours(OURS, models.deltas),
        ours("deltaserve, merged at start", models.deltas, merged),
        ours("deltaserve, whole models swapped", models.wholes, *swap),
        theirs("transformers serve"),
        theirs("transformers serve --continuous-batching", "--continuous-batching"),
        ours(OURS_LORA, models.loras, against=OURS_LORA),
        Peer(
            "PEFT generate (no HTTP)",
            tuple(path.stem for path in models.adapters),
            OURS_LORA,
            lambda log: _peft(base, models.adapters),
        ),
    ]


def running_peer(text: str, count: int) -> Peer:
    """From ``NAME=URL``: its first ``count`` models. Raises SystemExit: it does not answer."""
    name, separator, url = text.partition("=")
    if not separator:
        raise SystemExit(f"--url {text}: write NAME=URL")
    url = url.rstrip("/").removesuffix("/v1")
    try:
        answer = httpx.get(f"{url}/v1/models", trust_env=False, timeout=10).raise_for_status()
        models = [model["id"] for model in answer.json()["data"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"--url {text}: no list of models: {error}") from None
    if len(models) < count:
        raise SystemExit(f"--url {text}: it serves {len(models)} models, {count} are compared")
    found = tuple(models[-count:])
    return Peer(name, found, OURS, lambda log: contextlib.nullcontext(_HttpServer(url)))


@contextlib.contextmanager
def _process(command: Sequence[str], log: Path, ready: str) -> Iterator[Running]:
    """A server's process, once ``ready`` answers 200; ended when the block is left."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(f"{url}{ready}", process)
        yield _HttpServer(url)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise StartError("ended at its start")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, trust_env=False, timeout=5).status_code == 200:
                return
        time.sleep(0.2)
    raise StartError(f"not ready after {START_SECONDS:g} s")


@dataclass(frozen=True)
class _HttpServer:
    url: str

    def load(
        self, models: Sequence[str], requests: int, tokens: int, first: int, limit: float
    ) -> Load:
        return asyncio.run(self._load(models, requests, tokens, first, limit))

    async def _load(
        self, models: Sequence[str], requests: int, tokens: int, first: int, limit: float
    ) -> Load:
        http = DefaultAsyncHttpxClient(trust_env=False, timeout=2 * limit)
        async with AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="none", http_client=http, max_retries=0
        ) as client:
            start = time.perf_counter()
            answered = [0.0]

            async def ask(i: int) -> int | str:
                answer = await _ask(client, models[i % len(models)], first + i, tokens)
                if isinstance(answer, int):
                    answered.append(time.perf_counter() - start)
                return answer

            asked = [asyncio.create_task(ask(i)) for i in range(requests)]
            done, late = await asyncio.wait(asked, timeout=limit)
            given_up = time.perf_counter() - start
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
            answers = [task.result() if task in done else LATE for task in asked]
            return Load(answers, max(answered) or given_up)


async def _ask(client: AsyncOpenAI, model: str, index: int, tokens: int) -> int | str:
    """Tokens of the answer, or the kind of failure."""
    try:
        answer = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt(index)}],
            max_tokens=tokens,
            temperature=0,
        )
    except OpenAIError as error:
        return type(error).__name__
    return (answer.usage.completion_tokens if answer.usage else 0) or NOTHING


@contextlib.contextmanager
def _peft(base: Path, adapters: Sequence[Path]) -> Iterator[Running]:
    process = PeftProcess(base, adapters)
    try:
        try:
            process.wait_until_ready(START_SECONDS)
        except (TimeoutError, EOFError) as error:
            raise StartError(f"did not load: {type(error).__name__}") from error
        yield _Peft(process)
    finally:
        process.stop()


@dataclass(frozen=True)
class _Peft:
    process: PeftProcess

    def load(
        self, models: Sequence[str], requests: int, tokens: int, first: int, limit: float
    ) -> Load:
        question = Question(tuple(models), requests, tokens, first)
        start = time.perf_counter()
        try:
            answers, seconds = self.process.ask(question, limit)
        except (TimeoutError, EOFError, BrokenPipeError) as error:
            kind = LATE if isinstance(error, TimeoutError) else "the process ended"
            return Load([kind] * requests, time.perf_counter() - start)
        return Load(list(answers), seconds)
