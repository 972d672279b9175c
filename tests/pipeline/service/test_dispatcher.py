"""The dispatcher against a model: whatever is asked, repeated, killed or forgotten."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deltaserve.errors import ServiceError
from deltaserve.pipeline.service.dispatcher import PROMISE, Dispatcher
from deltaserve.pipeline.service.ledger import JobSpec

LISTS, SPLIT, CONSUMERS = 100, 3, 3
SPEC = JobSpec("job", "stream", "dynamic", consumers=CONSUMERS, length=LISTS, split=SPLIT)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Machine(RuleBasedStateMachine):
    """Consumers read, save and return; workers come and go; the dispatcher dies and restarts."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.clock = Clock()
        self.dispatcher = None
        self.granted = [[] for _ in range(CONSUMERS)]
        self.at = [0] * CONSUMERS
        self.saved = [0] * CONSUMERS
        self.beaten = {}
        self.start()
        self.dispatcher.register(SPEC)

    def start(self):
        self.dispatcher = Dispatcher(Path(self.folder.name), heartbeat_limit_s=5, clock=self.clock)

    @rule(consumer=st.integers(0, CONSUMERS - 1), count=st.integers(1, 4))
    def read(self, consumer, count):
        first = self.at[consumer]
        ranges = self.dispatcher.grant("job", consumer, first, count)
        known = self.granted[consumer]
        # What was granted once is granted for ever.
        assert ranges[: len(known) - first] == known[first : first + count]
        known += ranges[max(0, len(known) - first) :]
        self.at[consumer] = first + len(ranges)
        if len(ranges) < count:
            assert sum(map(len, self.granted)) == -(-LISTS // SPLIT)

    @rule(consumer=st.integers(0, CONSUMERS - 1))
    def save(self, consumer):
        self.saved[consumer] = self.at[consumer]

    @rule(consumer=st.integers(0, CONSUMERS - 1))
    def come_back(self, consumer):
        self.at[consumer] = self.saved[consumer]

    @rule()
    def restart(self):
        self.dispatcher.close()
        self.start()
        self.beaten = {}

    @rule(worker=st.sampled_from("abc"), seconds=st.floats(0, 4))
    def beat(self, worker, seconds):
        self.clock.now += seconds
        self.dispatcher.beat(worker, "node", {})
        self.beaten[worker] = self.clock.now

    @precondition(lambda self: any(self.at))
    @rule(consumer=st.integers(0, CONSUMERS - 1), failed=st.booleans())
    def lease(self, consumer, failed):
        number = max(self.at[consumer] - 1, 0)
        first = self.dispatcher.lease("job", consumer, number, 0)
        alive = {w for w, at in self.beaten.items() if self.clock.now - at <= 5}
        assert first.worker in alive | {""}
        assert self.dispatcher.lease("job", consumer, number, 0) == first
        if failed and first.worker:
            second = self.dispatcher.lease("job", consumer, number, 0, first.epoch)
            assert second.worker != first.worker
            assert second.worker == "" or second.epoch > first.epoch

    @invariant()
    def ranges_do_not_overlap(self):
        ranges = sorted(r for grants in self.granted for r in grants)
        assert [start for start, _ in ranges] == [at * SPLIT for at in range(len(ranges))]

    def teardown(self):
        self.dispatcher.close()
        self.folder.cleanup()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def dispatcher(tmp_path, clock):
    dispatcher = Dispatcher(tmp_path, heartbeat_limit_s=5, clock=clock)
    yield dispatcher
    dispatcher.close()


def test_ordered_ranges_need_no_journal(dispatcher):
    dispatcher.register(JobSpec("o", "s", "ordered", consumers=2, length=7, split=2))
    before = dispatcher.stats()["journal_bytes"]
    assert dispatcher.grant("o", 0, 0, 9) == [(0, 2), (4, 6)]
    assert dispatcher.grant("o", 1, 0, 9) == [(2, 4), (6, 7)]
    assert dispatcher.stats()["journal_bytes"] == before


def test_wrong_commands_are_told(dispatcher):
    dispatcher.register(SPEC)
    with pytest.raises(ServiceError, match="knows no job 'other'"):
        dispatcher.grant("other", 0, 0, 1)
    with pytest.raises(ServiceError, match="has consumers 0 to 2, not 3"):
        dispatcher.grant("job", 3, 0, 1)
    with pytest.raises(ServiceError, match="returns at grant 5, but was given only 0"):
        dispatcher.grant("job", 0, 5, 1)
    with pytest.raises(ServiceError, match="split is 3, not 4"):
        dispatcher.register(JobSpec(**{**SPEC.__dict__, "split": 4}))


def test_leases_go_to_the_consumers_own_host_first_and_expire(dispatcher, clock):
    dispatcher.register(SPEC)
    dispatcher.grant("job", 0, 0, 6)
    dispatcher.beat("far", "there", {})
    dispatcher.beat("near", "here", {})
    given = [dispatcher.lease("job", 0, n, 0, node="here").worker for n in range(4)]
    assert given == ["near", "near", "far", "far"]
    clock.now = 4
    dispatcher.beat("far", "there", {})
    clock.now = 6  # near was silent for too long
    assert dispatcher.lease("job", 0, 0, 0, node="here").worker == "far"


def test_a_new_worker_gets_rounds_only_beyond_what_was_promised(dispatcher):
    dispatcher.register(JobSpec("r", "s", "rounds", consumers=2, length=9, producers=2))
    dispatcher.beat("old", "n", {})
    promised = [dispatcher.locate("r", producer, 0).until for producer in range(2)]
    dispatcher.beat("new", "n", {})
    assert dispatcher.locate("r", 0, promised[0] - 1).worker == "old"
    moved = dispatcher.locate("r", 0, promised[0])
    assert moved.worker == "new"
    # The other consumer still has the promise, and changes at the same round.
    late = dispatcher.locate("r", 0, promised[0] - 3)
    assert (late.worker, late.until) == ("old", promised[0])
    assert dispatcher.locate("r", 1, promised[1]).worker == "old"
    assert dispatcher.locate("r", 1, promised[1]).until == promised[1] + PROMISE


def test_a_host_that_failed_is_replaced_for_all(dispatcher):
    dispatcher.register(JobSpec("l", "s", "lockstep", consumers=2, length=9))
    dispatcher.beat("a", "n", {})
    first = dispatcher.locate("l", 0, 10)
    dispatcher.beat("b", "n", {})
    second = dispatcher.locate("l", 0, 10, first.epoch)
    assert second.worker == "b"
    assert dispatcher.locate("l", 0, 3, first.epoch) == dispatcher.locate("l", 0, 3)


def test_marks_that_everybody_passed_are_forgotten(dispatcher):
    dispatcher.register(JobSpec("l", "s", "lockstep", consumers=2, length=9))
    for index in (10, 20, 30):
        dispatcher.mark("l", 0, index, {"at": index})
    dispatcher.ack("l", 0, 25)
    assert [at for at, _ in dispatcher.marks("l", 0)] == [10, 20, 30]
    dispatcher.ack("l", 1, 29)
    assert [at for at, _ in dispatcher.marks("l", 0)] == [20, 30]
    for index in range(100, 1000):
        dispatcher.mark("l", 0, index, {})
    assert len(dispatcher.marks("l", 0)) <= 65


def test_workers_follow_the_demand_and_go_to_zero(dispatcher, clock):
    dispatcher.register(SPEC)
    assert dispatcher.wanted_workers() == 0
    dispatcher.report("job", 0, 100.0, 20.0, "here")
    assert dispatcher.wanted_workers() == 1  # to find out how fast one is
    assert dispatcher.wanting_nodes() == ["here"]
    dispatcher.beat("a", "here", {"job": 25.0})
    assert dispatcher.wanted_workers() == 4  # (100 - 20) / 25, rounded up
    for name in "abcd":
        dispatcher.beat(name, "here", {"job": 25.0})
    assert dispatcher.wanted_workers() == 4
    dispatcher.report("job", 0, 100.0, 100.0, "here")  # its own host does it all
    assert [dispatcher.wanted_workers() for _ in range(3)] == [4, 4, 0]
    dispatcher.report("job", 0, 100.0, 20.0, "here")
    dispatcher.withdraw("job", 0)
    assert [dispatcher.wanted_workers() for _ in range(3)][-1] == 0
    # A consumer that died says nothing, and wants nothing.
    dispatcher.report("job", 0, 100.0, 20.0, "here")
    clock.now = 5.5
    for name in "abcd":
        dispatcher.beat(name, "here", {})
    assert [dispatcher.wanted_workers() for _ in range(3)][-1] == 0


def test_a_long_history_is_compacted_and_means_the_same(tmp_path):
    dispatcher = Dispatcher(tmp_path)
    dispatcher.register(SPEC)
    dispatcher.grant("job", 1, 0, 4)
    dispatcher.register(JobSpec("l", "s", "lockstep", consumers=1, length=9))
    for index in range(200):
        dispatcher.ack("l", 0, index)
    size = dispatcher.stats()["journal_bytes"]
    dispatcher._journal.compact(dispatcher._ledger.records())
    assert dispatcher.stats()["journal_bytes"] < size / 4
    before = dispatcher._ledger.records()
    dispatcher.close()
    again = Dispatcher(tmp_path)
    after = again._ledger.records()
    assert after[0]["jobs"] == before[0]["jobs"]
    assert after[0]["incarnation"] == before[0]["incarnation"] + 1
    again.close()
