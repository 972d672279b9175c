"""The options of ``deltaserve compress``, in the order and the groups of its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

GOAL = "What to aim for (choose one; codecs are chosen by measurement)"
HAND = "By hand: one codec for all linear layers"
TEXT = "Calibration text and device"

Base = Annotated[str, typer.Argument(metavar="BASE", help="Directory or hub id of the base model.")]
Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...",
        help="Directories or hub ids of fine-tunes, or PEFT LoRA adapters. Several at once "
        "share what is read of the base.",
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        "--out", "-o", help="New directory for the delta; for several models, of them all."
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="balanced (default; about 8x smaller in memory), small (16x), quality (5x) or "
        "lossless (every bit, small on disk only).",
        rich_help_panel=GOAL,
    ),
]
TargetRatio = Annotated[
    float | None,
    typer.Option(help="Fine-tune / delta in memory: the best at this size.", rich_help_panel=GOAL),
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        help="Most divergence from the fine-tune, nats per token: the smallest such. Beside "
        "--preset its limit, beside --target-ratio what decides the exit code.",
        rich_help_panel=GOAL,
    ),
]
Explain = Annotated[
    bool,
    typer.Option(
        "--explain",
        help="Show what every tensor could be stored in, and why.",
        rich_help_panel=GOAL,
    ),
]
Plain = Annotated[
    bool,
    typer.Option(
        "--plain",
        help="No text, no check: round to 2 bits, a few tensors at a time.",
        rich_help_panel=HAND,
    ),
]
Codec = Annotated[
    str | None,
    typer.Option(
        help="int (default), nm24, lowrank, sum (Delta-CoMe's bands), sparse (DARE), nf4, rows; "
        "raw and xor are lossless and apply to every parameter.",
        rich_help_panel=HAND,
    ),
]
Bits = Annotated[
    int | None,
    typer.Option(
        help="1, 2, 3, 4 or 8 bits per value, or per factor's value.", rich_help_panel=HAND
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(help="Values that share a scale; 0 = a whole row.", rich_help_panel=HAND),
]
Planes = Annotated[
    int | None,
    typer.Option(help="int: further planes quantise what is left over.", rich_help_panel=HAND),
]
Rank = Annotated[
    int | None, typer.Option(help="lowrank: rank of the factors.", rich_help_panel=HAND)
]
Keep = Annotated[
    float | None,
    typer.Option(help="sparse: share of values kept, the others dropped.", rich_help_panel=HAND),
]
Asymmetric = Annotated[
    bool,
    typer.Option(
        "--asymmetric", help="int: zero points; exact zeros stay zero.", rich_help_panel=HAND
    ),
]
ScaleAxis = Annotated[
    str | None,
    typer.Option(help="int: group (default), row, column or tensor.", rich_help_panel=HAND),
]
Clip = Annotated[
    str | None,
    typer.Option(help="mse (default) or absmax: how scales are chosen.", rich_help_panel=HAND),
]
EmbeddingCodec = Annotated[
    str | None,
    typer.Option(help="For embedding and head: rows, int, raw, ...", rich_help_panel=HAND),
]
EmbeddingBits = Annotated[
    int | None,
    typer.Option(help="For embedding and head; codec int unless named.", rich_help_panel=HAND),
]
Config = Annotated[
    Path | None,
    typer.Option(
        help="YAML patterns that choose per parameter; the first match wins.",
        rich_help_panel=HAND,
    ),
]
Calibrate = Annotated[
    bool,
    typer.Option(
        "--calibrate",
        help="Fit codes and factors to what the layers read, and check the result.",
        rich_help_panel=HAND,
    ),
]
ActOrder = Annotated[
    bool | None,
    typer.Option(
        help="Decide columns with large inputs first when calibrating (default).",
        rich_help_panel=HAND,
    ),
]
Distil = Annotated[
    int | None,
    typer.Option(
        help="In the end fit the scales to the fine-tune's logits, so many steps (200 is "
        "common); holds the whole model in memory.",
        rich_help_panel=TEXT,
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Calibrate on this JSONL of text or messages; else on the fine-tune's own words.",
        rich_help_panel=TEXT,
    ),
]
Samples = Annotated[int, typer.Option(help="Sequences of calibration text.", rich_help_panel=TEXT)]
SeqLen = Annotated[
    int | None,
    typer.Option(help="Longest of them in tokens; longer ones are cut.", rich_help_panel=TEXT),
]
Seed = Annotated[int, typer.Option(help="Draws the calibration text.", rich_help_panel=TEXT)]
Device = Annotated[
    str, typer.Option(help="Where to calibrate: cpu, cuda, ...", rich_help_panel=TEXT)
]
