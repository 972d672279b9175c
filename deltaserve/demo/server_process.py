"""`deltaserve serve` as a process of its own, from its start to its certain end."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from deltaserve.errors import DeltaServeError

READY = re.compile(r"^DeltaServe ready at (http://\S+)", re.MULTILINE)
START_SECONDS = 120.0
STOP_SECONDS = 15.0  # a little more than the server gives requests in flight
POLL_SECONDS = 0.05
TAIL_LINES = 3


class ServerError(DeltaServeError):
    """The server did not start, or ended on its own."""


@dataclass(frozen=True)
class Server:
    """A server's process and its log."""

    process: subprocess.Popen[bytes]
    log: Path

    def wait_until_ready(self, seconds: float = START_SECONDS) -> str:
        """Its URL, without a trailing slash or /v1, once it accepts requests.

        Raises:
            ServerError: it ended, or was not ready in time.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerError(f"the server did not start: {self._last_words()}")
            if ready := READY.search(self._logged()):
                return ready[1]
            time.sleep(POLL_SECONDS)
        raise ServerError(f"the server was not ready after {seconds:g} s: {self._last_words()}")

    def wait(self) -> NoReturn:
        """Until the server ends on its own, which it should not: raises ServerError then."""
        self.process.wait()
        raise ServerError(f"the server ended: {self._last_words()}")

    def explain(self, error: Exception) -> ServerError:
        """A failed request as an error that names the cause, if the server is gone."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=1.0)
            return ServerError(f"the server ended: {self._last_words()}")
        reason = str(error) or type(error).__name__
        return ServerError(f"a request failed: {reason} (the server's log is {self.log})")

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._logged().splitlines() if line.strip()]
        said = " / ".join(lines[-TAIL_LINES:]) or "nothing"
        code = self.process.poll()
        ended = "" if code is None else f"exit code {code}, "
        return f"{ended}it said: {said} (all of it in {self.log})"

    def _logged(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


def serve_command(base: Path, deltas: Mapping[str, Path]) -> list[str]:
    """The arguments of `deltaserve` that serve a base and its deltas."""
    named = (f"--delta={name}={path}" for name, path in deltas.items())
    return ["serve", str(base), *named]


@contextlib.contextmanager
def server_process(arguments: Sequence[str], log: Path) -> Iterator[Server]:
    """`python -m deltaserve ARGUMENTS`, starting; ended and waited for when the block is left.

    It stays in this process group, so that closing the terminal ends it too.
    """
    # A key of the user's own would be asked of the demo, and of who tries its examples.
    environment = {k: v for k, v in os.environ.items() if k != "DELTASERVE_API_KEY"}
    made: list[subprocess.Popen[bytes]] = []

    def make() -> None:
        with log.open("wb") as output:
            made.append(
                subprocess.Popen(
                    [sys.executable, "-m", "deltaserve", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                )
            )

    # In a thread: Ctrl-C in the midst of Popen would leave a process that nobody knows of.
    maker = threading.Thread(target=make)
    try:
        maker.start()
        maker.join()
        yield Server(made[0], log)
    finally:
        if maker.is_alive():
            maker.join()
        for process in made:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the process, kindly at first, and wait for it."""
    process.terminate()
    try:
        process.wait(timeout=STOP_SECONDS)
    finally:
        # Also when a second Ctrl-C ends the waiting: nothing may stay behind.
        if process.poll() is None:
            process.kill()
            process.wait()
