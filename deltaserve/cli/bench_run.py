"""What the load tests' commands share: the workload of their options, the line that follows a run,
and what becomes of its result."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from deltaserve.bench.load import text
from deltaserve.bench.load.execute import Progress
from deltaserve.bench.load.output import write_json, write_text
from deltaserve.bench.load.page import report
from deltaserve.bench.load.runner import Run
from deltaserve.bench.load.workload import Workload, make_workload, read_workload, set_key
from deltaserve.errors import ConfigError

MISSED = 1
CTRL_C = 130


def workload_of(
    file: Path | None,
    flags: Mapping[str, Any],
    rate: float | None,
    closed: int | None,
    settings: Sequence[str] | None,
    goodput: Sequence[str] | None,
) -> Workload:
    """The workload of a file, or the default one, with the command line's changes.

    Raises ConfigError: what is wrong, and where.
    """
    content = read_workload(file) if file else {}
    for key, value in {**flags, "arrivals": _arrivals(rate, closed)}.items():
        if value is not None:
            set_key(content, key, value)
    for key, value in [*map(setting, settings or ()), *map(_objective, goodput or ())]:
        set_key(content, key, value)
    return make_workload(content, str(file or "workload"))


@contextlib.contextmanager
def progress(prefix: str = "") -> Iterator[Progress]:
    """A line on stderr that follows the run, where there is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda name, run: None
        return
    with console.status("looking at the server and warming it up ...") as status:

        def show(name: str, run: Run) -> None:
            done = len(run.records)
            failed = sum(record.failed for record in run.records)
            status.update(
                f"{prefix}{name}: {run.seconds:.0f} s, {run.sent} sent, {done} done, "
                f"{failed} failed, {run.in_flight} in flight"
            )

        yield show


def publish(result: Mapping[str, Any], out: Path | None) -> None:
    """Print a result; with ``out`` write it there as JSON, and beside it as HTML."""
    print(text.render(result), flush=True)
    if out is not None:
        write_json(out, result)
        write_text(out.with_suffix(".html"), report(result))
        print(f"wrote {out} and {out.with_suffix('.html')}")


def _arrivals(rate: float | None, closed: int | None) -> dict[str, Any] | None:
    if rate is not None and closed is not None:
        raise ConfigError("--rate is of an open loop, --closed is another: give one of them")
    if closed is not None:
        return {"kind": "closed", "concurrency": closed}
    return None if rate is None else {"kind": "poisson", "rate": rate}


def setting(argument: str) -> tuple[str, Any]:
    key, equals, value = argument.partition("=")
    if not (key and equals):
        raise ConfigError(f"a setting is given as KEY=VALUE, not {argument!r}")
    try:
        return key.replace("-", "_"), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{argument!r}: the value is not valid YAML") from error


def _objective(argument: str) -> tuple[str, float]:
    """vLLM's way of naming one: ttft:500, in milliseconds."""
    name, _, value = argument.partition(":")
    name = {"e2el": "e2e"}.get(name, name)
    try:
        return f"slo.{name}", float(value) / 1e3
    except ValueError:
        raise ConfigError(f"an objective is given as NAME:MS, not {argument!r}") from None
