"""The options of ``deltaserve verify``, in the order of its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Base = Annotated[str, typer.Argument(metavar="BASE", help="The base that the delta was made for.")]
Delta = Annotated[Path, typer.Argument(metavar="DELTA", help="Directory of the delta.")]
Model = Annotated[
    str, typer.Option(help="The fine-tune (or LoRA adapter) that the delta was made from.")
]
Data = Annotated[
    Path | None,
    typer.Option(help="JSONL of text or messages; without it the fine-tune's own words."),
]
MaxKl = Annotated[
    float | None, typer.Option(help="Fail above this mean divergence, nats per token.")
]
MinAgreement = Annotated[
    float | None, typer.Option(help="Fail below this share of equal top tokens, 0 to 1.")
]
Tasks = Annotated[
    Path | None,
    typer.Option(help="JSONL of messages that end with the only right answer: exact matches."),
]
MinTasks = Annotated[
    float | None,
    typer.Option(help="Fail below this share of the fine-tune's exact matches, 0 to 1."),
]
Samples = Annotated[int, typer.Option(help="Sequences to compare on.")]
SeqLen = Annotated[
    int | None, typer.Option(help="Longest sequence in tokens; longer ones are cut.")
]
Prompts = Annotated[int, typer.Option(min=1, help="Greedy continuations to compare.")]
Continued = Annotated[int, typer.Option(min=1, help="Tokens of each continuation.")]
Seed = Annotated[int, typer.Option(help="Draws the text; compress draws by 0.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON, for machines.")]
