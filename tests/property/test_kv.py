"""The block pool under any sequence of uses, and prefixes that are shared and only those."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from deltaserve.engine.kv import BlockPool, Key, next_key, root_key

NUM_BLOCKS = 8


class PoolMachine(RuleBasedStateMachine):
    """Chains are taken, published, shared and given back in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, block_size=2)
        self.chains: list[list[int]] = []
        self.content: dict[int, Key] = {}

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=4), owner=st.sampled_from("ab"))
    def begin(self, tokens: list[int], owner: str) -> None:
        """Admit a chain of one-token blocks, as the scheduler does."""
        keys, parent = [], root_key(owner, "")
        for token in tokens:
            parent = next_key(parent, [token])
            keys.append(parent)
        known = self.pool.find(keys)
        for block, key in zip(known, keys, strict=False):
            assert self.content[block] == key
        missing = len(keys) - len(known)
        if missing + self.pool.num_idle(known) > self.pool.num_free:
            return
        self.pool.share(known)
        new = self.pool.allocate(missing)
        assert not {*known} & {*new}
        for block, key in zip(new, keys[len(known) :], strict=True):
            self.content[block] = key
            self.pool.publish(block, key)
        self.chains.append(known + new)

    @rule(which=st.integers(0, 20))
    def end(self, which: int) -> None:
        if self.chains:
            self.pool.free(self.chains.pop(which % len(self.chains)))

    @invariant()
    def adds_up(self) -> None:
        self.pool.check([block for chain in self.chains for block in chain])
        assert self.pool.num_used + self.pool.num_free == NUM_BLOCKS


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(
    st.text(max_size=5), st.text(max_size=5), st.text(max_size=5), st.text(max_size=5),
    st.lists(st.integers(0, 300_000), min_size=1, max_size=4),
)  # fmt: skip
def test_keys_meet_only_where_everything_is_equal(
    digest: str, salt: str, other_digest: str, other_salt: str, tokens: list[int]
) -> None:
    # A digest is hexadecimal and never holds the separator.
    digest, other_digest = digest.replace("\0", ""), other_digest.replace("\0", "")
    one, other = root_key(digest, salt), root_key(other_digest, other_salt)
    assert (one == other) == ((digest, salt) == (other_digest, other_salt))
    assert next_key(one, tokens) != next_key(one, [*tokens, 0])
    assert (next_key(one, tokens) == next_key(other, tokens)) == (one == other)


def test_the_longest_unused_content_goes_first() -> None:
    pool = BlockPool(3, block_size=1)
    old, new = pool.allocate(1), pool.allocate(1)
    pool.publish(old[0], b"old")
    pool.publish(new[0], b"new")
    pool.free(old)
    pool.free(new)
    pool.allocate(2)  # the never used one, then the old one
    assert pool.find([b"old"]) == []
    assert pool.find([b"new"]) == new
