"""The service of input pipelines: kills, sharing, coordinated rounds, scaling, overheads.

python -m deltaserve.bench.pipeline_service --out bench/results/pipeline-service.json
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from deltaserve.bench.pipeline_rounds import measure_packed, measure_padded
from deltaserve.bench.pipeline_service_plans import killer, packed_text, slow_numbers, worker_cpu
from deltaserve.bench.record import record
from deltaserve.pipeline.service.cluster import Service
from deltaserve.pipeline.service.dispatcher import Dispatcher
from deltaserve.pipeline.service.ledger import JobSpec
from deltaserve.pipeline.service.stream import JobOptions


def measure_kills(folder: Path, seconds: float) -> dict[str, Any]:
    """A worker is killed (signal 9) every 5 s, the dispatcher twice, the consumer returns once
    with an older checkpoint: which rows arrive, against those of one pass."""
    plan, rows = slow_numbers(folder, int(seconds * 300))
    options = JobOptions("kills", mode="dynamic", local=0, depth=8)
    seen: list[int] = []
    with Service(folder / "kills", min_workers=2, max_workers=2, heartbeat_limit_s=2.0) as service:
        stream = service.open(plan, options)
        done = threading.Event()
        killed: list[str] = []
        thread = threading.Thread(target=killer, args=(service, done, killed, seconds))
        thread.start()
        try:
            saved, returned = (stream.get_state(), 0), False
            while True:
                batch = next(stream, None)
                if batch is None:
                    break
                seen += [int(n) for n in batch["n"]]
                if len(seen) % 400 == 0:
                    saved = (stream.get_state(), len(seen))
                if not returned and len(seen) > rows // 2 and len(seen) - saved[1] > 150:
                    returned = True
                    stream.close()
                    stream = service.open(plan, options)
                    stream.set_state(saved[0])
                    del seen[saved[1] :]
            stream.close()
        finally:
            done.set()
            thread.join()
    counts = Counter(seen)
    return {
        "rows": rows,
        "workers killed": killed.count("worker"),
        "dispatcher killed": killed.count("dispatcher"),
        "consumer returned": int(returned),
        "lost": sum(n not in counts for n in range(rows)),
        "duplicated": sum(count - 1 for count in counts.values()),
    }


def measure_sharing(folder: Path) -> list[dict[str, Any]]:
    """k jobs over one stream of tokenised and packed text: CPU seconds of the worker."""
    plan = packed_text(folder)
    results = []
    for mode in ("lockstep", "window"):
        for jobs in (1, 4, 16):
            # The least of two: what else the machine does only adds.
            runs = [_share(folder, plan, mode, jobs, turn) for turn in range(2)]
            best = min(runs, key=lambda run: run["cpu_s"])
            results.append({"mode": mode, "jobs": jobs, **best})
            print(results[-1], flush=True)
    for result in results:
        alone = next(r for r in results if r["mode"] == result["mode"] and r["jobs"] == 1)
        result["cpu, times that of one job"] = round(result["cpu_s"] / alone["cpu_s"], 3)
    return results


def _share(folder: Path, plan: Any, mode: str, jobs: int, turn: int) -> dict[str, Any]:
    counts, skipped = [0] * jobs, [0] * jobs
    with Service(folder / f"share-{mode}-{jobs}-{turn}", min_workers=1, max_workers=1) as service:
        name = f"{mode}{jobs}"

        def consume(consumer: int) -> None:
            options = JobOptions(name, mode=mode, consumer=consumer, consumers=jobs)
            with service.open(plan, options) as stream:
                ready.wait()
                counts[consumer] = sum(1 for _ in stream)
                skipped[consumer] = stream.skipped

        ready = threading.Barrier(jobs)
        before = worker_cpu(service)
        began = time.perf_counter()
        threads = [threading.Thread(target=consume, args=(c,)) for c in range(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wall = time.perf_counter() - began
        cpu = worker_cpu(service) - before
    return {
        "elements": max(counts),
        "fewest of a job": min(counts),
        "skipped": sum(skipped),
        "cpu_s": round(cpu, 2),
        "wall_s": round(wall, 2),
    }


def measure_scaling(folder: Path) -> dict[str, Any]:
    """A consumer wants 40 lists a second, of which a worker prepares about 15: how many workers
    there are, and how long after its end until there is none. Work is sleep, so that the number
    of cores does not decide."""
    plan, _ = slow_numbers(folder, 64 * 1600, seconds=0.001)
    with Service(folder / "scale", max_workers=6, heartbeat_limit_s=2.0) as service:
        workers, rates = [], []
        stream = service.open(plan, JobOptions("scale", local=0))
        began = last = time.monotonic()
        count = 0
        while (now := time.monotonic()) - began < 40:
            next(stream)
            count += 1
            time.sleep(1 / 40 * 16 / 64)  # a batch is a quarter of a list
            if now - last > 2:
                rates.append(round(count / 4 / (now - last), 1))
                workers.append(len(service.stats()["workers"]))
                last, count = now, 0
        stream.close()
        ended = time.monotonic()
        while service.stats()["workers"] and time.monotonic() - ended < 30:
            time.sleep(0.2)
        to_zero = time.monotonic() - ended
    return {
        "workers, every 2 s": workers,
        "lists/s, every 2 s": rates,
        "seconds to no worker": round(to_zero, 1),
    }


def measure_leases(folder: Path) -> dict[str, Any]:
    """The dispatcher alone: grants (each a synced write) and leases a second."""
    dispatcher = Dispatcher(folder / "leases")
    dispatcher.beat("w", "node", {})
    dispatcher.register(JobSpec("job", "s", "dynamic", length=10**9))
    began = time.perf_counter()
    for first in range(0, 8000, 8):
        for number, _ in enumerate(dispatcher.grant("job", 0, first, 8), first):
            dispatcher.lease("job", 0, number, number)
    seconds = time.perf_counter() - began
    dispatcher.close()
    return {"leases/s, granted by 8": round(8000 / seconds)}


PARTS = {
    "leases": lambda folder, seconds: measure_leases(folder),
    "rounds": lambda folder, seconds: measure_padded(folder),
    "packed": lambda folder, seconds: measure_packed(folder),
    "sharing": lambda folder, seconds: measure_sharing(folder),
    "kills": measure_kills,
    "scaling": lambda folder, seconds: measure_scaling(folder),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="of the kills, about")
    parser.add_argument("--only", choices=PARTS, action="append", help="these parts")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    random.seed(0)
    results = {}
    for name in given.only or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = PARTS[name](Path(folder), given.seconds)
        print(name, results[name], flush=True)
    if given.out:
        command = f"python -m deltaserve.bench.pipeline_service --seconds {given.seconds:g}"
        command += "".join(f" --only {name}" for name in given.only or ())
        # Parts may be measured one by one.
        before = json.loads(given.out.read_text())["results"] if given.out.exists() else {}
        record(given.out, command, before | results)


if __name__ == "__main__":
    main()
