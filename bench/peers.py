"""The same load over HTTP on this server and on others: ``python -m deltaserve.bench.peers``.

One machine, one run: the same 30 M-parameter models, prompts and official ``openai`` client. In
each round every server in turn is started, warmed up with one request per model and a short load,
loaded with prompts that it has not seen, and stopped, so that what the machine does meanwhile meets
all of them. 32 requests of 64 generated tokens at once, greedy, over one model and over eight
fine-tunes. The median round counts; ratios are those of the same round.

DeltaServe gets deltas; the others get the full checkpoints. "Whole models swapped" is DeltaServe
with room for one uncompressed fine-tune at a time, the others in host memory: the baseline of the
DeltaZip paper. ``--url NAME=URL`` adds any server with OpenAI's API that runs already. What fails
is shown as failed, not as slow.
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
OURS = "deltaserve"


@dataclass(frozen=True)
class Peer:
    """A server to compare: its command, or where it runs already, and how it names the models."""

    name: str
    command: tuple[str, ...]
    models: tuple[str, ...]
    url: str | None = None


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
    rounds: list[float]
    """Tokens/s of each."""
    ratio: list[float]
    """Of DeltaServe's tokens/s to it, round by round; empty where it answered nothing."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def peers(models: PeerModels) -> list[Peer]:
    deltas = tuple(f"--delta={d.stem}={d}" for d in models.deltas)
    serve = (sys.executable, "-m", "deltaserve", "serve", str(models.base), *deltas)
    names = tuple(d.stem for d in models.deltas)
    full = tuple(str(tune) for tune in models.tunes)
    other = (str(Path(sys.executable).with_name("transformers")), "serve", "--host", "127.0.0.1")
    size = sum(file.stat().st_size for file in models.wholes[0].iterdir())
    swap = (
        *(sys.executable, "-m", "deltaserve", "serve", str(models.base)),
        *(f"--delta={name}={w}" for name, w in zip(names, models.wholes, strict=True)),
        f"--delta-memory-bytes={size * 3 // 2}",
        f"--host-memory-bytes={size * len(names) * 2}",
        "--merge-memory-bytes=0",
    )
    return [
        Peer(OURS, serve, names),
        Peer("deltaserve, merged at start", (*serve, f"--merge-memory-bytes={MERGE_BYTES}"), names),
        Peer("deltaserve, whole models swapped", swap, names),
        Peer("transformers serve", other, full),
        Peer("transformers serve --continuous-batching", (*other, "--continuous-batching"), full),
    ]


@contextlib.contextmanager
def running(peer: Peer, log: Path) -> Iterator[str]:
    """The peer's process, ready; ended when the block is left. Yields its address."""
    if peer.url is not None:
        yield peer.url
        return
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


def summary(server: str, num_models: int, loads: Sequence[Load], ours: Sequence[Load]) -> Measured:
    """loads, ours: of this server and of DeltaServe, round by round."""
    times = sorted(each.seconds for each in loads)
    median = min(loads, key=lambda each: abs(each.seconds - statistics.median(times)))
    good = [answer for answer in median.answers if isinstance(answer, int)]
    bad = Counter(answer for answer in median.answers if isinstance(answer, str))
    pairs = [(_rate(mine), _rate(theirs)) for mine, theirs in zip(ours, loads, strict=True)]
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
        rounds=[theirs for _, theirs in pairs],
        ratio=[mine / theirs for mine, theirs in pairs] if all(r for _, r in pairs) else [],
    )


def _rate(load: Load) -> float:
    """Tokens/s of what was answered."""
    return sum(answer for answer in load.answers if isinstance(answer, int)) / load.seconds


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
    servers: Sequence[Peer], requests: int, tokens: int, rounds: int, logs: Path
) -> list[Measured]:
    """The first of the servers is what the others are compared with."""
    loads: dict[tuple[str, int], list[Load]] = {}
    for number in range(rounds):
        for peer in servers:
            for count in dict.fromkeys((1, len(peer.models))):
                what = f"round {number + 1}, {peer.name}, {count} model(s) ..."
                print(what, file=sys.stderr, flush=True)
                served = peer.models[:count]
                # A fresh process for each load: a server that broke must not spoil the next one.
                log = logs / f"{peer.name.replace(' ', '_')}-{count}.log"
                with running(peer, log) as url:
                    for model in served:
                        asyncio.run(load(url, [model], 1, 4, 10_000))
                    asyncio.run(load(url, served, requests, 8, 20_000))
                    found = asyncio.run(load(url, served, requests, tokens, number * requests))
                loads.setdefault((peer.name, count), []).append(found)
    return [
        summary(name, count, found, loads[servers[0].name, count])
        for (name, count), found in loads.items()
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
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise SystemExit(f"--url {text}: no list of models: {error}") from None
    if len(models) < count:
        raise SystemExit(f"--url {text}: it serves {len(models)} models, {count} are compared")
    return Peer(name, (), tuple(models[-count:]), url)


def show(results: Sequence[Measured]) -> None:
    print(
        f"{'server':<42}{'models':>7}{'answered':>10}"
        f"{'seconds':>9}{'from - to':>14}{'tokens/s':>10}  {'deltaserve is':<14}"
    )
    for r in results:
        share = f"{r.succeeded}/{r.requests}"
        print(
            f"{r.server:<42}{r.num_models:>7}{share:>10}{r.seconds:>9.1f}"
            f"{f'{r.fastest:.1f} - {r.slowest:.1f}':>14}{r.tokens_per_second:>10.1f}  {_ratio(r)}"
        )
        for kind, count in r.failures.items():
            print(f"    {count} x {kind}")


def _ratio(r: Measured) -> str:
    if not r.ratio or r.server == OURS:
        return ""
    middle = statistics.median(r.ratio)
    return f"{middle:.2f}x ({min(r.ratio):.2f} - {max(r.ratio):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, help="keep models and logs here (default: temporary)")
    parser.add_argument("--models", type=int, default=8, help="fine-tunes (default 8)")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--url", action="append", default=[], help="NAME=URL; repeat it")
    parser.add_argument("--out", type=Path, help="write a JSON file as well")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        root = args.dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root.mkdir(parents=True, exist_ok=True)
        servers = peers(build(root, args.models))
        servers += [running_peer(text, args.models) for text in args.url]
        results = measure(servers, args.requests, args.tokens, args.rounds, root)
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
