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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Show what a fine-tune changed, layer by layer; nothing is written.

    Example: deltaserve diff ./llama ./llama-sql

    Many unchanged values or rows suit xor and rows, a small effective rank suits lowrank,
    the rest int. Rank 90% is how many singular vectors hold 90 % of the change.
    """
    from deltaserve.cli.tables import print_diff
    from deltaserve.compress.diff import diff

    with progress_bar() as progress:
        found = list(diff(base, model, progress))
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in found], indent=1))
    else:
        print_diff(found)
