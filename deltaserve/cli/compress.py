"""``deltaserve compress``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deltaserve.cli.progress import progress_bar, stop_on_sigterm

ARGUMENT_BASE = typer.Argument(metavar="BASE", help="Directory or hub id of the base model.")
ARGUMENT_MODEL = typer.Argument(
    metavar="MODEL", help="Directory or hub id of the fine-tune, or a PEFT LoRA adapter."
)


def run(
    base: Annotated[str, ARGUMENT_BASE],
    model: Annotated[str, ARGUMENT_MODEL],
    out: Annotated[Path, typer.Option("--out", "-o", help="New directory for the delta.")],
    codec: Annotated[
        str | None,
        typer.Option(
            help="For linear layers: int (default), nm24, lowrank, nf4, rows; "
            "raw and xor are lossless and apply to every parameter."
        ),
    ] = None,
    bits: Annotated[int | None, typer.Option(help="1, 2, 3, 4 or 8 bits per value.")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Values that share a scale; 0 = a whole row.")
    ] = None,
    planes: Annotated[
        int | None, typer.Option(help="int: further planes quantise what is left over.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="lowrank: rank of the factors.")] = None,
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help="int: zero points; exact zeros stay zero.")
    ] = False,
    scale_axis: Annotated[
        str | None, typer.Option(help="int: group (default), row, column or tensor.")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="mse (default) or absmax: how scales are chosen.")
    ] = None,
    embedding_codec: Annotated[
        str | None, typer.Option(help="For embedding and head: rows, int, raw, ...")
    ] = None,
    embedding_bits: Annotated[
        int | None, typer.Option(help="For embedding and head; codec int unless named.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML patterns that choose per parameter; the first match wins."),
    ] = None,
) -> None:
    """Compress a fine-tune of a base model into a delta.

    Example: deltaserve compress ./llama ./llama-sql -o ./sql-delta

    The default stores linear layers in 2 bits per value, embeddings as their changed rows
    or in 4 bits, and norms and biases as they are; what did not change costs nothing. A
    LoRA adapter is kept exactly. Then: deltaserve serve ./llama --delta sql=./sql-delta
    """
    from deltaserve.cli.tables import print_summary
    from deltaserve.compress.plan import load_rules, make_plan
    from deltaserve.compress.run import compress

    settings = {
        "bits": bits,
        "group_size": group_size,
        "planes": planes,
        "rank": rank,
        "symmetric": False if asymmetric else None,
        "scale_axis": scale_axis,
        "clip": clip,
    }
    linear: dict[str, Any] = {key: value for key, value in settings.items() if value is not None}
    vocabulary = {} if embedding_bits is None else {"bits": embedding_bits}
    plan = None
    if codec or linear or embedding_codec or vocabulary or config:
        rules = load_rules(config) if config else ()
        plan = make_plan(codec, linear, embedding_codec, vocabulary, rules)
    with stop_on_sigterm(), progress_bar() as progress:
        manifest = compress(base, model, out, plan, progress)
    print_summary(manifest, out)
