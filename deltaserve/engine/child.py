"""The engine's process, ``python -m deltaserve.engine.child DIRECTORY [spare]``: see
EngineProcess."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import zmq

from deltaserve.engine.messages import (
    SCHEMA,
    Command,
    Failed,
    Failure,
    Hello,
    Loading,
    Report,
    Start,
)
from deltaserve.engine.wire import decode, encode
from deltaserve.errors import DeltaServeError
from deltaserve.logs import set_up_logs

SPARE_NAME, NAME = b"deltaserve-idle", b"deltaserve-eng"  # the kernel keeps 15 bytes
FAREWELL_MILLISECONDS = 2000
"""How long the last reports may take to leave."""
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
LOOK_SECONDS = 0.1
"""How often a spare process looks whether its imports are done."""

logger = logging.getLogger("deltaserve.engine")


class Link:
    """The two sockets to the process that started this one."""

    def __init__(self, directory: Path) -> None:
        self._context = zmq.Context()
        self._commands = self._connect(zmq.PULL, directory / "commands")
        self._reports = self._connect(zmq.PUSH, directory / "reports")

    def send(self, report: Report) -> None:
        self._reports.send_multipart(encode(report))

    def asked(self, seconds: float) -> bool:
        """Whether a command has come, after so long at most. It is still to be received."""
        return bool(self._commands.poll(int(seconds * 1000)))

    def receive(self, seconds: float | None) -> list[Command]:
        """As loop.Receive: all commands that have come."""
        commands: list[Command] = []
        if self._commands.poll(None if seconds is None else int(seconds * 1000)):
            while self._commands.poll(0):
                commands.append(decode(self._commands.recv_multipart()))
        return commands

    def close(self) -> None:
        self._context.destroy(linger=FAREWELL_MILLISECONDS)

    def _connect(self, kind: int, path: Path) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.set(zmq.SNDHWM, 0)
        socket.set(zmq.RCVHWM, 0)
        socket.connect(f"ipc://{path}")
        return socket


def main(directory: Path, spare: bool) -> int:
    """Serve until told to stop; the exit code. spare: while another one serves."""
    # The server decides: it may want to drain, and if it goes, this process goes with it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(directory,), daemon=True).start()
    link = Link(directory)
    link.send(Hello(SCHEMA))
    if spare:
        _import_behind_others(link)
    try:
        return _serve(link)
    finally:
        link.close()


def _serve(link: Link) -> int:
    from deltaserve.engine.core import Engine  # seconds: after Hello
    from deltaserve.engine.loop import EngineLoop

    _prctl(PR_SET_NAME, SPARE_NAME)
    (start,) = link.receive(None)
    assert isinstance(start, Start)
    _prctl(PR_SET_NAME, NAME)
    set_up_logs(start.log_level, as_json=start.json_logs, who="engine: ")
    link.send(Loading())
    try:
        engine = Engine(start.config)
        for delta in start.restore:
            try:
                engine.register(delta.name, delta.path, delta.pinned)
            except DeltaServeError as error:
                logger.error("the delta %s is not served any more: %s", delta.name, error)
        # Only now, when the directory is gone: what is killed cannot clean up.
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        EngineLoop(engine, link.receive, link.send).run()
    except DeltaServeError as error:
        link.send(Failed(Failure.of(error)))
        return 1
    except Exception as error:
        logger.exception("the engine failed")
        link.send(Failed(Failure.of(error)))
        return 1
    return 0


def _import_behind_others(link: Link) -> None:
    """Takes seconds of a processor, which those whose answers are computed shall not lack: only
    what nobody else wants, until this process is asked to serve.

    A niceness is not enough: each turn that it gives delays a step, of which all threads wait for
    the one that was interrupted, and steps took twice as long for seconds.
    """
    importing = threading.Thread(target=_import)
    importing.start()
    if hasattr(os, "SCHED_IDLE"):  # Linux, where a thread has a policy of its own
        _set_policy(importing, os.SCHED_IDLE)
    while importing.is_alive() and not link.asked(LOOK_SECONDS):
        pass
    if hasattr(os, "SCHED_IDLE"):
        _set_policy(importing, os.SCHED_OTHER)
    importing.join()


def _import() -> None:
    importlib.import_module("deltaserve.engine.core")
    importlib.import_module("deltaserve.engine.loop")


def _set_policy(thread: threading.Thread, policy: int) -> None:
    """Without effect on a thread that has ended, and where it needs a privilege that is missing:
    to be raised again. Then the processors that the engine left are its own anyway."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(thread.native_id or 0, policy, os.sched_param(0))


def _end_with_parent(directory: Path) -> None:
    """Standard input ends when the process at its other end does, even if that was killed."""
    os.read(sys.stdin.fileno(), 1)
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(1)


def _prctl(option: int, value: int | bytes) -> None:
    """Linux only; elsewhere the name is Python's, and the pipe alone tells of the parent's end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    code = main(Path(sys.argv[1]), "spare" in sys.argv[2:])
    logging.shutdown()
    os._exit(code)  # taking torch apart would last a second, and there is nothing left to save
