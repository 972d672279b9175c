"""A service without Ray: the real dispatcher, workers and consumers, joined by plain calls that
can be cut. And a small program to run on it."""

from __future__ import annotations

import pickle
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import cloudpickle
import numpy as np

from deltaserve.errors import ServiceError
from deltaserve.pipeline import Plan, open_pipeline
from deltaserve.pipeline.service.dispatcher import Dispatcher
from deltaserve.pipeline.service.link import WorkerLost
from deltaserve.pipeline.service.worker import Worker


def seventh(row):
    return row["n"] % 7 != 3


def doubled(row):
    return [row] * (2 if row["n"] % 5 == 0 else 1)


class Slow:
    """A map that takes its time, and gives a row tokens."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __call__(self, row):
        if self.seconds:
            time.sleep(self.seconds)
        return {**row, "input_ids": np.arange(1 + row["n"] * 37 % 50, dtype=np.int32)}


def numbers(folder, count, n=4, cost_s=0.0):
    """A plan over a file of ``count`` rows: some filtered, some doubled, batches of ``n``."""
    file = folder / f"numbers-{count}.jsonl"
    if not file.exists():
        file.write_text("".join(f'{{"n": {at}}}\n' for at in range(count)))
    plan = Plan.from_jsonl(file).filter(seventh).flat_map(doubled).map(Slow(cost_s))
    return plan.shuffle(7).batch(n, pad=0)


def direct(plan):
    """What the plan gives without a service."""
    with open_pipeline(plan) as pipeline:
        return [flat(element) for element in pipeline]


def flat(element):
    return [int(n) for n in element["n"]]


class Cluster:
    def __init__(self, folder, *, limit=0.6, patience=3.0):
        self.folder, self.limit, self.patience = folder, limit, patience
        self.dispatcher = Dispatcher(folder, heartbeat_limit_s=limit)
        self.lock = threading.Lock()
        self.workers = {}
        self.dead = set()
        self.threads = ThreadPoolExecutor(64)
        self.count = 0

    def link(self, node="here"):
        return FakeLink(self, node)

    def add(self, node="here"):
        name = f"worker-{self.count}"
        self.count += 1
        worker = Worker(name, self.link(node), self.limit / 4)
        self.workers[name] = worker
        # Alive at once, and then as real ones.
        self.link(node).ask("beat", name, node, {})
        threading.Thread(target=worker.beat_until_stopped, daemon=True).start()
        return name

    def kill(self, name):
        """As kill -9: what it is asked is not answered, nothing is said."""
        self.dead.add(name)
        self.workers[name]._stopped.set()

    def stop_dispatcher(self):
        with self.lock:
            self.dispatcher.close()
            self.dispatcher = None

    def start_dispatcher(self):
        with self.lock:
            self.dispatcher = Dispatcher(self.folder, heartbeat_limit_s=self.limit)

    def close(self):
        for worker in self.workers.values():
            worker.stop()
        if self.dispatcher is not None:
            self.dispatcher.close()
        self.threads.shutdown(wait=False, cancel_futures=True)


class FakeLink:
    def __init__(self, cluster, node):
        self.cluster, self.node = cluster, node
        self.patience_s = cluster.patience

    def ask(self, command, *args, patience_s=None):
        limit = time.monotonic() + (self.patience_s if patience_s is None else patience_s)
        while True:
            with self.cluster.lock:
                if self.cluster.dispatcher is not None:
                    return getattr(self.cluster.dispatcher, command)(*args)
            if time.monotonic() >= limit:
                raise ServiceError("the dispatcher does not answer")
            time.sleep(0.02)

    def call(self, worker, method, *args):
        result = Future()

        def run():
            try:
                if worker in self.cluster.dead:
                    raise WorkerLost(worker)
                found = getattr(self.cluster.workers[worker], method)(*args)
                if worker in self.cluster.dead:
                    raise WorkerLost(worker)
                result.set_result(found)
            except BaseException as error:
                result.set_exception(error)

        self.cluster.threads.submit(run)
        return result

    def share(self, value):
        return cloudpickle.dumps(value)

    def open(self, shared):
        return pickle.loads(shared)
