"""``deltaserve export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltaserve.cli.progress import progress_bar, stop_on_sigterm


def run(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The base that the delta was made for.")
    ],
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="Directory of the delta.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="New directory for the model.")],
) -> None:
    """Write base + delta as an ordinary Hugging Face checkpoint.

    Example: deltaserve export ./llama ./sql-delta -o ./llama-sql

    The result loads with transformers' from_pretrained, and anything else that reads
    Hugging Face checkpoints.
    """
    from deltaserve.compress.export import export

    with stop_on_sigterm(), progress_bar() as progress:
        written = export(base, delta, out, progress)
    typer.echo(f"wrote {written}")
