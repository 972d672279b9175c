"""``deltaserve inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def run(
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="Directory of the delta.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the manifest as JSON, for machines.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Also read every byte and check the digest.")
    ] = False,
) -> None:
    """Show what a delta holds: sizes, codecs and errors, base and digest.

    Example: deltaserve inspect ./sql-delta

    Ratios count everything that the fine-tune stores, embeddings included. The error of a
    parameter is that of its change: 0 is exact, 1 as if the change were dropped.
    """
    from deltaserve.artifact.reader import Delta
    from deltaserve.cli.tables import print_delta

    artifact = Delta.open(delta)
    if verify:
        artifact.verify_digest()
    if as_json:
        typer.echo(json.dumps(artifact.manifest.to_json(), indent=1))
    else:
        print_delta(artifact, verified=verify)
