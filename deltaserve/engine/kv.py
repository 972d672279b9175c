"""The pool of KV blocks: which are free, which are shared, and what the idle ones still hold.

A block that is full is known by a key: a hash of its tokens, of the key of the block before
it and, at the start of the chain, of the delta's digest and the tenant's salt. Equal keys mean
equal keys and values, so a later request may use the block instead of computing it again; two
fine-tunes, two versions of one, or two tenants can never have a key in common.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile

Key = bytes


def root_key(digest: str, salt: str, tenant: str = "") -> Key:
    """Start of the chain: what was computed by one delta for one tenant."""
    return hashlib.sha256(json.dumps([digest, salt, tenant]).encode()).digest()


def next_key(parent: Key, tokens: Sequence[int]) -> Key:
    """Key of a full block behind ``parent``."""
    return hashlib.sha256(parent + b"".join(t.to_bytes(4, "little") for t in tokens)).digest()


class BlockPool:
    """Hands out block numbers 0 .. num_blocks - 1; O(1) per block, knows nothing of devices.

    Free blocks wait in the order in which they were freed, and keep their content until they
    are handed out for something else.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._users = [0] * num_blocks
        self._key_of: dict[int, Key] = {}
        self._block_of: dict[Key, int] = {}

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
        """``count`` free blocks, longest unused first; the caller has checked their number."""
        assert count <= len(self._free), "allocated more blocks than are free"
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._users[block] = 1
            self._forget(block)
        return blocks

    def find(self, keys: Sequence[Key]) -> list[int]:
        """The blocks that hold the longest known beginning of a chain."""
        return [self._block_of[key] for key in takewhile(self._block_of.__contains__, keys)]

    def num_idle(self, blocks: Sequence[int]) -> int:
        """How many of these are free: using them takes them from the free ones."""
        return sum(self._users[block] == 0 for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Use known blocks, beside whoever uses them already."""
        for block in blocks:
            self._users[block] += 1
            self._free.pop(block, None)

    def publish(self, block: int, key: Key) -> None:
        """Make a block that was just filled known. The first one with a key stays its holder."""
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def free(self, blocks: Sequence[int]) -> None:
        """End one use of each. The end of a chain is reused first: its beginning serves more."""
        for block in reversed(blocks):
            self._users[block] -= 1
            assert self._users[block] >= 0, "a block was freed twice"
            if self._users[block] == 0:
                self._free[block] = None

    def check(self, held: Sequence[int]) -> None:
        """Every use is one of ``held``, and nothing else is in use. AssertionError otherwise."""
        counts = [0] * self.num_blocks
        for block in held:
            counts[block] += 1
        assert counts == self._users, "block uses do not add up"
        assert len(self._free) == counts.count(0), "a free block is missing or used"
        assert not any(map(counts.__getitem__, self._free)), "a used block is called free"
        holders = list(map(self._block_of.get, self._key_of.values()))
        assert holders == list(self._key_of), "keys and blocks do not belong together"
        assert len(self._block_of) == len(self._key_of), "keys and blocks do not pair"

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
