"""Consumers, workers and dispatcher together: what arrives, and what killing them changes."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter

import numpy as np
import pytest

from deltaserve.errors import PipelineError, ServiceError
from deltaserve.pipeline import Plan, open_pipeline
from deltaserve.pipeline.parallel import Share
from deltaserve.pipeline.service.program import HostedOptions
from deltaserve.pipeline.service.stream import JobOptions, ServiceStream
from tests.pipeline.service.fake import Cluster, direct, flat, numbers


@pytest.fixture
def cluster(tmp_path):
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


VICTIMS = []


def deadly(row):
    if row["n"] == 150:
        for name in VICTIMS[0].dispatcher.workers():
            VICTIMS[0].kill(name)
        VICTIMS[0].add()
    return row


def open_(cluster, plan, **options):
    options = {"name": "job", "depth": 6, "local": 0} | options
    return ServiceStream(cluster.link(), plan, JobOptions(**options), None)


@pytest.mark.parametrize(("workers", "local"), [(1, 0), (3, 0), (0, 2), (2, 1)])
def test_one_ordered_consumer_gets_the_stream_of_no_service(cluster, workers, local):
    plan = numbers(cluster.folder, 700)
    for _ in range(workers):
        cluster.add()
    with open_(cluster, plan, local=local) as stream:
        assert [flat(batch) for batch in stream] == direct(plan)
        assert list(stream) == []


def test_ordered_consumers_share_the_source(cluster):
    plan = numbers(cluster.folder, 803)
    cluster.add()
    seen = []
    for consumer in range(3):
        with open_(cluster, plan, consumer=consumer, consumers=3) as stream:
            seen += [n for batch in stream for n in flat(batch)]
    assert sorted(seen) == sorted(n for batch in direct(plan) for n in batch)


@pytest.mark.parametrize("mode", ["ordered", "dynamic"])
def test_killed_workers_and_dispatchers_and_consumers_lose_and_repeat_nothing(cluster, mode):
    plan = numbers(cluster.folder, 4000, cost_s=0.0002)
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
            with open_(cluster, plan, mode=mode) as stream:
                if saved is None:
                    seen = []
                else:
                    stream.set_state(json.loads(json.dumps(saved[0])))
                    seen = seen[: saved[1]]  # the trainer restores its own checkpoint
                ended = True
                for batch in stream:
                    seen += flat(batch)
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
    assert seen == [n for batch in direct(plan) for n in batch]
    assert len(cluster.dead) > 0


def test_dynamic_consumers_together_read_everything_once(cluster):
    plan = numbers(cluster.folder, 4000, cost_s=0.0002)
    for _ in range(2):
        cluster.add()
    seen = [[] for _ in range(3)]

    def consume(consumer):
        with open_(
            cluster, plan, mode="dynamic", consumers=3, consumer=consumer, depth=2
        ) as stream:
            for batch in stream:
                seen[consumer] += flat(batch)
                time.sleep(0.002 * consumer)  # not equally fast

    threads = [threading.Thread(target=consume, args=(c,)) for c in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = [row for rows in seen for row in rows]
    assert sorted(together) == sorted(n for batch in direct(plan) for n in batch)
    assert len(seen[0]) > len(seen[2])


def test_relaxed_loses_only_what_was_in_flight_and_repeats_nothing(cluster):
    plan = numbers(cluster.folder, 2000, n=1, cost_s=0.0002)
    first = cluster.add()
    with open_(cluster, plan, mode="dynamic", relaxed=True, depth=3) as stream:
        seen = [flat(next(stream))[0] for _ in range(300)]
        cluster.kill(first)
        cluster.add()
        seen += [flat(batch)[0] for batch in stream]
        lost = stream.lost_positions
    assert 0 < lost <= 3 * 64
    whole = [n for batch in direct(plan) for n in batch]
    missing = set(whole) - set(seen)
    assert len(missing) <= lost
    assert [n for n in whole if n not in missing] == seen
    # A consumer that comes back reads on: nothing is left.
    with open_(cluster, plan, mode="dynamic", relaxed=True) as stream:
        assert list(stream) == []


def test_a_dead_dispatcher_is_told_after_the_patience(tmp_path):
    cluster = Cluster(tmp_path, patience=0.3)
    cluster.add()
    with open_(cluster, numbers(tmp_path, 20_000)) as stream:
        next(stream)
        cluster.stop_dispatcher()
        began = time.monotonic()
        with pytest.raises(ServiceError, match="dispatcher does not answer"):
            list(stream)
        assert time.monotonic() - began < 20
    cluster.close()


def test_no_worker_is_told_after_the_patience(tmp_path):
    cluster = Cluster(tmp_path, patience=0.3)
    with (
        open_(cluster, numbers(cluster.folder, 700)) as stream,
        pytest.raises(ServiceError, match=r"no worker for 0\.3 s"),
    ):
        next(stream)
    cluster.close()


def test_a_range_that_kills_its_workers_is_named(cluster):
    VICTIMS.append(cluster)
    cluster.add()
    plan = Plan.from_jsonl(numbers(cluster.folder, 400).nodes()[0].params["paths"]).map(deadly)
    with (
        open_(cluster, plan, depth=1) as stream,
        pytest.raises(ServiceError, match="positions 128 to 191"),
    ):
        list(stream)
    VICTIMS.clear()


def test_a_state_of_another_job_is_refused(cluster):
    cluster.add()
    with open_(cluster, numbers(cluster.folder, 700)) as stream:
        next(stream)
        state = stream.get_state()
    other = open_(cluster, numbers(cluster.folder, 700), consumers=2)
    with (
        other as stream,
        pytest.raises(ServiceError, match=r"consumers 1, this job 2.*only in lockstep"),
    ):
        stream.set_state(state)
    with open_(cluster, numbers(cluster.folder, 701)) as stream:
        with pytest.raises(PipelineError, match="has stream"):
            stream.set_state(state)
        with pytest.raises(ServiceError, match="exists and differs: stream"):
            next(stream)
    with pytest.raises(ServiceError, match="mode is one of"):
        open_(cluster, numbers(cluster.folder, 701), mode="fast")


def test_a_checkpoint_moves_between_the_service_and_this_process(cluster):
    plan = numbers(cluster.folder, 900)
    cluster.add()
    whole = direct(plan)
    with open_(cluster, plan) as stream:
        seen = [flat(next(stream)) for _ in range(50)]
        state = stream.get_state()
    with open_pipeline(plan) as pipeline:
        pipeline.set_state(json.loads(json.dumps(state)))
        seen += [flat(next(pipeline)) for _ in range(50)]
        state = pipeline.get_state()
    with open_(cluster, plan, name="again", local=1) as stream:
        stream.set_state(state)
        assert seen + [flat(batch) for batch in stream] == whole


# ---- shared streams


def test_lockstep_consumers_get_the_same_stream_once_made(cluster):
    plan = numbers(cluster.folder, 1500, cost_s=0.0002)
    cluster.add()
    seen = _together(cluster, plan, 4, mode="lockstep")
    assert all(rows == direct(plan) for rows in seen)
    made = sum(s.made for w in cluster.workers.values() for _, s in w._streams.values())
    assert made == len(direct(plan))


def test_lockstep_survives_its_host_and_its_dispatcher_and_a_return(cluster):
    plan = numbers(cluster.folder, 3000, cost_s=0.0002)
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
    seen = _together(cluster, plan, 3, mode="lockstep", returning=1)
    thread.join()
    assert all(rows == direct(plan) for rows in seen)


def test_lockstep_goes_on_with_another_number_of_consumers(cluster):
    plan = numbers(cluster.folder, 700)
    cluster.add()
    plan = plan.without(["batch"]).repeat().batch(8, pad=0)
    with open_pipeline(plan) as pipeline:
        whole = [flat(next(pipeline)) for _ in range(60)]
    seen, state = [], None
    for consumers, take in ((2, 25), (4, 20), (1, 15)):
        options = {"mode": "lockstep", "consumers": consumers, "name": f"{len(seen)} taken"}
        shares = [
            Share(open_(cluster, plan, consumer=at, **options), plan, at, consumers)
            for at in range(consumers)
        ]
        for share in shares:
            if state is not None:
                share.set_state(json.loads(json.dumps(state)))
        for _ in range(take):
            seen.append([n for share in shares for n in flat(next(share))])
        state = shares[-1].get_state()
        for share in shares:
            share.close()
    assert seen == whole


def test_a_slow_window_consumer_skips_and_holds_up_nobody(cluster):
    plan = numbers(cluster.folder, 1000, n=1, cost_s=0.0002)
    cluster.add()
    options = {"mode": "window", "consumers": 2, "hosted": HostedOptions(elements=20)}
    with (
        open_(cluster, plan, **options) as slow,
        open_(cluster, plan, consumer=1, **options) as fast,
    ):
        first = [flat(next(slow)) for _ in range(3)]
        assert [flat(each) for each in fast] == direct(plan)
        rest = [flat(each) for each in slow]
        whole = direct(plan)
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
        open_(cluster, numbers(tmp_path, 4000), **options) as stream,
        pytest.raises(ServiceError, match="waits for consumer 1"),
    ):
        list(stream)
    cluster.close()


def _together(cluster, plan, consumers, returning=None, **options):
    """What each consumer sees; one of them crashes once and returns with a checkpoint."""
    seen = [[] for _ in range(consumers)]
    failed = []

    def consume(consumer):
        try:
            saved = None
            for turn in range(2 if consumer == returning else 1):
                with open_(
                    cluster, plan, consumers=consumers, consumer=consumer, **options
                ) as stream:
                    if saved:
                        stream.set_state(saved[0])
                        del seen[consumer][saved[1] :]
                    for element in stream:
                        seen[consumer].append(flat(element))
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
    plan = numbers(cluster.folder, 2000, n=2)
    cluster.add()
    seen = _together(cluster, plan, 4, mode="rounds", producers=2)
    assert len({len(batches) for batches in seen}) == 1
    ratios = []
    for batches in zip(*seen, strict=True):
        longest = [max(1 + n * 37 % 50 for n in batch) for batch in batches]
        ratios.append(max(longest) / np.mean(longest))
    assert np.mean(ratios) < 1.03
    got = sorted(n for batches in seen for batch in batches for n in batch)
    whole = sorted(n for batch in direct(plan) for n in batch)
    # At most three rows of each producer's end are too few for a round.
    assert 0 <= len(whole) - len(got) <= 6
    assert not Counter(got) - Counter(whole)


@pytest.mark.slow
def test_rounds_survive_their_host_and_a_return(cluster):
    plan = numbers(cluster.folder, 3000, n=2, cost_s=0.0002)
    cluster.add()

    def trouble():
        time.sleep(0.3)
        host = next(n for n, w in cluster.workers.items() if w._streams)
        cluster.add()
        cluster.kill(host)

    thread = threading.Thread(target=trouble)
    thread.start()
    seen = _together(cluster, plan, 3, mode="rounds", producers=2, returning=2)
    thread.join()
    alone = Cluster(cluster.folder / "alone")
    alone.add()
    assert _together(alone, plan, 3, mode="rounds", producers=2) == seen
    alone.close()


def test_a_worker_joins_rounds_at_one_round_for_all(cluster):
    plan = numbers(cluster.folder, 5000, n=1, cost_s=0.0001)
    cluster.add()
    timer = threading.Timer(0.3, cluster.add)
    timer.start()
    seen = _together(cluster, plan, 3, mode="rounds", producers=2)
    timer.join()
    hosts = cluster.dispatcher.stats()["jobs"]["job"]["hosts"]
    assert {each[-1][1] for each in hosts} == {"worker-0", "worker-1"}
    alone = Cluster(cluster.folder / "alone")
    alone.add()
    assert _together(alone, plan, 3, mode="rounds", producers=2) == seen
    alone.close()
