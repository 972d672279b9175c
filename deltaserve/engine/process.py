"""The engine's process, seen from the one that started it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import zmq

from deltaserve.engine.messages import Command, Report, Stop
from deltaserve.engine.wire import decode, encode

CHILD = "deltaserve.engine.child"
COMMANDS, REPORTS = "commands", "reports"
"""The sockets in the process's directory, named for what passes through them."""
CONNECT_MILLISECONDS = 10_000
LONGEST_PATH = zmq.IPC_PATH_MAX_LEN - len(f"/{COMMANDS}")


class EngineProcess:
    """A process and the two sockets to it, from its start to its certain end.

    It talks over Unix sockets in a directory that only this user may enter, and that exists
    only until both ends are connected. Its standard input is a pipe on which nothing is ever
    sent: it ends when this process does, however that comes about.
    """

    def __init__(self, *, spare: bool = False) -> None:
        """Start it. What it imports takes seconds; they pass in parallel, and of a spare one behind
        those who serve."""
        self._directory = _private_directory()
        self._sending = threading.Lock()
        self._context = zmq.Context()
        try:
            self._commands = self._bind(zmq.PUSH, COMMANDS)
            self._reports = self._bind(zmq.PULL, REPORTS)
            self._process = subprocess.Popen(
                # The same modules as here, none from where the user happens to stand (-P).
                [sys.executable, "-P", "-m", CHILD, str(self._directory), *["spare"] * spare],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
                stdin=subprocess.PIPE,
                process_group=0,  # Ctrl-C in a terminal is for the server, which may drain first
            )
        except BaseException:
            self._clean_up()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, command: Command, *, wait: bool = False) -> None:
        """Queue a command; any thread may. Dropped if the process is gone, which ``exit`` tells.

        wait: until the process is connected, which it need not be before it has said Hello.
        """
        frames = encode(command)
        with self._sending, contextlib.suppress(zmq.ZMQError):
            self._commands.send_multipart(frames, 0 if wait else zmq.NOBLOCK)

    def receive(self, seconds: float) -> Report | None:
        """The next report; waits at most so long for it. For one thread only."""
        if not self._reports.poll(int(seconds * 1000)):
            return None
        report: Report = decode(self._reports.recv_multipart())
        return report

    def exit(self) -> str | None:
        """How it ended; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        if code >= 0:
            return f"ended with exit code {code}"
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-code).name}{hint}"

    def hide(self) -> None:
        """Remove the directory: both ends are connected and nobody else ever shall be."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def stop(self, seconds: float) -> None:
        """End it: at its own will within so many seconds, or against it."""
        if seconds > 0 and self.exit() is None:
            self.send(Stop())
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._clean_up()

    def _bind(self, kind: int, name: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.SNDHWM, 0)
        socket.set(zmq.RCVHWM, 0)
        socket.set(zmq.SNDTIMEO, CONNECT_MILLISECONDS)
        socket.bind(f"ipc://{self._directory / name}")
        return socket

    def _clean_up(self) -> None:
        self._context.destroy(linger=0)
        shutil.rmtree(self._directory, ignore_errors=True)


def _private_directory() -> Path:
    """For this user only (mode 0700), in the usual place unless that makes too long a path."""
    path = Path(tempfile.mkdtemp(prefix="deltaserve-"))
    if len(str(path)) > LONGEST_PATH:
        path.rmdir()
        path = Path(tempfile.mkdtemp(prefix="deltaserve-", dir="/tmp"))
    return path
