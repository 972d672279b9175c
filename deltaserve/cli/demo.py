"""``deltaserve demo``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from deltaserve.cli.progress import stop_on_sigterm

BROKEN_PROMISE = 1


def run(
    folder: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            help="Folder for models, deltas and results. (default: in the user's cache folder)",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of weights and training data; another one trains anew.")
    ] = 0,
    keep_serving: Annotated[
        bool, typer.Option("--keep-serving", help="Go on serving until Ctrl-C.")
    ] = False,
) -> int:
    """Train a small family of models, compress, serve and check them.

    Example: deltaserve demo --keep-serving

    Trains a base and six fine-tunes of it (minutes the first time, cached afterwards),
    compresses each into a delta, serves all of them and the base from one process, asks
    them held-out prompts at once through the OpenAI client, and shows sizes, scores and
    speed. Exits with 1 if a delta lost quality or is too large.
    """
    from deltaserve.demo.showcase import run_demo

    with stop_on_sigterm():
        failures = run_demo(folder, seed=seed, keep_serving=keep_serving)
    for failure in failures:
        print(f"deltaserve: demo failed: {failure}", file=sys.stderr)
    return BROKEN_PROMISE if failures else 0
