"""Consumers, workers and dispatcher together: what arrives, and what killing them changes."""

from __future__ import annotations

import json
import random
import threading
import time

import pytest

from deltaserve.errors import ServiceError
from deltaserve.pipeline.service.stream import JobOptions, ServiceStream
from tests.pipeline.service.fake import Cluster, Numbers


@pytest.fixture
def cluster(tmp_path):
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


def open_(cluster, program, **options):
    options = {"name": "job", "split": 8, "depth": 6, "local": 0} | options
    return ServiceStream(cluster.link(), program, JobOptions(**options))


@pytest.mark.parametrize(("workers", "local"), [(1, 0), (3, 0), (0, 2), (2, 1)])
def test_one_ordered_consumer_gets_the_stream_of_no_service(cluster, workers, local):
    program = Numbers(300)
    for _ in range(workers):
        cluster.add()
    with open_(cluster, program, local=local) as stream:
        assert list(stream) == program.direct()
        assert list(stream) == []


def test_ordered_consumers_share_the_source(cluster):
    program = Numbers(203)
    cluster.add()
    seen = []
    for consumer in range(3):
        with open_(cluster, program, consumer=consumer, consumers=3) as stream:
            seen += [row for batch in stream for row in batch]
    assert sorted(seen) == sorted(row for batch in program.direct() for row in batch)


@pytest.mark.parametrize("mode", ["ordered", "dynamic"])
def test_killed_workers_and_dispatchers_and_consumers_lose_and_repeat_nothing(cluster, mode):
    program = Numbers(1200, cost_s=0.0015)
    for _ in range(3):
        cluster.add()
    seen, saved, done = [], None, threading.Event()
    rng = random.Random(1)

    def killer():
        while not done.wait(0.08):
            what = rng.random()
            if what < 0.6:
                cluster.kill(rng.choice([n for n in cluster.workers if n not in cluster.dead]))
                cluster.add()
            else:
                cluster.stop_dispatcher()
                time.sleep(0.05)
                cluster.start_dispatcher()

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        returns = 0
        while True:
            with open_(cluster, program, mode=mode) as stream:
                if saved is not None:
                    stream.set_state(json.loads(json.dumps(saved[0])))
                    seen = seen[: saved[1]]  # the trainer restores its own checkpoint
                ended = True
                for batch in stream:
                    seen += batch
                    if rng.random() < 0.1:
                        saved = (stream.get_state(), len(seen))
                    if returns < 4 and rng.random() < 0.02:
                        returns += 1
                        ended = False
                        break
                if ended:
                    break
    finally:
        done.set()
        thread.join()
    assert seen == [row for batch in program.direct() for row in batch]
    assert len(cluster.dead) > 0


def test_dynamic_consumers_together_read_everything_once(cluster):
    program = Numbers(500, cost_s=0.0005)
    for _ in range(2):
        cluster.add()
    seen = [[] for _ in range(3)]

    def consume(consumer):
        with open_(
            cluster, program, mode="dynamic", consumers=3, consumer=consumer, depth=2
        ) as stream:
            for batch in stream:
                seen[consumer] += batch
                time.sleep(0.001 * consumer)  # not equally fast

    threads = [threading.Thread(target=consume, args=(c,)) for c in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = [row for rows in seen for row in rows]
    assert sorted(together) == sorted(row for batch in program.direct() for row in batch)
    assert len(seen[0]) > len(seen[2])


def test_relaxed_loses_only_what_was_in_flight_and_repeats_nothing(cluster):
    program = Numbers(400, n=1, cost_s=0.0005)
    first = cluster.add()
    with open_(cluster, program, mode="dynamic", relaxed=True, depth=3) as stream:
        seen = [next(stream)[0] for _ in range(100)]
        cluster.kill(first)
        cluster.add()
        seen += [batch[0] for batch in stream]
        lost = stream.lost_positions
    assert 0 < lost <= 3 * 8
    whole = [row for batch in program.direct() for row in batch]
    missing = {at for at, _ in whole} - {at for at, _ in seen}
    assert len(missing) <= lost
    assert [row for row in whole if row[0] not in missing] == seen
    # A consumer that comes back reads on: nothing is left.
    with open_(cluster, program, mode="dynamic", relaxed=True) as stream:
        assert list(stream) == []


def test_a_dead_dispatcher_is_told_after_the_patience(tmp_path):
    cluster = Cluster(tmp_path, patience=0.3)
    cluster.add()
    with open_(cluster, Numbers(10_000)) as stream:
        next(stream)
        cluster.stop_dispatcher()
        began = time.monotonic()
        with pytest.raises(ServiceError, match="dispatcher does not answer"):
            list(stream)
        assert time.monotonic() - began < 2
    cluster.close()


def test_no_worker_is_told_after_the_patience(tmp_path):
    cluster = Cluster(tmp_path, patience=0.3)
    with (
        open_(cluster, Numbers(100)) as stream,
        pytest.raises(ServiceError, match=r"no worker for 0\.3 s"),
    ):
        next(stream)
    cluster.close()


def test_a_range_that_kills_its_workers_is_named(cluster):
    class Deadly(Numbers):
        def head(self):
            rows = super().head()

            def deadly(start, stop):
                if start == 16:
                    for name in cluster.dispatcher.workers():
                        cluster.kill(name)
                    cluster.add()
                return rows(start, stop)

            return deadly

    cluster.add()
    with (
        open_(cluster, Deadly(100), depth=1) as stream,
        pytest.raises(ServiceError, match="positions 16 to 23"),
    ):
        list(stream)


def test_a_state_of_another_job_is_refused(cluster):
    cluster.add()
    with open_(cluster, Numbers(100)) as stream:
        next(stream)
        state = stream.get_state()
    with open_(cluster, Numbers(100), name="other") as stream:
        with pytest.raises(ServiceError, match="job 'job', this job 'other'"):
            stream.set_state(state)
    with pytest.raises(ServiceError, match="exists and differs: stream"):
        open_(cluster, Numbers(101))
    with pytest.raises(ServiceError, match="mode is one of"):
        open_(cluster, Numbers(101), mode="fast")


# ---- shared streams


def test_lockstep_consumers_get_the_same_stream_once_made(cluster):
    program = Numbers(400, cost_s=0.0002)
    cluster.add()
    seen = _together(cluster, program, 4, mode="lockstep")
    assert all(rows == program.direct() for rows in seen)
    made = sum(s.made for w in cluster.workers.values() for _, s in w._streams.values())
    assert made == len(program.direct())


def test_lockstep_survives_its_host_and_its_dispatcher_and_a_return(cluster):
    program = Numbers(1500, cost_s=0.0003)
    cluster.add()

    def trouble():
        time.sleep(0.2)
        host = next(n for n, w in cluster.workers.items() if w._streams)
        cluster.add()
        cluster.kill(host)
        time.sleep(0.2)
        cluster.stop_dispatcher()
        time.sleep(0.1)
        cluster.start_dispatcher()

    thread = threading.Thread(target=trouble)
    thread.start()
    seen = _together(cluster, program, 3, mode="lockstep", returning=1)
    thread.join()
    assert all(rows == program.direct() for rows in seen)


def test_a_slow_window_consumer_skips_and_holds_up_nobody(cluster):
    from deltaserve.pipeline.service.program import HostedOptions

    program = Numbers(1000, n=1, cost_s=0.0002)
    cluster.add()
    options = {"mode": "window", "consumers": 2, "hosted": HostedOptions(elements=20)}
    with (
        open_(cluster, program, **options) as slow,
        open_(cluster, program, consumer=1, **options) as fast,
    ):
        first = [next(slow) for _ in range(3)]
        assert list(fast) == program.direct()
        rest = list(slow)
        whole = program.direct()
        assert first == whole[:3]
        assert slow.skipped > 0
        assert len(first) + len(rest) + slow.skipped == len(whole)
        assert rest[-1] == whole[-1]
        assert fast.skipped == 0


def test_a_lockstep_peer_that_stays_away_is_named(tmp_path):
    cluster = Cluster(tmp_path)
    cluster.add()
    options = {"mode": "lockstep", "consumers": 2, "peers_limit_s": 0.5}
    with (
        open_(cluster, Numbers(2000), **options) as stream,
        pytest.raises(ServiceError, match="waits for consumer 1"),
    ):
        list(stream)
    cluster.close()


def _together(cluster, program, consumers, returning=None, **options):
    """What each consumer sees; one of them crashes once and returns with a checkpoint."""
    seen = [[] for _ in range(consumers)]
    failed = []

    def consume(consumer):
        try:
            saved = None
            for turn in range(2 if consumer == returning else 1):
                with open_(
                    cluster, program, consumers=consumers, consumer=consumer, **options
                ) as stream:
                    if saved:
                        stream.set_state(saved[0])
                        del seen[consumer][saved[1] :]
                    for element in stream:
                        seen[consumer].append(element)
                        if consumer == returning and turn == 0:
                            if len(seen[consumer]) == 40:
                                saved = (stream.get_state(), 40)
                            if len(seen[consumer]) == 70:
                                break
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=consume, args=(c,)) for c in range(consumers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return seen


# ---- rounds


def test_rounds_are_of_near_equal_cost_and_all_rows_arrive(cluster):
    program = Numbers(1000)
    cluster.add()
    seen = _together(cluster, program, 4, mode="rounds", producers=2)
    assert len({len(rows) for rows in seen}) == 1
    for batches in zip(*seen, strict=True):
        costs = [program.lengths(batch[0])[0] for batch in batches]
        assert max(costs) <= 2 * min(costs) + 2
    got = sorted(row for rows in seen for batch in rows for (row,) in batch)
    whole = sorted(row for batch in program.direct() for row in batch)
    # At most three rows of each producer's end are too few for a round.
    assert 0 <= len(whole) - len(got) <= 6
    assert set(got) <= set(whole)


def test_a_worker_joins_rounds_at_one_round_for_all(cluster):
    program = Numbers(4000, cost_s=0.0002)
    cluster.add()
    timer = threading.Timer(0.3, cluster.add)
    timer.start()
    seen = _together(cluster, program, 3, mode="rounds", producers=2)
    timer.join()
    hosts = cluster.dispatcher.stats()["jobs"]["job"]["hosts"]
    assert {each[-1][1] for each in hosts} == {"worker-0", "worker-1"}
    alone = Cluster(cluster.folder / "alone")
    alone.add()
    assert _together(alone, program, 3, mode="rounds", producers=2) == seen
    alone.close()
