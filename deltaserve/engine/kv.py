"""The pool of KV blocks: which are free, which belong to whom."""

from __future__ import annotations

from collections import deque


class BlockPool:
    """Hands out block numbers 0 .. num_blocks - 1; O(1) per block, knows nothing of devices."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free: deque[int] = deque(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """``count`` free blocks; the caller has checked that there are as many."""
        assert count <= len(self._free), "allocated more blocks than are free"
        return [self._free.popleft() for _ in range(count)]

    def free(self, blocks: list[int]) -> None:
        self._free.extend(blocks)
        assert len(self._free) <= self.num_blocks, "a block was freed twice"
