"""How much of an operator's CPU time holds the interpreter's lock, fitted from two runs.

The operator is run by one thread and by four. A call needs c on a core, g of that with the
lock; the lock is a queue of one server, so four threads wait for it, and mean value analysis
(Reiser, Lavenberg: JACM 27(2), 1980) says how long for every g. The fit is the g whose
predicted wait is the measured one. Waiting that one thread does too (disk, network) is taken
off first, and waiting for a core is not counted (Linux tells it apart).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deltaserve.pipeline.clocks import Clock
from deltaserve.pipeline.tuning.rates import Lone

THREADS = 4
STEPS = 40
TRIES = 2
NOISE = 0.1


@dataclass(frozen=True)
class Usage:
    """Of all threads together, per call: seconds on a core, and waiting for neither core nor
    calls (the lock, the disk, the network)."""

    cpu_s: float
    waited_s: float


def locked_wait(share: float, threads: int, elsewhere: float = 0.0) -> float:
    """Wait for the lock per unit of CPU time, of ``threads`` threads that hold it for
    ``share`` of their CPU time. elsewhere: other waiting, per unit of CPU time."""
    queue = wait = 0.0
    for n in range(1, threads + 1):
        wait = share * queue
        cycle = 1.0 + elsewhere + wait
        queue = n * (share + wait) / cycle
    return wait


def fit(alone: Usage, together: Usage, threads: int = THREADS) -> float:
    """g, between 0 and 1."""
    if together.cpu_s <= 0:
        return 0.0
    elsewhere = alone.waited_s / max(alone.cpu_s, 1e-12)
    # Sleeps and reads vary by a few percent, which is much beside little CPU time.
    waited = max(0.0, together.waited_s / together.cpu_s - (1 + NOISE) * elsewhere)
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        if locked_wait(middle, threads, elsewhere) < waited:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def measure(call: Callable[[Any], Any], rows: Sequence[Any], threads: int, seconds: float) -> Usage:
    """Run ``call`` on the rows, round and round, in so many threads for so long."""
    stop, found = threading.Event(), list[tuple[int, int, int, int]]()
    start = threading.Barrier(threads)

    def work(offset: int) -> None:
        clock, calls = Clock(), 0
        start.wait()
        began = clock.read()
        while not stop.is_set():
            call(rows[(offset + calls) % len(rows)])
            calls += 1
        wall, cpu, queued = (b - a for a, b in zip(began, clock.read(), strict=True))
        clock.close()
        found.append((calls, wall, cpu, queued))

    workers = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(threads)]
    for worker in workers:
        worker.start()
    time.sleep(seconds)
    stop.set()
    for worker in workers:
        worker.join()
    calls = max(1, sum(each[0] for each in found))
    cpu = sum(each[2] for each in found)
    waited = sum(max(0, each[1] - each[2] - each[3]) for each in found)
    return Usage(cpu / calls / 1e9, waited / calls / 1e9)


def calibrate(call: Callable[[Any], Any], rows: Sequence[Any], seconds: float = 0.25) -> Lone:
    """One operator on sampled rows, by one thread and by four, twice: the less counts, since
    other work on the machine keeps who holds the lock from its core, and adds to all waits."""
    tries = []
    for _ in range(TRIES):
        alone = measure(call, rows, 1, seconds)
        tries.append((fit(alone, measure(call, rows, THREADS, seconds)), alone.waited_s))
    return Lone(*map(min, zip(*tries, strict=True)))
