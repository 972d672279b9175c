"""``deltaserve diff``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from deltaserve.cli.progress import progress_bar


def run(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Directory or hub id of the base.")],
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Directory or hub id of the fine-tune.")
    ],
    parameters: Annotated[
        bool, typer.Option("--parameters", help="List each changed parameter as well.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Show what a fine-tune changed, layer by layer; nothing is written.

    Example: deltaserve diff ./llama ./llama-sql

    Bars show how far each matrix moved, and in how many directions. Few changed rows suit the
    codec rows, few changed values sparse, few directions lowrank, the rest int. With
    --parameters, rank 90% is how many singular vectors hold 90 % of the change.
    """
    from deltaserve.cli.diff_tables import print_diff
    from deltaserve.compress.diff import diff

    with progress_bar() as progress:
        found = list(diff(base, model, progress))
    if as_json:
        typer.echo(json.dumps([asdict(each) | {"suits": each.suits} for each in found], indent=1))
    else:
        print_diff(found, parameters=parameters)
