"""The demo from end to end: train, compress, serve, ask, judge."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai

from deltaserve.artifact.manifest import Manifest
from deltaserve.demo.display import Display, display
from deltaserve.demo.family import Family, Record, default_dir
from deltaserve.demo.questions import Session, ask, questions_for
from deltaserve.demo.results import assemble
from deltaserve.demo.server_process import Server, serve_command, server_process
from deltaserve.demo.table import curl_command, print_results, shell_command
from deltaserve.demo.tasks import TASKS
from deltaserve.demo.train import HELD_OUT_SEED, build_family
from deltaserve.demo.workspace import (
    DELTAS,
    RESULTS,
    SERVER_LOG,
    check_folder,
    compress_members,
    write_json,
)

DEFAULT_URL = "http://127.0.0.1:8000"  # where `deltaserve serve` listens unless told


@dataclass
class Stopwatch:
    """Seconds of each phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)


def run_demo(folder: Path | None, *, seed: int, keep_serving: bool) -> list[str]:
    """Run the demo in `folder`, the user's cache folder when None; returns broken promises.

    With `keep_serving` it goes on serving until KeyboardInterrupt, if all were kept.

    Raises:
        DeltaServeError: foreign files in `folder`; the server did not start, or failed.
    """
    root = (folder or default_dir()).expanduser().resolve()
    check_folder(root)
    watch = Stopwatch()
    with display() as shown:
        family, manifests = _prepare(root, seed, watch, shown)
    deltas = {member.name: root / DELTAS / member.name for member in family.members}
    command = serve_command(family.base, deltas)
    with server_process([*command, "--port=0"], root / SERVER_LOG) as server:
        with display() as shown:
            url, session = _question(server, family, watch, shown)
        record = Record.read(root)
        trained = record.seconds if record else {}
        results = assemble(family, seed, manifests, session, watch.seconds, trained)
        write_json(root / RESULTS, results.to_json())
        print_results(results)
        failures = results.failures()
        if keep_serving and not failures:
            _keep_serving(server, url, family)
    if not failures:
        _print_next(DEFAULT_URL, [*_program(), *command], family)
    return failures


def _prepare(
    root: Path, seed: int, watch: Stopwatch, shown: Display
) -> tuple[Family, dict[str, Manifest]]:
    def trained(step: str, done: float) -> None:
        if not step.startswith("score"):  # a fraction of a second each
            shown.report(f"train {step}", done)

    with watch.phase("train"):
        family = build_family(root, seed=seed, progress=trained)
    with watch.phase("compress"):
        manifests = compress_members(family, lambda done: shown.report("compress", done))
    return family, manifests


def _question(
    server: Server, family: Family, watch: Stopwatch, shown: Display
) -> tuple[str, Session]:
    shown.report("start server", 0.0)
    with watch.phase("start server"):
        url = server.wait_until_ready()
    shown.report("start server", 1.0)
    with watch.phase("ask"):
        try:
            session = ask(url, questions_for(family), lambda done: shown.report("ask", done))
        except (openai.OpenAIError, httpx.HTTPError) as error:
            raise server.explain(error) from error
    return url, session


def _keep_serving(server: Server, url: str, family: Family) -> None:
    print(f"Serving at {url}/v1 until Ctrl-C. Try:\n\n{_example(url, family)}\n", flush=True)
    try:
        server.wait()
    except KeyboardInterrupt:
        print("Stopping the server.")


def _print_next(url: str, command: Sequence[str], family: Family) -> None:
    print(f"Serve them again:\n\n{shell_command(command)}\n")
    print(f"and ask:\n\n{_example(url, family)}")


def _example(url: str, family: Family) -> str:
    """A request whose answer everybody can check."""
    member = family.members[0]
    example = TASKS[member.task].examples("held_out", 1, HELD_OUT_SEED)[0]
    return curl_command(url, member.name, example.prompt)


def _program() -> list[str]:
    """How to call this program where it may not be on the PATH."""
    return ["deltaserve"] if shutil.which("deltaserve") else [sys.executable, "-m", "deltaserve"]
