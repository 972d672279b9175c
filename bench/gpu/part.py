"""What the parts of the GPU benchmark share: settings, the clock, results that survive a kill."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deltaserve.bench.record import save
from deltaserve.kernels.delta_matmul import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Several times the cache of an H200.
FLUSH_BYTES = 256 << 20
COPY_BYTES = 1 << 30
REPEATS = 15


@dataclass
class Part:
    """One part of the run.

    out: its JSON file, written anew with every result, so that a part that is killed has told what
    it knew. end: by ``time.monotonic``, after which nothing new is begun. smoke: tiny sizes on a
    CPU, where only the program is tried, and no number means anything. models: folder of the
    checkpoints that several parts use.
    """

    module: str
    out: Path | None
    end: float
    smoke: bool
    models: Path
    results: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_arguments(cls, module: str, about: str | None, *, interpreted: bool = True) -> Part:
        """Also refuses to measure on a CPU. interpreted: there Triton's interpreter computes the
        kernels; otherwise the CPU's own operators do."""
        parser = argparse.ArgumentParser(description=about)
        parser.add_argument("--out", type=Path, help="write a JSON file")
        parser.add_argument("--seconds", type=float, default=600, help="begin nothing after that")
        parser.add_argument("--smoke", action="store_true", help="try the program on a CPU, tiny")
        parser.add_argument("--models", type=Path, default=Path("/tmp/deltaserve-gpu-models"))
        args = parser.parse_args()
        if DEVICE == "cpu" and not args.smoke:
            parser.exit(2, "there is no CUDA device: only --smoke runs without one\n")
        if DEVICE == "cpu" and interpreted:
            if os.environ.get("TRITON_INTERPRET") != "1":
                parser.exit(2, "without a CUDA device, TRITON_INTERPRET=1 must be set as well\n")
            dispatch.has_kernels = lambda name, base_NK: True
        end = time.monotonic() + args.seconds
        return cls(module, args.out, end, args.smoke, args.models)

    def note(self, name: str, value: Any) -> None:
        self.results[name] = value
        self._save()

    def add(self, name: str, value: Any) -> None:
        """One more of a list."""
        self.note(name, [*self.results.get(name, []), value])

    def leave_out(self, what: str, why: str) -> None:
        print(f"left out: {what} ({why})", flush=True)
        self.add("left_out", f"{what}: {why}")

    def has_time(self, what: str, seconds: float = 0.0) -> bool:
        """Whether something that takes so long may begin; else it is noted as left out."""
        if time.monotonic() + seconds < self.end:
            return True
        self.leave_out(what, "no time left")
        return False

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self.end - time.monotonic())

    def _save(self) -> None:
        if self.out is not None:
            command = f"python -m deltaserve.bench.gpu.{self.module}"
            save(self.out, command + " --smoke" * self.smoke, self.results)


class Clock:
    """Times work on the device, in microseconds."""

    def __init__(self, repeats: int = REPEATS) -> None:
        self.repeats = repeats if DEVICE == "cuda" else 1
        size = FLUSH_BYTES if DEVICE == "cuda" else 1
        self.flush = torch.empty(size, dtype=torch.uint8, device=DEVICE)

    def microseconds(self, work: Callable[[], object]) -> float:
        """Median over replays of the work as a graph, each after a flush of the cache."""
        work()  # compiles
        if DEVICE == "cpu":
            return self._by_wall(work)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        times = []
        for _ in range(self.repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # It also keeps the device busy until the graph has been handed over.
            self.flush.zero_()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        return statistics.median(times)

    def _by_wall(self, work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e6


def copy_bandwidth(clock: Clock) -> float:
    """Bytes per second, read and written, of a large plain copy."""
    size = COPY_BYTES if DEVICE == "cuda" else 1 << 20
    source = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size / clock.microseconds(lambda: target.copy_(source)) * 1e6


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"


def free_bytes() -> int:
    """Of the device's memory."""
    if DEVICE == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return 1 << 30
