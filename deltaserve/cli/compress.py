"""``deltaserve compress``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deltaserve.cli.progress import progress_bar, stop_on_sigterm

MISSED = 1
ARGUMENT_BASE = typer.Argument(metavar="BASE", help="Directory or hub id of the base model.")
ARGUMENT_MODEL = typer.Argument(
    metavar="MODEL", help="Directory or hub id of the fine-tune, or a PEFT LoRA adapter."
)


def run(
    base: Annotated[str, ARGUMENT_BASE],
    model: Annotated[str, ARGUMENT_MODEL],
    out: Annotated[Path, typer.Option("--out", "-o", help="New directory for the delta.")],
    preset: Annotated[
        str | None,
        typer.Option(help="lossless, quality, balanced or small: codecs by measured effect."),
    ] = None,
    target_ratio: Annotated[
        float | None, typer.Option(help="Fine-tune / delta in memory: the best at this size.")
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(help="Most divergence from the fine-tune, nats per token: the smallest such."),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show what every tensor could be stored in, and why.")
    ] = False,
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
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="int, nm24: fit the codes to what the layers read."),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Calibrate on this JSONL of text or messages; else on the fine-tune's own words."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Sequences of calibration text.")] = 64,
    seq_len: Annotated[
        int | None, typer.Option(help="Longest of them in tokens; longer ones are cut.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the calibration text.")] = 0,
    device: Annotated[str, typer.Option(help="Where to calibrate: cpu, cuda, ...")] = "cpu",
    config: Annotated[
        Path | None,
        typer.Option(help="YAML patterns that choose per parameter; the first match wins."),
    ] = None,
) -> int:
    """Compress a fine-tune of a base model into a delta.

    Example: deltaserve compress ./llama ./llama-sql -o ./sql-delta

    Without options, linear layers are rounded to 2 bits, embeddings are stored as their
    changed rows or in 4 bits, norms and biases as they are, a LoRA adapter exactly; what
    did not change costs nothing. This reads a few tensors at a time.

    With --preset, --target-ratio or --max-kl every linear layer gets the bits that its
    effect on the model asks for, measured on text; the result is compared with the
    fine-tune on text that was held out, and made larger if it diverges. Exit code 1 if it
    still does. This runs the fine-tune, and holds two models in memory for the comparison.

    Then: deltaserve serve ./llama --delta sql=./sql-delta
    """
    from deltaserve.cli.tables import print_candidates, print_summary
    from deltaserve.compress.choose import Chosen, compress_to
    from deltaserve.compress.goal import Goal
    from deltaserve.compress.plan import load_rules, make_plan
    from deltaserve.compress.run import compress
    from deltaserve.compress.textsource import TextOptions
    from deltaserve.errors import ConfigError

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
    by_hand = bool(codec or linear or embedding_codec or vocabulary or config or calibrate)
    goal, options = Goal(preset, target_ratio, max_kl), TextOptions(data, samples, seq_len, seed)
    towards_goal = goal != Goal()
    if explain and not towards_goal:
        raise ConfigError(
            "--explain shows how --preset, --target-ratio or --max-kl choose: add one"
        )
    if by_hand and towards_goal:
        raise ConfigError(
            "--preset, --target-ratio and --max-kl choose the codecs themselves; "
            "drop them, or --codec and its settings"
        )
    measured = towards_goal or calibrate or data is not None
    if not measured and (options != TextOptions() or device != "cpu"):
        raise ConfigError(
            "--samples, --seq-len, --seed and --device are for calibration: add --calibrate, "
            "--preset, --target-ratio or --max-kl"
        )
    with stop_on_sigterm(), progress_bar() as progress:
        if towards_goal:
            chosen = compress_to(base, model, out, goal, options, device, progress)
        else:
            rules = load_rules(config) if config else ()
            # None where nothing was asked for: an adapter takes no plan.
            plan = make_plan(codec, linear, embedding_codec, vocabulary, rules) if by_hand else None
            text = options if calibrate or data else None
            chosen = Chosen(
                compress(base, model, out, plan, progress, calibration=text, device=device)
            )
    if explain and chosen.table is not None:
        print_candidates(chosen)
    print_summary(chosen, out)
    quality = chosen.manifest.quality
    return 0 if quality is None or quality.passed else MISSED
