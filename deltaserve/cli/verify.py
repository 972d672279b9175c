"""``deltaserve verify``."""

from __future__ import annotations

import json

import typer

from deltaserve.cli import verify_options as options
from deltaserve.cli.progress import progress_bar

MISSED = 1


def run(
    base: options.Base,
    delta: options.Delta,
    model: options.Model,
    data: options.Data = None,
    max_kl: options.MaxKl = None,
    min_agreement: options.MinAgreement = None,
    tasks: options.Tasks = None,
    min_tasks: options.MinTasks = None,
    samples: options.Samples = 64,
    seq_len: options.SeqLen = None,
    prompts: options.Prompts = 16,
    continued: options.Continued = 64,
    seed: options.Seed = 1,
    device: options.Device = "cpu",
    as_json: options.AsJson = False,
) -> int:
    """Compare base + delta with the fine-tune, and write the report into the delta.

    Example: deltaserve verify ./llama ./sql-delta --model ./llama-sql --max-kl 0.01

    Exit code 1 when a threshold is missed. The report stands in the delta's manifest as
    "quality"; the delta's digest, which is that of its weights, stays as it is.
    """
    from deltaserve.cli.tables import print_quality
    from deltaserve.compress.textsource import TextOptions
    from deltaserve.compress.verify import Thresholds, verify

    text = TextOptions(data, samples, seq_len, seed)
    thresholds = Thresholds(max_kl, min_agreement, min_tasks)
    with progress_bar() as progress:
        quality = verify(
            base,
            delta,
            model,
            text,
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
