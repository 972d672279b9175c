"""Greedy on rows in memory, by a heap of gains that may be out of date.

Gains only fall, so an entry that is out of date is too high: it is corrected when it comes
to the top. That makes the heap exact without a decrease-key operation (Minoux 1978).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaserve.select.compiled import kernel
from deltaserve.select.steps import cost


@kernel
def _sift(keys: NDArray[np.int64], ids: NDArray[np.int64], size: int, at: int) -> None:
    key, v = keys[at], ids[at]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        right = child + 1
        if right < size and (
            keys[right] > keys[child] or (keys[right] == keys[child] and ids[right] < ids[child])
        ):
            child = right
        if keys[child] < key or (keys[child] == key and ids[child] > v):
            break
        keys[at], ids[at] = keys[child], ids[child]
        at = child
    keys[at], ids[at] = key, v


@kernel
def heap_greedy(
    indptr: NDArray[np.int64],
    indices: NDArray[Any],
    weights: NDArray[np.float32],
    beta: float,
    value: NDArray[np.int64],
    ids: NDArray[np.int64],
    limit: int,
    group: NDArray[np.int32],
    room: NDArray[np.int64],
    length: NDArray[np.int64],
    tokens: int,
    divisor: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows taken, in order, and the keys (gains, divided by ``divisor``) they were taken at.

    value [rows]: gains, which fall as neighbours are taken. ids: candidates, lower rows first
    among equal keys. room [groups]: how many more each group may take; with ``tokens``, a row
    that is longer than what is left is passed over.
    """
    size = len(ids)
    heap, keys = ids.copy(), np.empty(size, np.int64)
    for i in range(size):
        v = heap[i]
        keys[i] = value[v] // divisor[v] if len(divisor) else value[v]
    for i in range(size // 2 - 1, -1, -1):
        _sift(keys, heap, size, i)
    taken, at = np.empty(min(limit, size), np.int64), np.empty(min(limit, size), np.int64)
    count = 0
    while size > 0 and count < limit:
        v = heap[0]
        key = value[v] // divisor[v] if len(divisor) else value[v]
        if key != keys[0]:
            keys[0] = key
            _sift(keys, heap, size, 0)
            continue
        size -= 1
        keys[0], heap[0] = keys[size], heap[size]
        _sift(keys, heap, size, 0)
        g = group[v] if len(group) else 0
        if room[g] == 0 or (len(length) and length[v] > tokens):
            continue
        room[g] -= 1
        tokens -= length[v] if len(length) else 0
        taken[count], at[count] = v, key
        count += 1
        for e in range(indptr[v], indptr[v + 1]):
            value[indices[e]] -= cost(weights[e], beta)
    return taken[:count], at[:count]
