"""The options of ``deltaserve bench``, several of which its commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
SystemFile = Annotated[
    Path, typer.Option("--system", help="What is simulated: YAML, such as configs/simulate/*.yaml.")
]
Replicas = Annotated[int | None, typer.Option(help="Engines with a base each, behind a router.")]
DeltaCount = Annotated[int | None, typer.Option("--deltas", help="Registered deltas.")]
Measurement = Annotated[
    Path, typer.Argument(metavar="RESULT.json", help="Of deltaserve bench serve, on DeltaServe.")
]
OutSystem = Annotated[Path, typer.Option("--out", help="Write the system here, as YAML.")]
