"""What the load tests' commands share: their options, and the progress line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from deltaserve.bench.load.execute import Progress
from deltaserve.bench.load.runner import Run
from deltaserve.bench.load.workload import Workload, make_workload, read_workload, set_key
from deltaserve.errors import ConfigError

MISSED = 1
CTRL_C = 130

WorkloadFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="WORKLOAD", help="YAML file, such as configs/bench/*.yaml.", show_default=False
    ),
]
SweepFile = Annotated[Path, typer.Argument(metavar="WORKLOAD", help="YAML file with a key sweep.")]
Url = Annotated[str | None, typer.Option(help="The server, such as http://127.0.0.1:8000.")]
Spawn = Annotated[
    Path | None,
    typer.Option(metavar="CONFIG", help="Start deltaserve serve with this YAML file, and end it."),
]
ApiKey = Annotated[
    str,
    typer.Option(
        envvar="DELTASERVE_API_KEY", help="Key of tenants that name none.", show_default=False
    ),
]
AdminKey = Annotated[
    str,
    typer.Option(
        envvar="DELTASERVE_ADMIN_KEY",
        help="Key for the server's metrics, where they need one.",
        show_default=False,
    ),
]
AllowRemote = Annotated[bool, typer.Option(help="Load a server on another machine.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a key of the workload: arrivals.rate=4. Repeat."
    ),
]
Rate = Annotated[float | None, typer.Option(help="Poisson arrivals per second, of each tenant.")]
Requests = Annotated[int | None, typer.Option(help="Requests of each tenant.")]
Duration = Annotated[float | None, typer.Option(help="Seconds in which each tenant sends.")]
Closed = Annotated[
    int | None, typer.Option(help="Closed loop instead: so many users of each tenant.")
]
MaxTime = Annotated[float | None, typer.Option(help="Seconds after which the run is cut.")]
MaxRequests = Annotated[int | None, typer.Option(help="Requests of all tenants, at most.")]
Goodput = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME:MS", help="Objective: ttft, tpot, itl or e2e. Repeat."),
]
Seed = Annotated[int | None, typer.Option(help="Of everything random in the workload.")]
Out = Annotated[
    Path | None, typer.Option(help="Write the result here as JSON, and beside it as HTML.")
]
Detailed = Annotated[bool, typer.Option("--save-detailed", help="With the time of every token.")]
OutFolder = Annotated[Path, typer.Option(help="Folder of the results.")]
Resume = Annotated[bool, typer.Option(help="Leave out what the folder already holds.")]
DryRun = Annotated[bool, typer.Option(help="Only list the points.")]
RateScale = Annotated[float, typer.Option(help="Multiplies the swept rates, for this machine.")]
ResultA = Annotated[Path, typer.Argument(metavar="A.json", help="A result, or a folder of runs.")]
ResultB = Annotated[Path, typer.Argument(metavar="B.json", help="What is compared with it.")]


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
