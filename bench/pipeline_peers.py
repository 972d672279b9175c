"""The same job by this library and by others, in turns:
``python -m deltaserve.bench.pipeline_peers``.

Each turn is a process of its own: a few batches to warm up, then as many as come in some seconds.
CPU time is that of the process and all that it started, in those seconds. Rounds are interleaved;
the median round counts, ratios are those of one round. Who fails is said to have failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil

from deltaserve.bench.pipeline_loaders import LOADERS, filled
from deltaserve.bench.pipeline_text import Corpus, existing, write
from deltaserve.bench.record import record

WARM_UP = 24
SIDES = ("deltaserve:0", "threaded:0", "grain:0", "dataloader:0", "streaming:0",
         "deltaserve:2", "grain:2", "dataloader:2", "ray:2")  # fmt: skip
"""Loaders, with their number of worker processes."""
OURS = {"deltaserve": "ours", "threaded": "ours in threads"}
VERSIONS = ("grain", "torch", "datasets", "ray", "tokenizers")
LIMIT_S = 120.0


class PeerError(Exception):
    pass


@dataclass(frozen=True)
class Turn:
    side: str
    tokens_per_s: float
    cpu_s_per_million: float
    fill: float


class CpuOfTree:
    """CPU seconds of this process's descendants so far, also of those that have ended (as they
    were seen last, up to ``PERIOD`` before)."""

    PERIOD = 0.1

    def __init__(self) -> None:
        self._seen: dict[tuple[int, float], float] = {}
        self._done = Event()
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def now(self) -> float:
        for each in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                times = each.cpu_times()
                self._seen[each.pid, each.create_time()] = times.user + times.system
        return sum(list(self._seen.values()))

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(self.PERIOD):
            self.now()


def consume(side: str, corpus: Corpus, seconds: float) -> None:
    """In a process of its own: tells when it is warm, and then what came; ends when told to."""
    name, workers = side.split(":")
    batches = LOADERS[name](corpus, int(workers))
    for _ in range(WARM_UP):
        next(batches)
    print(json.dumps({"warm": True}), flush=True)
    tokens = places = 0
    began = time.perf_counter()
    while (wall := time.perf_counter() - began) < seconds:
        more = filled(next(batches))
        tokens, places = tokens + more[0], places + more[1]
    print(json.dumps({"tokens": tokens, "places": places, "seconds": wall}), flush=True)
    sys.stdin.readline()
    batches.close()  # type: ignore[attr-defined]


def turn(side: str, folder: Path, seconds: float) -> Turn:
    """Raises PeerError: the loader ended, or gave nothing in time."""
    command = [sys.executable, "-m", "deltaserve.bench.pipeline_peers", "--one", side]
    command += ["--corpus", str(folder), "--seconds", str(seconds)]
    tree = CpuOfTree()
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        overdue = Event()
        guard = Thread(target=_guard, args=(child, overdue), daemon=True)
        guard.start()
        try:
            lines = _answers(child)
            next(lines)
            before = tree.now()
            found = next(lines)
            cpu = tree.now() - before
        except StopIteration:
            child.wait()
            errors.seek(0)
            said = errors.read().strip().splitlines() or ["nothing on stderr"]
            raise PeerError(f"ended with {child.returncode}: {said[-1]}") from None
        finally:
            tree.stop()
            _end(child, overdue)
    million = found["tokens"] / 1e6
    return Turn(side, found["tokens"] / found["seconds"], cpu / million,
                found["tokens"] / found["places"])  # fmt: skip


def _answers(child: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """Ours among what libraries print."""
    assert child.stdout is not None
    for line in child.stdout:
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                yield found


def _guard(child: subprocess.Popen[str], overdue: Event) -> None:
    if not overdue.wait(LIMIT_S):
        child.kill()


def _end(child: subprocess.Popen[str], overdue: Event) -> None:
    """It may clean up; what is left of it after 10 s is killed."""
    overdue.set()
    family = psutil.Process().children(recursive=True)
    with contextlib.suppress(OSError):
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.close()
    _, left = psutil.wait_procs(family, timeout=10)
    for each in left:
        with contextlib.suppress(psutil.Error):
            each.kill()
    child.wait()


def compare(
    sides: Sequence[str], folder: Path, seconds: float, rounds: int
) -> list[dict[str, Any]]:
    """Medians of all sides, with the least and the most; ratios to ours with as many workers."""
    turns: dict[str, list[Turn]] = {side: [] for side in sides}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for side in sides:
            if side in failed:
                continue
            try:
                turns[side].append(turn(side, folder, seconds))
                print(asdict(turns[side][-1]), file=sys.stderr, flush=True)
            except PeerError as error:
                failed[side] = str(error)
                print(f"{side}: {error}", file=sys.stderr, flush=True)
    return [_summary(side, turns, failed) for side in sides]


def _summary(side: str, turns: dict[str, list[Turn]], failed: dict[str, str]) -> dict[str, Any]:
    if side in failed:
        return {"side": side, "failed": failed[side]}
    loader, workers = side.split(":")
    found: dict[str, Any] = {"side": side, "rounds": len(turns[side])}
    for name in ("tokens_per_s", "cpu_s_per_million", "fill"):
        values = [getattr(each, name) for each in turns[side]]
        found[name] = _spread(values)
        for mine, called in OURS.items():
            ours = f"{mine}:{workers}"
            if loader in OURS or ours not in turns or ours in failed or name == "fill":
                continue
            pairs = zip(turns[ours], values, strict=True)
            ratios = [getattr(each, name) / value for each, value in pairs]
            found[f"{name}, {called} / theirs"] = _spread(ratios)
    return found


def _spread(values: list[float]) -> dict[str, float]:
    return {
        name: float(f"{of(values):.4g}")
        for name, of in (("median", statistics.median), ("least", min), ("most", max))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sides", nargs="*", help=f"LOADER:WORKERS; by default {' '.join(SIDES)}")
    parser.add_argument("--seconds", type=float, default=5, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write a JSON file as well")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        consume(args.one, existing(args.corpus), args.seconds)
        return
    sides = args.sides or SIDES
    if wrong := [s for s in sides if s.split(":")[0] not in LOADERS or not s[-1].isdigit()]:
        parser.error(f"{wrong[0]}: LOADER:WORKERS, with one of {', '.join(LOADERS)}")
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        results = compare(sides, Path(folder), args.seconds, args.rounds)
    print(json.dumps(results, indent=1))
    if args.out:
        command = " ".join(["python -m deltaserve.bench.pipeline_peers", *args.sides])
        command += f" --seconds {args.seconds:g} --rounds {args.rounds}"
        versions = {name: importlib.metadata.version(name) for name in VERSIONS}
        record(args.out, command, {"versions": versions, "sides": results})


if __name__ == "__main__":
    main()
