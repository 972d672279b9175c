"""The service on Ray: real processes, killed with signal 9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from deltaserve.errors import PipelineError, ServiceError
from deltaserve.pipeline import Plan
from deltaserve.pipeline.service.cluster import NAMESPACE, Service, connect, dispatcher_name
from deltaserve.pipeline.service.stream import JobOptions, ServiceStream
from tests.pipeline.service.fake import direct, flat, numbers

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


@pytest.mark.slow
def test_the_command_serves_another_process_until_it_is_told_to_end(tmp_path):
    plan = numbers(tmp_path, 1000)
    command = [sys.executable, "-m", "deltaserve", "pipeline", "serve", str(tmp_path / "journal")]
    served = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert "is ready (0 jobs" in served.stdout.readline()
        script = tmp_path / "trainer.py"
        script.write_text(TRAINER)
        found = subprocess.run(
            [sys.executable, script, str(tmp_path)], capture_output=True, text=True, timeout=120
        )
        assert found.stdout.strip().splitlines()[-1] == str(sum(map(sum, direct(plan)))), found
        served.send_signal(signal.SIGINT)
        assert served.wait(30) != 1
    finally:
        served.kill()


TRAINER = """
import sys
from pathlib import Path
from deltaserve.pipeline.service.cluster import connect
from deltaserve.pipeline.service.stream import JobOptions, ServiceStream
from tests.pipeline.service.fake import flat, numbers

plan = numbers(Path(sys.argv[1]), 1000)
with ServiceStream(connect(), plan, JobOptions("job", local=0), None) as stream:
    print(sum(sum(flat(batch)) for batch in stream))
"""
