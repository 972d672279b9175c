"""Plans and troublemakers of the service's benchmarks."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from deltaserve.pipeline import Plan
from deltaserve.pipeline.service.cluster import NAMESPACE, Service, dispatcher_name


class Sleep:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, row: Any) -> Any:
        time.sleep(self.seconds)
        return row


class Random:
    """Tokens of lognormal lengths (median 200, sigma 1)."""

    def __init__(self, sigma: float, longest: int) -> None:
        self.sigma, self.longest = sigma, longest

    def __call__(self, row: Any, rng: np.random.Generator) -> Any:
        length = int(np.clip(rng.lognormal(np.log(200), self.sigma), 16, self.longest))
        return {"input_ids": np.ones(length, np.int32)}


def numbers(folder: Path, rows: int) -> Plan:
    file = folder / f"numbers-{rows}.jsonl"
    file.write_text("".join(f'{{"n": {at}}}\n' for at in range(rows)))
    return Plan.from_jsonl(file)


def slow_numbers(folder: Path, rows: int, seconds: float = 0.005) -> tuple[Plan, int]:
    """Rows that take so long each; batches of 16."""
    return numbers(folder, rows).map(Sleep(seconds)).shuffle(3).batch(16), rows


def random_lengths(folder: Path, rows: int, sigma: float = 1.0, longest: int = 2048) -> Plan:
    return numbers(folder, rows).map(Random(sigma, longest), random=True, seed=5)


def packed_text(folder: Path, rows: int = 12_000) -> Plan:
    """Made-up text, its own tokenizer, packed in 2048, batches of 4."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("etaoinshrdlu"), rng.integers(2, 9))) for _ in range(3000)]
    texts = [" ".join(rng.choice(words, rng.integers(20, 300))) for _ in range(rows)]
    file = folder / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator(
        texts[:500], trainers.BpeTrainer(vocab_size=2000, show_progress=False)
    )
    home = folder / "tokenizer"
    home.mkdir(exist_ok=True)
    tokenizer.save(str(home / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (home / "tokenizer_config.json").write_text(json.dumps(settings))
    return Plan.from_jsonl(file).shuffle(1).tokenize(home).pack(2048).batch(4)


def processes(service: Service) -> list[int]:
    """Of the service's workers that have called."""
    import ray

    found = []
    for handle, _, seen in list(service._workers.values()):
        if seen:
            try:
                found.append(ray.get(handle.__ray_call__.remote(_pid), timeout=5))
            except ray.exceptions.RayError:
                continue
    return found


def worker_cpu(service: Service) -> float:
    """CPU seconds of the workers so far; waits for the first of them."""
    import psutil

    while not (pids := processes(service)):
        time.sleep(0.1)
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(each.user + each.system for each in times)


def killer(service: Service, done: threading.Event, killed: list[str], seconds: float) -> None:
    """A worker every 5 s; the dispatcher after a third and after two thirds of the time."""
    import ray

    began = time.monotonic()
    while not done.wait(5):
        pids = processes(service)
        if pids:
            os.kill(pids[0], signal.SIGKILL)
            killed.append("worker")
        share = (time.monotonic() - began) / seconds
        if killed.count("dispatcher") < min(2, int(share * 3)):
            actor = ray.get_actor(dispatcher_name(service.name), namespace=NAMESPACE)
            pid: Any = ray.get(actor.__ray_call__.remote(_pid))
            os.kill(pid, signal.SIGKILL)
            killed.append("dispatcher")


def _pid(actor: Any) -> int:
    return os.getpid()
