"""A service without Ray: the real dispatcher, workers and consumers, joined by plain calls that
can be cut. And a small program to run on it."""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

from deltaserve.errors import ServiceError
from deltaserve.pipeline.service.dispatcher import Dispatcher
from deltaserve.pipeline.service.link import WorkerLost
from deltaserve.pipeline.service.worker import Worker


class Pairs:
    """Elements: a batch of ``n`` rows; each row that number % 7 == 3 leaves out."""

    def __init__(self, feed, n):
        self.feed, self.n = feed, n

    def __iter__(self):
        return self

    def __next__(self):
        rows = list(itertools.islice(self.feed, self.n))
        if not rows:
            raise StopIteration
        return rows

    def get_state(self):
        return self.feed.get_state()

    def set_state(self, state):
        self.feed.set_state(state)


class Numbers:
    """Positions become rows (position, hash); every seventh is filtered, every fifth doubled."""

    batch = 1

    def __init__(self, length, n=4, cost_s=0.0):
        self.length, self.n, self.cost_s = length, n, cost_s
        self.stream = f"numbers-{length}-{n}"

    def head(self):
        def rows(start, stop):
            out = []
            for at in range(start, stop):
                if at % 7 == 3:
                    continue
                digest = hashlib.sha256(str(at).encode()).hexdigest()[:6]
                out += [(at, digest)] * (2 if at % 5 == 0 else 1)
            if self.cost_s:
                time.sleep(self.cost_s * (stop - start))
            return out

        return rows

    def elements(self, feed):
        return Pairs(feed, self.n)

    def rows(self, feed):
        return Pairs(feed, 1)

    def collate(self, rows):
        return rows

    def lengths(self, row):
        return [1 + row[0][0] % 50]

    def direct(self):
        """The whole stream, without a service."""
        rows = self.head()(0, self.length)
        return [rows[at : at + self.n] for at in range(0, len(rows), self.n)]


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
        worker = Worker(name, self.link(node), lambda program: program, self.limit / 4)
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

    def share(self, program):
        return program
