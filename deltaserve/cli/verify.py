"""``deltaserve verify``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from deltaserve.cli.progress import progress_bar

MISSED = 1


def run(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The base that the delta was made for.")
    ],
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="Directory of the delta.")],
    model: Annotated[
        str, typer.Option(help="The fine-tune (or LoRA adapter) that the delta was made from.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="JSONL of text or messages; without it the fine-tune's own words."),
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Fail above this mean divergence, nats per token.")
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option(help="Fail below this share of equal top tokens, 0 to 1.")
    ] = None,
    tasks: Annotated[
        Path | None,
        typer.Option(help="JSONL of messages that end with the only right answer: exact matches."),
    ] = None,
    min_tasks: Annotated[
        float | None,
        typer.Option(help="Fail below this share of the fine-tune's exact matches, 0 to 1."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Sequences to compare on.")] = 64,
    seq_len: Annotated[
        int | None, typer.Option(help="Longest sequence in tokens; longer ones are cut.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Greedy continuations to compare.")] = 16,
    continued: Annotated[int, typer.Option(min=1, help="Tokens of each continuation.")] = 64,
    seed: Annotated[int, typer.Option(help="Draws the text; compress draws by 0.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, for machines.")
    ] = False,
) -> int:
    """Compare base + delta with the fine-tune, and write the report into the delta.

    Example: deltaserve verify ./llama ./sql-delta --model ./llama-sql --max-kl 0.01

    Exit code 1 when a threshold is missed. The report stands in the delta's manifest as
    "quality"; the delta's digest, which is that of its weights, stays as it is.
    """
    from deltaserve.cli.tables import print_quality
    from deltaserve.compress.textsource import TextOptions
    from deltaserve.compress.verify import Thresholds, verify

    options = TextOptions(data, samples, seq_len, seed)
    thresholds = Thresholds(max_kl, min_agreement, min_tasks)
    with progress_bar() as progress:
        quality = verify(
            base,
            delta,
            model,
            options,
            thresholds,
            prompts=prompts,
            continued=continued,
            tasks=tasks,
            device=device,
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(quality.to_json(), indent=1))
    else:
        print_quality(quality)
    return 0 if quality.passed else MISSED
