"""What moving deltas costs those who decode: ``python -m deltaserve.bench.residency``.

Two questions, each answered side by side in one process, in turns, on random models:

- One delta loads from a slow disk while another tenant decodes: how much longer is the 99th
  percentile of the time between its tokens? The disk is simulated: reads are cut into pieces and
  delayed to a given bandwidth.
- Many deltas, asked for by Zipf's law, share memory that holds few of them: what throughput is
  left of what memory for all gives?
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from deltaserve.bench.peer_models import PeerModels, build
from deltaserve.bench.record import record
from deltaserve.config import DeltaSource, EngineConfig
from deltaserve.engine.core import Engine
from deltaserve.engine.loader import Reader
from deltaserve.engine.types import EngineRequest, SamplingParams

PIECE_BYTES = 64 << 10
ROWS = 8
SKEW = 1.2
BATCH = 32
CLIENTS = (BATCH, 4 * BATCH)
"""As many as the batch has rows: nobody waits where there is room for all. And a backlog."""


class SlowFile:
    """A file whose bytes arrive at ``bandwidth`` bytes per second."""

    def __init__(self, path: Path, bandwidth: float) -> None:
        self._file = path.open("rb")
        self._bandwidth = bandwidth

    def readinto(self, target: memoryview) -> int:
        count = self._file.readinto(target[:PIECE_BYTES])
        time.sleep(count / self._bandwidth)
        return count

    def read(self, size: int) -> bytes:
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def __enter__(self) -> SlowFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _open_slowly(bandwidth: float, path: Path) -> BinaryIO:
    return cast(BinaryIO, SlowFile(path, bandwidth))


@dataclass(frozen=True)
class Gaps:
    """Milliseconds between two tokens of one request."""

    tokens: int
    p50: float
    p99: float
    longest: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Gaps:
        p50, p99, longest = np.percentile(seconds, [50, 99, 100]) * 1000
        return cls(len(seconds), float(p50), float(p99), float(longest))


@dataclass(frozen=True)
class Load:
    """seconds by the clock, cpu_seconds of all threads; what residency did meanwhile."""

    room: str
    seconds: float
    cpu_seconds: float
    tokens: int
    loads: int
    load_seconds: float
    evictions: int
    hit_rate: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def slow_disk(models: PeerModels, rounds: int, tokens: int) -> dict[str, Any]:
    """Rounds take turns: quiet, with a delta loading during the whole round, and quiet again,
    which shows what the machine itself varies. The base decodes: its short steps hide least."""
    engine = _engine(models, 1)
    reader = cast(Reader, engine.residency.source)
    size = (models.deltas[1] / "delta.safetensors").stat().st_size
    quiet: list[float] = []
    loading: list[float] = []
    control: list[float] = []
    load_seconds = []
    for number in range(rounds + 1):  # the first warms up
        alone = _decode(engine, f"quiet{number}", tokens)
        # So that the file arrives when three quarters of the round are over: what follows the
        # read is the part that needs a processor.
        bandwidth = size / (0.75 * sum(alone))
        reader.opener = partial(_open_slowly, bandwidth)
        before = engine.stats().residency
        engine.register("slow", str(models.deltas[1]))
        beside = _decode(engine, f"loading{number}", tokens)
        while not engine.residency.idle:
            engine.step()
        after = engine.stats().residency
        assert after.loads == before.loads + 1, "the delta was not loaded"
        engine.unregister("slow")
        again = _decode(engine, f"control{number}", tokens)
        if number:
            quiet += alone
            control += again
            loading += beside
            load_seconds.append(after.load_seconds - before.load_seconds)
    engine.close()
    without, beside_load, repeated = Gaps.of(quiet), Gaps.of(loading), Gaps.of(control)
    return {
        "rounds": rounds,
        "rows": ROWS,
        "delta_bytes": size,
        "load_seconds": sum(load_seconds) / rounds,
        "without": asdict(without),
        "while_loading": asdict(beside_load),
        "without_again": asdict(repeated),
        "p99_change": beside_load.p99 / without.p99 - 1,
        "p99_change_of_nothing": repeated.p99 / without.p99 - 1,
        "p50_change": beside_load.p50 / without.p50 - 1,
    }


def _decode(engine: Engine, name: str, tokens: int) -> list[float]:
    """Rows of the base decode together -> seconds between the tokens of the first."""
    for row in range(ROWS):
        engine.add(_request(f"{name}.{row}", "base", row, tokens))
    times = []
    first = f"{name}.0"
    while engine.scheduler.has_work():
        if any(event.request_id == first for event in engine.step()):
            times.append(time.perf_counter())
    return np.diff(times).tolist()


def zipf_load(models: PeerModels, room: int, rounds: int, requests: int) -> list[dict[str, Any]]:
    """The same requests on each engine, round by round in turns; by number of clients.

    requests: per client.
    """
    count = len(models.deltas)
    everything = _engine(models, count)
    size = max(v.needs.device_bytes for v in everything.residency.catalogue.versions())
    engines = {
        "all": everything,
        f"{room}": _engine(models, count, delta_memory_bytes=room * size),
        f"{room}, no host tier": _engine(
            models, count, delta_memory_bytes=room * size, host_memory_bytes=0
        ),
    }
    found = [_by_room(engines, count, rounds, clients, requests) for clients in CLIENTS]
    for engine in engines.values():
        engine.close()
    return found


def _by_room(
    engines: dict[str, Engine], count: int, rounds: int, clients: int, requests: int
) -> dict[str, Any]:
    results: dict[str, list[Load]] = {name: [] for name in engines}
    for number in range(rounds + 1):  # the first warms up
        for name, engine in engines.items():
            load = _serve(engine, name, count, clients, requests if number else 1, number)
            if number:
                results[name].append(load)
    totals = {name: _total(loads) for name, loads in results.items()}
    return {
        "deltas": count,
        "skew": SKEW,
        "clients": clients,
        "requests": rounds * requests * clients,
        "loads": [asdict(t) | {"tokens_per_second": t.tokens_per_second} for t in totals.values()],
        "share_of_throughput": {
            name: total.tokens_per_second / totals["all"].tokens_per_second
            for name, total in totals.items()
        },
    }


def _serve(engine: Engine, room: str, count: int, clients: int, requests: int, seed: int) -> Load:
    """Clients, each with its next request as soon as it has an answer, ``requests`` on average."""
    requests *= clients
    chances = 1 / np.arange(1, count + 1) ** SKEW
    random = np.random.default_rng(seed)
    chosen = random.choice(count, size=requests, p=chances / chances.sum())
    queue = iter(
        [_request(f"{seed}.{i}", f"m{m}", 1000 * seed + i, 32) for i, m in enumerate(chosen)]
    )
    before = engine.stats()
    gc.collect()
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(clients):
        engine.add(next(queue))
    done = 0
    while done < requests:
        for event in engine.step():
            if event.finish_reason is not None:
                assert event.error is None, event.error
                done += 1
                for request in _next(queue):
                    engine.add(request)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    after = engine.stats()
    moved, had = after.residency, before.residency
    return Load(
        room,
        seconds,
        cpu,
        after.generation_tokens - before.generation_tokens,
        moved.loads - had.loads,
        moved.load_seconds - had.load_seconds,
        moved.evictions - had.evictions,
        (moved.hits - had.hits) / requests,
    )


def _next(queue: Iterator[EngineRequest]) -> list[EngineRequest]:
    request = next(queue, None)
    return [] if request is None else [request]


def _total(loads: Sequence[Load]) -> Load:
    def total(field: Callable[[Load], float]) -> float:
        return sum(field(load) for load in loads)

    return Load(
        loads[0].room,
        total(lambda x: x.seconds),
        total(lambda x: x.cpu_seconds),
        sum(x.tokens for x in loads),
        sum(x.loads for x in loads),
        total(lambda x: x.load_seconds),
        sum(x.evictions for x in loads),
        total(lambda x: x.hit_rate) / len(loads),
    )


def _engine(models: PeerModels, count: int, **knobs: Any) -> Engine:
    sources = tuple(DeltaSource(f"m{i}", str(d)) for i, d in enumerate(models.deltas[:count]))
    options: dict[str, Any] = {
        "served_model_name": "base",
        "kv_cache_memory_bytes": 256 << 20,
        "max_num_seqs": BATCH,
        "max_model_len": 1024,
    }
    return Engine(EngineConfig(base=str(models.base), deltas=sources, **{**options, **knobs}))


def _request(name: str, model: str, index: int, tokens: int) -> EngineRequest:
    prompt = tuple((index * 997 + i * 31) % 8000 + 1 for i in range(32))
    return EngineRequest(name, model, prompt, SamplingParams(max_tokens=tokens, temperature=0.0))


def show(results: dict[str, Any]) -> None:
    slow = results["slow_disk"]
    print(f"a delta loads for {slow['load_seconds']:.2f} s while {slow['rows']} rows decode:")
    for label, key in (
        ("without a load", "without"),
        ("while loading", "while_loading"),
        ("without again", "without_again"),
    ):
        gaps = slow[key]
        print(f"  {label:<16} p50 {gaps['p50']:7.2f} ms   p99 {gaps['p99']:7.2f} ms")
    print(f"  p99 {slow['p99_change']:+.1%} (goal: at most +20 %)")
    for zipf in results["zipf"]:
        print(f"{zipf['deltas']} deltas, Zipf {zipf['skew']}, {zipf['clients']} clients:")
        for load in zipf["loads"]:
            share = zipf["share_of_throughput"][load["room"]]
            print(
                f"  room for {load['room']:<18} {load['tokens_per_second']:8.1f} tokens/s "
                f"({share:.0%}), {load['loads']} loads, {load['hit_rate']:.0%} found resident"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, help="keep the models here (default: temporary)")
    parser.add_argument("--rounds", type=int, default=6, help="of the slow disk")
    parser.add_argument("--tokens", type=int, default=300, help="of each decoding row")
    parser.add_argument("--deltas", type=int, default=64)
    parser.add_argument("--room", type=int, default=8, help="how many of them fit")
    parser.add_argument("--requests", type=int, default=2, help="of each client in a round")
    parser.add_argument("--zipf-rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write a JSON file as well")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        root = args.dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        print("making the models ...", file=sys.stderr, flush=True)
        large = build(root / "large", 2)
        small = build(root / "small", args.deltas, hidden=256, layers=4)
        results = {
            "slow_disk": slow_disk(large, args.rounds, args.tokens),
            "zipf": zipf_load(small, args.room, args.zipf_rounds, args.requests),
        }
    show(results)
    if args.out:
        command = (
            f"python -m deltaserve.bench.residency --rounds {args.rounds} --tokens {args.tokens} "
            f"--deltas {args.deltas} --room {args.room} --requests {args.requests} "
            f"--zipf-rounds {args.zipf_rounds}"
        )
        record(args.out, command, results)


if __name__ == "__main__":
    main()
