"""The only module that imports Grain: segments become its datasets, and its workers run them.

From Grain come the order of rows (shuffles, repeats, slices, mixes of row numbers without any
buffer), the pools of threads and processes with results in order, and prefetching with state.
Positions are counted here, in lists of ``CHUNK`` positions, and not by Grain: its own states
depend on the number of workers.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import logging
import sys
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from deltaserve.errors import PipelineError
from deltaserve.pipeline.mixing import ENDLESS, Phases, Turns
from deltaserve.pipeline.node import Node
from deltaserve.pipeline.operators import ELEMENT, OPERATORS, SOURCE
from deltaserve.pipeline.rows import Row
from deltaserve.pipeline.segments import CHUNK, Done, Work, leaves_of
from deltaserve.pipeline.sources import extra
from deltaserve.pipeline.workers import DIED, begin_worker, close_workers, notice_deaths

# absl reports through logging that optional parts (jax) are missing.
logging.getLogger("absl").setLevel(logging.ERROR)
grain = extra("grain")
experimental = extra("grain.experimental")
cloudpickle = extra("cloudpickle")  # what Grain sends datasets with
logger = logging.getLogger(__name__)
MapDataset: Any = grain.MapDataset

# Deaths of worker processes in a row, without a result between, that are mended.
DEATHS = 3
# Rows whose order is drawn as a whole, and kept, rather than number by number.
DRAWN = 1 << 16


class Executor(Protocol):
    """Who computes a segment's lists of rows."""

    def open(self, segment: Segment, first: int) -> Iterator[Done]:
        """The results for lists ``first``, ``first + 1``, ... in this order, to the end."""

    def close(self) -> None:
        """Stop workers."""


class Segment:
    """A segment with its order of rows.

    number: among the segments of its plan. epoch: the pass over the data that it begins with.
    ``lists``: how many lists of ``CHUNK`` positions there are (the last one may be shorter).
    """

    def __init__(self, work: Work, number: int = 0, epoch: int = 0) -> None:
        self.work, self.number, self.epoch = work, number, epoch
        sizes = [len(source) for source in work.sources()]
        order = _order(work.root, iter(enumerate(sizes, work.first_leaf)))
        # Positions of one pass over everything, for endless orders too.
        self.pass_length = sum(sizes)
        self.length = len(order)
        self._keys = _From(order, epoch) if epoch else order
        self.lists = -(-self.length // CHUNK)

    def run(self, number: int) -> Done:
        """List ``number``, computed here."""
        start = number * CHUNK
        stop = min(start + CHUNK, self.length)
        return self.work([self._keys[position] for position in range(start, stop)])

    def dataset(self, first: int) -> Any:
        """Grain's dataset of results from list ``first`` on."""
        lists = self._keys.batch(CHUNK, batch_fn=list)
        return (lists[first:] if first else lists).map(self.work)


class LocalExecutor:
    """Threads of this process, or processes (each with one thread of its own).

    threads, processes: how many; with neither, rows are computed as they are asked for.
    buffer: lists that each worker holds ready.
    """

    def __init__(self, threads: int = 0, processes: int = 0, buffer: int = 2) -> None:
        if threads < 0 or processes < 0 or buffer < 1:
            raise PipelineError("threads and processes must be 0 or more, and buffer at least 1")
        self.threads, self.processes, self.buffer = threads, processes, buffer
        self._open: list[Any] = []

    def open(self, segment: Segment, first: int) -> Iterator[Done]:
        deaths = 0
        while first < segment.lists:
            iterator = self._iterate(segment, first)
            try:
                for done in iterator:
                    first, deaths = first + 1, 0
                    notice_deaths(iterator)
                    yield done
                return
            except (RuntimeError, EOFError, OSError) as cause:
                deaths += 1
                died = isinstance(cause, EOFError) or any(each in str(cause) for each in DIED)
                if not died:
                    raise
                if deaths > DEATHS:
                    raise PipelineError(
                        f"worker processes died {deaths} times before list {first} of rows came: "
                        "what they printed says why; if nothing, look at the memory, or use "
                        "threads. (A script begins what uses processes under "
                        "if __name__ == '__main__'.)"
                    ) from cause
                logger.warning("a worker process died; going on from list %d with new ones", first)
            finally:
                close_workers(iterator)
                self._open.remove(iterator)

    def close(self) -> None:
        for iterator in self._open:
            close_workers(iterator)

    def resize(self, threads: int) -> None:
        """Another number of threads, from now on, in iterations that use threads."""
        self.threads = threads
        for iterator in self._open:
            if hasattr(iterator, "_set_num_threads"):
                iterator._set_num_threads(threads)
                iterator._set_prefetch_buffer_size(threads * self.buffer)

    def ready(self) -> int:
        """Lists that threads have finished and nobody has taken; of processes it is not known."""
        pools = [each for each in self._open if hasattr(each, "_set_num_threads")]
        return sum(future.done() for pool in pools for future in list(pool._buffer))

    def _iterate(self, segment: Segment, first: int) -> Any:
        threads = 0 if self.processes else self.threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads * self.buffer)
        dataset = segment.dataset(first).to_iter_dataset(options)
        if self.processes:
            _require_sendable(segment.work)
            workers = min(self.processes, segment.lists - first)
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=workers, per_worker_buffer_size=self.buffer
                ),
                worker_init_fn=begin_worker,
            )
        iterator = iter(dataset)
        self._open.append(iterator)
        return iterator


def _require_sendable(work: Work) -> None:
    """Raises PipelineError naming the operator that cannot be sent to another process."""
    for leaf in leaves_of(work.root):
        for node in (leaf.source, *leaf.elements):
            try:
                cloudpickle.dumps(dict(node.params))
            except Exception as cause:  # what is pickled raises what it likes
                raise PipelineError(
                    f"{node.name}: it cannot be sent to worker processes ({cause}): use threads, "
                    "or a function that holds nothing of this process"
                ) from None


def prefetch(stream: Any, n: int) -> Any:
    """A stream whose next ``n`` rows a thread computes ahead; same rows, same states."""
    return _Prefetched(stream, n)


class _Prefetched:
    def __init__(self, stream: Any, n: int) -> None:
        self._stream = stream
        self._ahead = experimental.ThreadPrefetchDatasetIterator(_Bare(stream), n)

    def next(self) -> Row:
        return self._ahead.__next__()

    def get_state(self) -> Any:
        return self._ahead.get_state()

    def set_state(self, state: Any) -> None:
        self._ahead.set_state(copy.deepcopy(state))

    def occupancy(self) -> int:
        """Rows that are ready."""
        return int(self._ahead._buffer.qsize())

    def close(self) -> None:
        self._ahead.close()
        self._stream.close()
        # Grain's finalizer fails when the interpreter ends before it.
        del self._ahead


class _Bare:
    """A stream under the names that Grain's prefetcher calls."""

    def __init__(self, stream: Any) -> None:
        self.__next__ = stream.next
        self.get_state, self.set_state = stream.get_state, stream.set_state


def _order(node: Node, leaves: Iterator[tuple[int, int]]) -> Any:
    """The keys of a segment's rows as one of Grain's datasets with random access."""
    if OPERATORS[node.op].kind == SOURCE:
        return _Keys(*next(leaves))
    below = [_order(each, leaves) for each in node.inputs]
    params = node.params
    if OPERATORS[node.op].kind == ELEMENT:
        return below[0]
    if node.op == "shuffle":
        return _shuffled(below[0], _seed(params["seed"]), params["window"])
    if node.op == "repeat":
        endless = params["epochs"] is None
        _require_end(below, node) if endless else None
        return below[0].repeat(params["epochs"])
    if node.op == "take":
        return below[0][: params["n"]] if params["n"] < len(below[0]) else below[0]
    sizes = [len(each) for each in below]
    if node.op == "mix":
        order: Any = Phases(params["weights"], sizes, params["seed"], params["stop"])
    else:
        order = Turns(sizes, params["block"])
    return _Chosen(below, order)


def _require_end(below: list[Any], node: Node) -> None:
    if any(len(each) >= ENDLESS for each in below):
        raise PipelineError(f"{node.name or node.op}: what is repeated has no end already")


def _seed(seed: object) -> int:
    """Grain adds the epoch to a seed, so that seeds 0 and 1 would be one epoch apart."""
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "little")


def _shuffled(below: Any, seed: int, window: int | None) -> Any:
    if not len(below):
        return below
    size = min(window or len(below), len(below))
    if size <= DRAWN or size < len(below):
        return _WindowShuffle(below, seed, size)
    if size >= 2**32:
        raise PipelineError("a shuffle takes less than 2^32 rows: give it a window")
    return below.shuffle(seed=seed)


@functools.lru_cache(maxsize=32)
def _permutation(seed: int, epoch: int, number: int, size: int) -> np.ndarray:
    words = [seed, epoch, number]
    return np.random.Generator(np.random.PCG64(words)).permutation(size).astype(np.int32)


class _Keys(MapDataset):
    """The keys of a source's rows; passes after the first go on counting."""

    def __init__(self, leaf: int, size: int) -> None:
        super().__init__()
        self._leaf, self._size = leaf, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, row = divmod(int(index), self._size)
        return (self._leaf, epoch, row)


class _From(MapDataset):
    """A later pass over the same rows."""

    def __init__(self, parent: Any, epoch: int) -> None:
        super().__init__(parent)
        self._offset = epoch * len(parent)

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: Any) -> Any:
        return self.slice(index) if isinstance(index, slice) else self._parent[index + self._offset]


class _WindowShuffle(MapDataset):
    """Rows in a new order within each window, the last one too, which may not be full.

    Orders of small windows are drawn whole. Grain's shuffle of single numbers (which large ones
    take) needs a millisecond for each below a hundred, and there keeps neighbours together.
    """

    def __init__(self, parent: Any, seed: int, window: int) -> None:
        super().__init__(parent)
        self._shuffle_seed, self._window = seed, window

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, at = divmod(index, len(self))
        number, within = divmod(at, self._window)
        start = number * self._window
        size = min(self._window, len(self) - start)
        if size <= DRAWN:
            within = int(_permutation(self._shuffle_seed, epoch, number, size)[within])
        else:
            seed = _seed(f"{self._shuffle_seed} {epoch} {number}")
            within = experimental.index_shuffle(within, max_index=size - 1, seed=seed, rounds=4)
        return self._parent[epoch * len(self) + start + within]


class _Chosen(MapDataset):
    """Rows of several parts; ``order[position]`` is (part, row of the part)."""

    def __init__(self, parents: list[Any], order: Any) -> None:
        super().__init__(parents)
        self._of_pass = order

    def __len__(self) -> int:
        return min(len(self._of_pass), sys.maxsize)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, position = divmod(index, len(self))
        part, row = self._of_pass[position]
        parent = self._parents[part]
        return parent[row + epoch * len(parent)]
