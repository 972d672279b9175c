"""The engine's process dies, hangs or outlives its parent: what its users see of that."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deltaserve.compress.plan import make_plan
from deltaserve.compress.run import compress
from deltaserve.config import EngineConfig
from deltaserve.engine.messages import Start
from deltaserve.engine.process import EngineProcess
from deltaserve.engine.remote import ProcessClient, Supervision
from deltaserve.engine.types import EngineRequest, FinishReason, SamplingParams, TokenEvent
from deltaserve.errors import CheckpointError, EngineDeadError
from tests.engine_helpers import BASE, engine_config
from tests.families import make_base, make_fine_tune

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("supervised")
    base = make_base("llama", root / "base")
    tune = make_fine_tune(base, root / "tune", seed=1)
    compress(base, tune, root / "delta", make_plan(codec="raw"))
    return base, root / "delta"


@pytest.fixture(scope="module")
def shared(models: tuple[Path, Path]) -> Iterator[ProcessClient]:
    base, delta = models
    client = ProcessClient(
        engine_config(base, {"tune": delta}),
        Supervision(hang_seconds=1.0, max_crashes=100, spare_after_seconds=0),
    )
    yield client
    client.close()


@pytest.fixture
def client(shared: ProcessClient) -> ProcessClient:
    """Up, whatever the last test did to it."""
    wait_until(shared.alive)
    return shared


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> float:
    """Seconds until ``condition`` held."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "waited in vain"
        time.sleep(0.01)
    return time.monotonic() - began


def request(name: str, model: str = BASE, max_tokens: int = 200) -> EngineRequest:
    return EngineRequest(name, model, (5, 6, 7), SamplingParams(max_tokens, temperature=0.0))


async def last_event(client: ProcessClient, name: str) -> TokenEvent:
    return [event async for event in client.stream(name)][-1]


async def generate(client: ProcessClient, name: str, model: str) -> list[int]:
    client.submit(request(name, model, max_tokens=8))
    return [token async for event in client.stream(name) for token in event.token_ids]


def has_spare(client: ProcessClient) -> bool:
    """It has imported everything and waits for its turn."""
    spare = client._spare
    return spare is not None and "idle" in Path(f"/proc/{spare.pid}/comm").read_text()


def running(pid: int) -> bool:
    """Not merely a zombie that nobody has asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_spare_imports_behind_those_who_serve() -> None:
    process, own = EngineProcess(spare=True), os.sched_getscheduler(0)
    try:
        wait_until(lambda: os.SCHED_IDLE in policies(process.pid))
        assert os.sched_getscheduler(process.pid) == own, "its main thread serves later"
    finally:
        process.stop(0)


def test_a_spare_that_is_asked_to_serve_hurries() -> None:
    """Beside programs that want all processors it would import for ever."""
    process = EngineProcess(spare=True)
    try:
        wait_until(lambda: os.SCHED_IDLE in policies(process.pid))
        config = EngineConfig(base="/nowhere")
        process.send(Start(config, (), logging.WARNING, False), wait=True)
        wait_until(lambda: os.SCHED_IDLE not in policies(process.pid))
    finally:
        process.stop(0)


def policies(pid: int) -> list[int]:
    """Of a process's threads."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended
            found.append(os.sched_getscheduler(int(task.name)))
    return found


def test_kill_under_load_fails_the_streams_and_it_serves_again(client: ProcessClient) -> None:
    async def main() -> None:
        wait_until(lambda: has_spare(client))
        before = {model: await generate(client, "x", model) for model in (BASE, "tune")}
        names = [f"r{i}" for i in range(32)]
        for i, name in enumerate(names):
            client.submit(request(name, (BASE, "tune")[i % 2]))
        streams = [client.stream(name) for name in names]
        await asyncio.gather(*(anext(stream) for stream in streams))
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        killed = time.monotonic()
        for stream in streams:
            event = [event async for event in stream][-1]
            assert event.finish_reason is FinishReason.ERROR
            assert "was killed by SIGKILL" in (event.error or "")
        assert time.monotonic() - killed < 1.0
        assert not client.alive()
        assert client.recovering()
        with pytest.raises(EngineDeadError, match="being started again"):
            client.submit(request("late"))
        wait_until(client.alive)
        assert time.monotonic() - killed < 10.0
        assert {model: await generate(client, "x", model) for model in before} == before
        assert len(client._mailboxes) == 0

    asyncio.run(main())


def test_deltas_are_served_again_as_they_were_last(
    client: ProcessClient, models: tuple[Path, Path], tmp_path: Path
) -> None:
    async def main() -> None:
        lost = shutil.copytree(models[1], tmp_path / "lost")
        await client.load_delta("later", str(models[1]), pinned=True)
        await client.load_delta("lost", str(lost))
        await client.load_delta("unloaded", str(models[1]))
        await client.unload_delta("unloaded")
        await client.pin_delta("tune", True)
        expected = await generate(client, "x", "tune")
        shutil.rmtree(lost)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        wait_until(lambda: not client.alive())
        wait_until(client.alive)
        pinned = {info.name: info.pinned for info in client.models()}
        assert pinned == {BASE: True, "tune": True, "later": True}
        for name in ("tune", "later"):
            assert await generate(client, "x", name) == expected
        await client.unload_delta("later")

    asyncio.run(main())


def test_other_deaths_are_named(client: ProcessClient) -> None:
    async def main() -> None:
        client.submit(request("doomed"))
        assert client.pid is not None
        os.kill(client.pid, signal.SIGSEGV)
        assert "SIGSEGV" in str((await last_event(client, "doomed")).error)

    asyncio.run(main())


def test_a_hanging_engine_counts_as_dead(client: ProcessClient) -> None:
    async def main() -> None:
        assert client.pid is not None
        os.kill(pid := client.pid, signal.SIGSTOP)
        client.submit(request("stuck"))
        event = await last_event(client, "stuck")
        assert event.finish_reason is FinishReason.ERROR
        assert "no sign of life for 1 s" in (event.error or "")
        wait_until(client.alive)
        assert not running(pid)

    asyncio.run(main())


def test_an_idle_engine_may_be_silent(client: ProcessClient) -> None:
    pid = client.pid
    time.sleep(1.5)  # longer than a busy one may be
    assert client.alive()
    assert client.pid == pid


def test_the_engine_leaves_signals_to_the_server(client: ProcessClient) -> None:
    pid = client.pid
    assert pid is not None
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)
    assert len(asyncio.run(generate(client, "x", BASE))) == 8
    assert client.pid == pid
    assert os.getpgid(pid) != os.getpgid(0)  # a terminal's Ctrl-C does not even reach it


def test_nobody_else_can_reach_the_engine(client: ProcessClient) -> None:
    listening = [line for line in Path("/proc/net/unix").read_text().splitlines() if "@" in line]
    assert not any("deltaserve" in line for line in listening)  # no socket without a file
    assert client._process is not None
    assert not client._process._directory.exists()


def test_a_starting_engines_directory_is_private() -> None:
    process = EngineProcess()
    try:
        assert process._directory.stat().st_mode & 0o077 == 0
    finally:
        process.stop(0)
    assert not process._directory.exists()
    assert not running(process.pid)


def test_errors_of_loading_are_the_same_as_in_a_thread(models: tuple[Path, Path]) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        ProcessClient(engine_config(Path("/nowhere"), {}))


def test_after_too_many_crashes_it_stays_down(models: tuple[Path, Path], tmp_path: Path) -> None:
    base = shutil.copytree(models[0], tmp_path / "base")
    client = ProcessClient(engine_config(base, {}), Supervision(max_crashes=2, backoff_seconds=0.1))
    shutil.rmtree(base)
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    wait_until(lambda: not client.alive())
    wait_until(lambda: not client.recovering())
    with pytest.raises(EngineDeadError, match="stays down after 2 in a row: restart the server"):
        asyncio.run(generate(client, "x", BASE))
    client.close()


def test_back_off_doubles() -> None:
    supervision = Supervision(backoff_seconds=0.5)
    assert [supervision.delay(n) for n in range(5)] == [0.0, 0.0, 0.5, 1.0, 2.0]


PARENT = """
import sys, time
from deltaserve.config import EngineConfig
from deltaserve.engine.process import EngineProcess
from deltaserve.engine.remote import ProcessClient
if sys.argv[1] == "loading":
    process = EngineProcess()
    print(process.pid, process._directory, flush=True)
else:
    client = ProcessClient(EngineConfig(sys.argv[2], kv_cache_memory_bytes=1 << 22))
    print(client.pid, client._process._directory, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("phase", ["loading", "serving"])
def test_the_engine_goes_with_a_server_that_is_killed(
    models: tuple[Path, Path], phase: str
) -> None:
    command = [sys.executable, "-c", PARENT, phase, str(models[0])]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, directory = parent.stdout.readline().split()
    assert running(int(pid))
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not running(int(pid)), 5.0) < 2.0
    assert not Path(directory).exists()
