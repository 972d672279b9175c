"""The same load over HTTP on this server and on others: ``python -m deltaserve.bench.peers``.

One machine, one run, one after the other: the same 30 M-parameter models, prompts and official
``openai`` client; each server is started, warmed up with one request per model and a short load,
loaded several times with prompts that it has not seen, and stopped. 32 requests of 64 generated
tokens at once, greedy, over one model and over eight fine-tunes. The median load counts.
DeltaServe gets deltas; the others get the full checkpoints. What fails is shown as failed, not as
slow.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError

from deltaserve.bench.peer_models import PeerModels, build, prompt
from deltaserve.bench.record import record

START_SECONDS = 180.0
REQUEST_SECONDS = 300.0
MERGE_BYTES = 4 << 30


@dataclass(frozen=True)
class Peer:
    """A server to compare: its command, and how it names the models."""

    name: str
    command: tuple[str, ...]
    models: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """The median of the loads on one server. Times in seconds; tokens are those of requests that
    succeeded."""

    server: str
    num_models: int
    requests: int
    succeeded: int
    failures: dict[str, int]
    seconds: float
    tokens: int
    fastest: float
    slowest: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def peers(models: PeerModels) -> list[Peer]:
    deltas = tuple(f"--delta={d.stem}={d}" for d in models.deltas)
    serve = (sys.executable, "-m", "deltaserve", "serve", str(models.base), *deltas)
    names = tuple(d.stem for d in models.deltas)
    full = tuple(str(tune) for tune in models.tunes)
    other = (str(Path(sys.executable).with_name("transformers")), "serve", "--host", "127.0.0.1")
    return [
        Peer("deltaserve", serve, names),
        Peer("deltaserve, merged at start", (*serve, f"--merge-memory-bytes={MERGE_BYTES}"), names),
        Peer("transformers serve", other, full),
        Peer("transformers serve --continuous-batching", (*other, "--continuous-batching"), full),
    ]


@contextlib.contextmanager
def running(peer: Peer, log: Path) -> Iterator[str]:
    """The peer's process, ready; ended when the block is left. Yields its address."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*peer.command, "--port", str(port)], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(url, process, peer, log)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], peer: Peer, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", trust_env=False, timeout=5).status_code == 200:
                return
        time.sleep(0.2)
    raise SystemExit(f"{peer.name} did not become ready; its log is {log}")


@dataclass(frozen=True)
class Load:
    """What became of the requests that were sent at once: tokens of an answer, or the failure."""

    answers: list[int | str]
    seconds: float


async def load(url: str, models: Sequence[str], requests: int, tokens: int, first: int) -> Load:
    """``requests`` at once, the models taking turns. first: number of the first prompt."""
    http = DefaultAsyncHttpxClient(trust_env=False, timeout=REQUEST_SECONDS)
    async with AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", http_client=http, max_retries=0
    ) as client:
        start = time.perf_counter()
        answers = await asyncio.gather(
            *(_ask(client, models[i % len(models)], first + i, tokens) for i in range(requests))
        )
        return Load(answers, time.perf_counter() - start)


def summary(server: str, num_models: int, loads: Sequence[Load]) -> Measured:
    times = sorted(each.seconds for each in loads)
    median = min(loads, key=lambda each: abs(each.seconds - statistics.median(times)))
    good = [answer for answer in median.answers if isinstance(answer, int)]
    bad = Counter(answer for answer in median.answers if isinstance(answer, str))
    return Measured(
        server,
        num_models,
        requests=len(median.answers),
        succeeded=len(good),
        failures=dict(bad),
        seconds=median.seconds,
        tokens=sum(good),
        fastest=times[0],
        slowest=times[-1],
    )


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
    return answer.usage.completion_tokens if answer.usage else 0


def measure(
    models: PeerModels, requests: int, tokens: int, rounds: int, logs: Path
) -> list[Measured]:
    found = []
    for peer in peers(models):
        for count in (1, len(peer.models)):
            print(f"{peer.name}, {count} model(s) ...", file=sys.stderr, flush=True)
            served = peer.models[:count]
            # A fresh process for each load: a server that broke must not spoil the next one.
            with running(peer, logs / f"{peer.name.replace(' ', '_')}-{count}.log") as url:
                for model in served:
                    asyncio.run(load(url, [model], 1, 4, 10_000))
                asyncio.run(load(url, served, requests, 8, 20_000))
                loads = [
                    asyncio.run(load(url, served, requests, tokens, i * requests))
                    for i in range(rounds)
                ]
            found.append(summary(peer.name, count, loads))
    return found


def show(results: Sequence[Measured]) -> None:
    print(
        f"{'server':<42}{'models':>7}{'answered':>10}"
        f"{'seconds':>9}{'from - to':>14}{'tokens/s':>10}"
    )
    for r in results:
        share = f"{r.succeeded}/{r.requests}"
        print(
            f"{r.server:<42}{r.num_models:>7}{share:>10}{r.seconds:>9.1f}"
            f"{f'{r.fastest:.1f} - {r.slowest:.1f}':>14}{r.tokens_per_second:>10.1f}"
        )
        for kind, count in r.failures.items():
            print(f"    {count} x {kind}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, help="keep models and logs here (default: temporary)")
    parser.add_argument("--models", type=int, default=8, help="fine-tunes (default 8)")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="loads of each server (default 3)")
    parser.add_argument("--out", type=Path, help="write a JSON file as well")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        root = args.dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root.mkdir(parents=True, exist_ok=True)
        results = measure(build(root, args.models), args.requests, args.tokens, args.rounds, root)
    show(results)
    if args.out:
        command = (
            f"python -m deltaserve.bench.peers --models {args.models} "
            f"--requests {args.requests} --tokens {args.tokens} --rounds {args.rounds}"
        )
        rows = [asdict(r) | {"tokens_per_second": r.tokens_per_second} for r in results]
        record(args.out, command, rows)


if __name__ == "__main__":
    main()
