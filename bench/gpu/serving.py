"""Many fine-tunes end to end: ``python -m deltaserve.bench.gpu.serving``.

32 fine-tunes of a 1.1 B Llama with random weights, asked for by Zipf's law with exponent 1.5, three
ways, one after the other: as 2-bit deltas beside the base; as whole models that the same engine
swaps in and out, in exactly the memory that all the deltas take; and by one ``generate`` process
per model, each with all its requests as one batch, the models loaded before the clock starts. The
engines get the requests as they arrive, the processes all at once.

Swapping is given the better end: whole models are read from files that are in the page cache, and
stay in pinned memory as far as that goes.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deltaserve.artifact.reader import Delta
from deltaserve.bench.gpu.part import DEVICE, Part, device_name, free_bytes
from deltaserve.bench.gpu.shapes import Models, build, llama
from deltaserve.config import DeltaSource, EngineConfig
from deltaserve.engine.core import Engine
from deltaserve.engine.types import EngineRequest, SamplingParams

SKEW = 1.5
DISTINCT = (8, 1)
"""Different deltas and whole models on disk, 0.27 and 2.2 GB each."""
# Of a generate process, beside the weights and half as much again: CUDA's context and libraries.
PROCESS_BYTES = 3 << 29
MAX_PROCESSES = 16


@dataclass(frozen=True)
class Traffic:
    """num_models names, requests of (prompt, output) tokens over ``seconds``."""

    num_models: int
    num_requests: int
    prompt: int
    output: int
    seconds: float


FULL = Traffic(32, 384, 128, 64, 6.0)
TINY = Traffic(4, 6, 8, 3, 0.1)


@dataclass(frozen=True)
class Arrival:
    at: float
    model: int
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class Load:
    """seconds: until the last answer, or until the limit. ttft: seconds, of what has begun."""

    way: str
    models: int
    tokens: int
    seconds: float
    finished: int
    requests: int
    ttft_p50: float | None = None
    ttft_p99: float | None = None
    loads: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def arrivals(traffic: Traffic, vocab_size: int) -> list[Arrival]:
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, traffic.num_models + 1) ** SKEW
    models = rng.choice(traffic.num_models, traffic.num_requests, p=weights / weights.sum())
    times = np.sort(rng.uniform(0, traffic.seconds, traffic.num_requests))
    return [
        Arrival(float(at), int(model), tuple(rng.integers(1, vocab_size, traffic.prompt).tolist()))
        for at, model in zip(times, models, strict=True)
    ]


def engine(
    base: Path, paths: tuple[Path, ...], traffic: Traffic, room: int | None, **knobs: Any
) -> Engine:
    """Serving ``num_models`` names that go round the paths. room: bytes of the device for them."""
    sources = tuple(
        DeltaSource(f"m{i}", str(paths[i % len(paths)])) for i in range(traffic.num_models)
    )
    config: dict[str, Any] = {
        "base": str(base),
        "served_model_name": "base",
        "deltas": sources,
        "dtype": "bfloat16",
        "device": DEVICE,
        "max_num_seqs": 64,
        "max_model_len": 1024,
        "enable_prefix_caching": False,  # names that share a file would share what was computed
        "merge_memory_bytes": 0,
        "delta_memory_bytes": room,
        "kv_cache_memory_bytes": 64 * 1024 * kv_bytes_per_token(base),
    }
    return Engine(EngineConfig(**(config | knobs)))


def kv_bytes_per_token(base: Path) -> int:
    config = json.loads((base / "config.json").read_text())
    head = config["hidden_size"] // config["num_attention_heads"]
    return int(4 * config["num_hidden_layers"] * config["num_key_value_heads"] * head)


def drive(running: Engine, way: str, traffic: Traffic, asked: list[Arrival], limit: float) -> Load:
    """Requests as they arrive, until all have ended or ``limit`` seconds have passed."""
    params = SamplingParams(max_tokens=traffic.output, temperature=0.0)
    begun: dict[str, float] = {}
    tokens = finished = added = 0
    before = running.stats().residency.loads
    start = time.perf_counter()
    while (now := time.perf_counter() - start) < limit:
        while added < len(asked) and asked[added].at <= now:
            ask = asked[added]
            running.add(EngineRequest(f"{added}", f"m{ask.model}", ask.prompt, params))
            added += 1
        if not running.has_work():
            if added == len(asked):
                break
            time.sleep(0.0005)
            continue
        for event in running.step():
            assert event.error is None, event.error
            tokens += len(event.token_ids)
            if event.token_ids and event.request_id not in begun:
                arrived = asked[int(event.request_id)].at
                begun[event.request_id] = time.perf_counter() - start - arrived
            finished += event.finish_reason is not None
    p50, p99 = np.percentile(list(begun.values()) or [0.0], [50, 99])
    return Load(
        way,
        traffic.num_models,
        tokens,
        time.perf_counter() - start,
        finished,
        len(asked),
        float(p50),
        float(p99),
        running.stats().residency.loads - before,
    )


def by_engine(
    part: Part, way: str, models: Models, traffic: Traffic, room: int | None, limit: float
) -> tuple[Load, int]:
    """(load, bytes on the device for the fine-tunes)."""
    paths = models.deltas if way == "deltas" else models.wholes
    running = engine(models.base, paths, traffic, room)
    needs = [running.residency.current(f"m{i}").needs for i in range(traffic.num_models)]
    asked = arrivals(traffic, running.base.config.vocab_size)
    # Compiles what prompts and mixed steps need; a second time with nothing to compile.
    warm = Traffic(traffic.num_models, min(16, len(asked)), traffic.prompt, 4, 0.0)
    for _ in range(1 if part.smoke else 2):
        drive(running, "warm-up", warm, asked[: warm.num_requests], limit / 2)
        while running.has_work():
            running.step()
    load = drive(running, way, traffic, asked, limit)
    running.close()
    return load, sum(need.device_bytes for need in needs)


def by_processes(part: Part, models: Models, traffic: Traffic, limit: float) -> Load:
    """One process of transformers per model that is asked for, most popular first."""
    asked = arrivals(traffic, llama("tiny" if part.smoke else "1b").vocab_size)
    weights = sum(file.stat().st_size for file in models.base.glob("*.safetensors"))
    most = min(MAX_PROCESSES, int(free_bytes() // (1.5 * weights + PROCESS_BYTES)))
    if DEVICE == "cpu":
        most = 2
    ranked = [model for model, _ in Counter(ask.model for ask in asked).most_common()]
    if len(ranked) > most:
        left = sum(ask.model in ranked[most:] for ask in asked)
        part.leave_out(
            f"generate processes of {len(ranked) - most} models, {left} of {len(asked)} requests",
            f"{most} processes fit",
        )
    prompts = {m: [ask.prompt for ask in asked if ask.model == m] for m in ranked[:most]}
    workers = [_worker(models.base, own, traffic.output) for own in prompts.values()]
    try:
        return _race(workers, prompts, 2 * limit)
    finally:
        _kill(workers)


def _kill(workers: list[subprocess.Popen[str]]) -> None:
    for worker in workers:
        worker.kill()
        worker.wait()


def _worker(base: Path, prompts: list[tuple[int, ...]], output: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "deltaserve.bench.gpu.generate", str(base), str(output)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdin is not None
    worker.stdin.write(json.dumps(prompts) + "\n")
    worker.stdin.flush()
    return worker


def _race(
    workers: list[subprocess.Popen[str]], prompts: dict[int, list[tuple[int, ...]]], limit: float
) -> Load:
    """From the moment in which all are loaded until the last has answered. limit: seconds after
    which they are killed, so that nothing is waited for in vain."""
    watch = threading.Timer(limit, _kill, [workers])
    watch.daemon = True
    watch.start()
    for worker in workers:
        assert worker.stdout is not None
        if worker.stdout.readline() != "ready\n":
            raise RuntimeError("a generate process did not start")
    start = time.perf_counter()
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    tokens = sum(int(worker.stdout.readline() or 0) for worker in workers if worker.stdout)
    seconds = time.perf_counter() - start
    watch.cancel()
    count = sum(map(len, prompts.values()))
    return Load("generate processes", len(workers), tokens, seconds, count, count)


@torch.inference_mode()
def main() -> None:
    part = Part.of_arguments("serving", __doc__, interpreted=False)
    traffic = TINY if part.smoke else FULL
    size, (num_deltas, num_wholes) = ("tiny", (2, 2)) if part.smoke else ("1b", DISTINCT)
    limit = 20.0 if part.smoke else 45.0
    models = build(part.models, size, num_deltas, num_wholes)
    print(f"{device_name()}: {traffic}")
    loads = []
    room = None
    for way in ("deltas", "whole models swapped"):
        if part.has_time(way, 15):
            load, used = by_engine(part, way, models, traffic, room, min(limit, part.left / 2))
            loads.append(load)
            room = room or max(used, one_whole(models))
            show(part, load)
            release()
    part.note("delta_memory_bytes", room)
    if part.has_time("generate processes", 30):
        loads.append(by_processes(part, models, traffic, min(limit, part.left / 2)))
        show(part, loads[-1])
    if len(loads) > 1:
        part.note("over_swapping", loads[0].tokens_per_second / loads[1].tokens_per_second)
        print(f"deltas over swapping: {part.results['over_swapping']:.1f}x")


def one_whole(models: Models) -> int:
    """Bytes of the device without which no whole model could be swapped in."""
    return max(Delta.open(path).manifest.sizes.resident.total for path in models.wholes)


def release() -> None:
    """Give an engine's memory back: layers and runner hold each other."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def show(part: Part, load: Load) -> None:
    part.add("rows", asdict(load) | {"tokens_per_second": load.tokens_per_second})
    print(f"{load.way:<22}{load.tokens_per_second:>9.0f} tokens/s, {load}", flush=True)


if __name__ == "__main__":
    main()
