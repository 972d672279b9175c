"""First tokens of deltas that are not on the device: ``python -m deltaserve.bench.gpu.cold``.

The model and the deltas of ``serving``, one request at a time with a prompt of 512 tokens: its
delta on the device (warm), in pinned host memory, or on disk, out of the page cache. Room for some
of the deltas makes the engine evict, in its own order; each time is filed by where the delta was.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from deltaserve.bench.gpu.part import Part, device_name
from deltaserve.bench.gpu.serving import DISTINCT, Traffic, engine, release
from deltaserve.bench.gpu.shapes import Models, build
from deltaserve.engine.core import Engine
from deltaserve.engine.types import EngineRequest, SamplingParams
from deltaserve.engine.versions import Tier

PROMPT = 512
ROOM = 3
"""Deltas on the device."""
ROUNDS = 3
SETTLE_S = 60.0


def first_token_ms(running: Engine, number: int, name: str, prompt: int) -> float:
    vocab = running.base.config.vocab_size
    ids = tuple(1 + (number * 31 + i * 7) % (vocab - 1) for i in range(prompt))
    params = SamplingParams(max_tokens=1, temperature=0.0)
    start = time.perf_counter()
    running.add(EngineRequest(f"c{number}", name, ids, params))
    while running.has_work():
        for event in running.step():
            assert event.error is None, event.error
            if event.token_ids:
                return (time.perf_counter() - start) * 1e3
    raise AssertionError("the request ended without a token")


def settle(running: Engine) -> None:
    """Until copies to the host have ended and what is on the device may be evicted."""
    end = time.monotonic() + SETTLE_S
    while not running.residency.idle and time.monotonic() < end:
        running.step()
    time.sleep(1.1 * running.residency.device.limits.min_residency_s)


def forget_pages(path: Path) -> None:
    """Take a delta's files out of the page cache, so that its bytes come from the disk."""
    for file in path.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(
    part: Part, models: Models, prompt: int, traffic: Traffic, *, host: bool
) -> dict[str, list[float]]:
    """Milliseconds, by the tier in which the delta was. host: whether memory holds copies."""
    room = int(ROOM * 1.1 * _delta_bytes(models, traffic))
    knobs: dict[str, Any] = {} if host else {"host_memory_bytes": 0}
    running = engine(models.base, models.deltas, traffic, room, **knobs)
    found: dict[str, list[float]] = {}
    names = [f"m{i}" for i in range(traffic.num_models)]
    for number in range((2 if part.smoke else ROUNDS) * len(names)):
        if not part.has_time(f"first tokens, round {number // len(names)}", 1):
            break
        name = names[number % len(names)]
        settle(running)
        version = running.residency.current(name)
        if not host:
            forget_pages(Path(version.path))
        tier = str(version.tier)
        took = first_token_ms(running, 2 * number, name, prompt)
        again = first_token_ms(running, 2 * number + 1, name, prompt)
        # The first round compiles, and what was on the device is not what is asked here.
        if number >= len(names) and tier != Tier.DEVICE:
            found.setdefault(tier, []).append(took)
            found.setdefault("warm", []).append(again)
    running.close()
    return found


def _delta_bytes(models: Models, traffic: Traffic) -> int:
    """Of a delta on the device."""
    probe = engine(models.base, models.deltas, Traffic(1, 0, 0, 0, 0.0), None)
    size = probe.residency.current("m0").needs.device_bytes
    probe.close()
    release()
    return size


@torch.inference_mode()
def main() -> None:
    part = Part.of_arguments("cold", __doc__, interpreted=False)
    size, (num_deltas, _) = ("tiny", (4, 0)) if part.smoke else ("1b", DISTINCT)
    prompt = 16 if part.smoke else PROMPT
    models = build(part.models, size, num_deltas, 0)
    traffic = Traffic(num_deltas, 0, prompt, 1, 0.0)
    print(f"{device_name()}: prompts of {prompt} tokens, room for {ROOM} of {num_deltas} deltas")
    for host in (True, False):
        found = measure(part, models, prompt, traffic, host=host)
        release()
        if "warm" not in found:
            continue
        warm = statistics.median(found["warm"])
        for tier, times in found.items():
            median = statistics.median(times)
            row = {
                "tier": tier,
                "host_copies": host,
                "samples": len(times),
                "ttft_ms": median,
                "over_warm": median / warm,
            }
            part.add("rows", row)
            print(f"{tier:<8}{median:>9.2f} ms, {median / warm:.2f} of warm ({len(times)} times)")


if __name__ == "__main__":
    main()
