"""The service on Ray: real processes, killed with signal 9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from deltaserve.errors import PipelineError, ServiceError
from deltaserve.pipeline import Plan
from deltaserve.pipeline.service.cluster import NAMESPACE, Service, connect, dispatcher_name
from deltaserve.pipeline.service.link import within
from deltaserve.pipeline.service.stream import JobOptions, ServiceStream
from tests.pipeline.service.fake import direct, flat, numbers

ROOT = Path(__file__).parents[3]

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    folder = tmp_path_factory.mktemp("service")
    service = Service(folder, min_workers=2, max_workers=2, heartbeat_limit_s=2.0, patience_s=30)
    yield service
    service.close()
    ray.shutdown()


def test_the_stream_is_that_of_this_process(service, tmp_path):
    plan = numbers(tmp_path, 1000)
    with service.open(plan, JobOptions("same", local=0)) as stream:
        assert [flat(batch) for batch in stream] == direct(plan)


def test_kill_9_of_workers_and_dispatcher_loses_and_repeats_nothing(service, tmp_path):
    plan = numbers(tmp_path, 6000, cost_s=0.0005)
    killed, done = [], threading.Event()

    def killer():
        while len(killed) < 2 and not done.wait(0.8):
            if len(killed) == 1:
                actor = ray.get_actor(dispatcher_name("pipeline"), namespace=NAMESPACE)
            else:
                handles = [each[0] for each in service._workers.values() if each[2]]
                if not handles:
                    continue
                actor = handles[0]
            try:
                pid = ray.get(actor.__ray_call__.remote(lambda self: os.getpid()), timeout=5)
            except ray.exceptions.RayError:
                continue
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    thread = threading.Thread(target=killer)
    seen = []
    with service.open(plan, JobOptions("killed", mode="dynamic", local=0, depth=4)) as stream:
        seen.append(flat(next(stream)))
        thread.start()
        try:
            for batch in stream:
                seen.append(flat(batch))
        finally:
            done.set()
            thread.join()
    assert seen == direct(plan)
    assert len(killed) >= 2


def test_an_error_of_the_plan_arrives_as_it_is(service, tmp_path):
    file = tmp_path / "broken.jsonl"
    file.write_text('{"n": 1}\nnot json\n')
    plan = Plan.from_jsonl(file).batch(1)
    with (
        service.open(plan, JobOptions("broken", local=0)) as stream,
        pytest.raises(PipelineError, match=r"broken\.jsonl, line 2"),
    ):
        list(stream)


def test_shared_streams_and_rounds(service, tmp_path):
    plan = numbers(tmp_path, 1000)
    whole = direct(plan)
    for mode in ("lockstep", "rounds"):
        seen = [[], []]

        def consume(consumer, mode=mode, seen=seen):
            options = JobOptions(mode, mode=mode, consumer=consumer, consumers=2)
            with service.open(plan, options) as stream:
                seen[consumer] += [flat(batch) for batch in stream]

        threads = [threading.Thread(target=consume, args=(c,)) for c in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if mode == "lockstep":
            assert seen == [whole, whole]
        else:
            got = sorted(n for batches in seen for batch in batches for n in batch)
            # One row is left over.
            assert len(got) >= sum(map(len, whole)) - 1
            assert len(seen[0]) == len(seen[1])


def test_a_name_that_is_taken_and_a_service_that_is_not_there(service, tmp_path):
    with pytest.raises(ServiceError, match="another name"):
        Service(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ServiceError, match="cannot be used"):
        Service(tmp_path / "file")
    (tmp_path / "journal").write_bytes(b"something else")
    with pytest.raises(ServiceError, match="not a journal"):
        Service(tmp_path)
    began = time.monotonic()
    with pytest.raises(ServiceError, match=r"'nowhere' did not answer for 0\.5 s"):
        connect("nowhere", patience_s=0.5)
    assert time.monotonic() - began < 60


def test_a_dispatcher_that_stays_dead_is_told_after_the_patience(service, tmp_path):
    other = Service(tmp_path / "other", name="other", max_workers=0, patience_s=1.0)
    plan = numbers(tmp_path, 30_000)
    with ServiceStream(other.link, plan, JobOptions("job", local=1), None) as stream:
        next(stream)
        other.close()
        began = time.monotonic()
        with pytest.raises(ServiceError, match="'other' did not answer for 1 s"):
            list(stream)
        assert time.monotonic() - began < 60


def test_a_call_that_hangs_is_left():
    assert within(5, lambda: 3) == 3
    with pytest.raises(ServiceError, match="as it is"):
        within(5, lambda: fail(ServiceError("as it is")))
    hangs = threading.Event()
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=r"no answer for 0\.1 s"):
        within(0.1, hangs.wait)
    assert time.monotonic() - began < 5
    hangs.set()


def fail(error):
    raise error


@contextmanager
def serving(folder):
    """The command, with its trainer's script beside it."""
    command = [sys.executable, "-m", "deltaserve", "pipeline", "serve", str(folder / "journal")]
    (folder / "trainer.py").write_text(TRAINER)
    with (folder / "told").open("w") as told:
        served = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=told, text=True)
    try:
        assert "is ready (0 jobs" in served.stdout.readline()
        yield served
    finally:
        children = (
            psutil.Process(served.pid).children(recursive=True) if served.poll() is None else []
        )
        served.kill()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()


def trainer(folder, mode, rows):
    command = [sys.executable, folder / "trainer.py", folder, mode, str(rows)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_another_process_until_it_is_told_to_end(tmp_path, number):
    plan = numbers(tmp_path, 1000)
    with serving(tmp_path) as served:
        found, _ = trainer(tmp_path, "ordered", 1000).communicate(timeout=120)
        assert found.splitlines()[-1] == str(sum(map(sum, direct(plan))))
        children = psutil.Process(served.pid).children(recursive=True)
        served.send_signal(number)
        assert served.wait(30) == 130
        assert (tmp_path / "told").read_text() == "deltaserve: interrupted\n"
        assert not psutil.wait_procs(children, timeout=30)[1]


@pytest.mark.slow
def test_a_trainer_outlives_a_service_that_is_killed(tmp_path):
    """Ray would end it after a minute without its cluster."""
    numbers(tmp_path, 200_000)
    with serving(tmp_path) as served:
        reading = trainer(tmp_path, "lockstep", 200_000)
        assert reading.stdout.readline() == "reading\n"
        children = psutil.Process(served.pid).children(recursive=True)
        served.kill()
        killed = time.monotonic()
        told, _ = reading.communicate(timeout=150)
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
    assert "'pipeline' did not answer for 5 s" in told
    assert reading.returncode == 0
    assert time.monotonic() - killed > 70


TRAINER = """
import sys, time
from pathlib import Path
from deltaserve.errors import ServiceError
from deltaserve.pipeline.service.cluster import connect
from deltaserve.pipeline.service.stream import JobOptions, ServiceStream
from tests.pipeline.service.fake import flat, numbers

folder, mode, rows = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
options = JobOptions("job", mode=mode, local=0)
try:
    with ServiceStream(connect(patience_s=5.0), numbers(folder, rows), options, None) as stream:
        total = sum(flat(next(stream)))
        print("reading", flush=True)
        print(total + sum(sum(flat(batch)) for batch in stream))
except ServiceError as error:
    print(error)
    time.sleep(75)
"""
