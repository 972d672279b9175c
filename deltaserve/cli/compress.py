"""``deltaserve compress``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaserve.cli.progress import progress_bar, stop_on_sigterm

if TYPE_CHECKING:
    from deltaserve.compress.choose import Request
    from deltaserve.compress.goal import Goal
    from deltaserve.compress.plan import Plan
    from deltaserve.compress.run import Target
    from deltaserve.compress.textsource import TextOptions

MISSED = 1
ARGUMENT_BASE = typer.Argument(metavar="BASE", help="Directory or hub id of the base model.")
ARGUMENT_MODEL = typer.Argument(
    metavar="MODEL...", help="Directories or hub ids of fine-tunes, or PEFT LoRA adapters."
)


def run(
    base: Annotated[str, ARGUMENT_BASE],
    model: Annotated[list[str], ARGUMENT_MODEL],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="New directory for the delta; for several models, of them all."
        ),
    ],
    preset: Annotated[
        str | None,
        typer.Option(help="lossless, quality, balanced (default) or small."),
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
    plain: Annotated[
        bool,
        typer.Option(
            "--plain", help="No text, no check: round to 2 bits, a few tensors at a time."
        ),
    ] = False,
    codec: Annotated[
        str | None,
        typer.Option(
            help="For linear layers: int (default), nm24, lowrank, sparse, nf4, rows; "
            "raw and xor are lossless and apply to every parameter."
        ),
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="1, 2, 3, 4 or 8 bits per value, or per factor's value.")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Values that share a scale; 0 = a whole row.")
    ] = None,
    planes: Annotated[
        int | None, typer.Option(help="int: further planes quantise what is left over.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="lowrank: rank of the factors.")] = None,
    keep: Annotated[
        float | None, typer.Option(help="sparse: share of values kept, the others dropped.")
    ] = None,
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
        typer.Option("--calibrate", help="Fit codes and factors to what the layers read."),
    ] = False,
    act_order: Annotated[
        bool | None,
        typer.Option(help="Decide columns with large inputs first when calibrating (default)."),
    ] = None,
    distil: Annotated[
        int | None,
        typer.Option(
            help="Then fit the scales to the fine-tune's logits, so many steps; "
            "holds the whole model in memory."
        ),
    ] = None,
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
    """Compress fine-tunes of a base model into deltas.

    Example: deltaserve compress ./llama ./llama-sql -o ./sql-delta

    Every changed matrix gets the codec and bits that its effect on the output asks for,
    measured on text; the result is compared with the fine-tune on text that was held out, and
    made larger if it diverges. Exit code 1 if it still does. Models are read layer by layer; a
    run that was killed is taken up where it stopped by the same command. A LoRA adapter is
    stored exactly.

    Of your own choice with --codec and its settings, calibrated with --calibrate. With --plain
    linear layers are rounded to 2 bits and nothing is measured.

    Then: deltaserve serve ./llama --delta sql=./sql-delta
    """
    from deltaserve.cli.tables import print_candidates, print_summary
    from deltaserve.compress.goal import Goal
    from deltaserve.compress.run import compress_many
    from deltaserve.compress.textsource import TextOptions
    from deltaserve.errors import ConfigError

    settings = {
        "bits": bits,
        "group_size": group_size,
        "planes": planes,
        "rank": rank,
        "keep": keep,
        "symmetric": False if asymmetric else None,
        "scale_axis": scale_axis,
        "clip": clip,
    }
    linear: dict[str, Any] = {key: value for key, value in settings.items() if value is not None}
    vocabulary = {} if embedding_bits is None else {"bits": embedding_bits}
    by_hand = bool(codec or linear or embedding_codec or vocabulary or config)
    wanted = preset is not None or target_ratio is not None or max_kl is not None
    towards_goal = wanted or not (by_hand or calibrate or plain)
    if plain and (by_hand or calibrate):
        raise ConfigError("--plain takes no codec and no calibration; drop it, or those")
    if explain and not towards_goal:
        raise ConfigError(
            "--explain shows how --preset, --target-ratio or --max-kl choose: add one"
        )
    if wanted and (by_hand or calibrate or plain):
        raise ConfigError(
            "--preset, --target-ratio and --max-kl choose the codecs themselves; "
            "drop them, or --plain, --calibrate, --codec and its settings"
        )
    request = _request(
        Goal(preset, target_ratio, max_kl) if towards_goal else None,
        plan=_plan(codec, linear, embedding_codec, vocabulary, config, act_order, calibrate)
        if by_hand or calibrate
        else None,
        options=TextOptions(data, samples, seq_len, seed),
        measured=towards_goal or calibrate or data is not None,
        device=device,
        distil=distil or 0,
    )
    targets = _targets(model, out)
    with stop_on_sigterm(), progress_bar() as progress:
        found = compress_many(base, targets, request, progress)
    for chosen, target in zip(found, targets, strict=True):
        if explain and chosen.table is not None:
            print_candidates(chosen)
        print_summary(chosen, Path(target.out))
    reports = [chosen.manifest.quality for chosen in found]
    return 0 if all(quality is None or quality.passed for quality in reports) else MISSED


def _request(
    goal: Goal | None, plan: Plan | None, options: TextOptions, *, measured: bool, device: str,
    distil: int,
) -> Request:  # fmt: skip
    """Options that need calibration are refused without it, not ignored."""
    from deltaserve.compress.choose import Request
    from deltaserve.compress.textsource import TextOptions
    from deltaserve.errors import ConfigError

    if distil < 0:
        raise ConfigError(f"--distil must be 1 or more steps, not {distil}")
    if not measured and (options != TextOptions() or device != "cpu" or distil):
        raise ConfigError(
            "--samples, --seq-len, --seed, --device and --distil are for calibration: add "
            "--calibrate, --preset, --target-ratio or --max-kl"
        )
    return Request(plan, goal, options if measured else None, device, distil)


def _plan(
    codec: str | None,
    linear: dict[str, Any],
    embedding_codec: str | None,
    vocabulary: dict[str, Any],
    config: Path | None,
    act_order: bool | None,
    calibrate: bool,
) -> Plan:
    from deltaserve.compress.gptq import Solver
    from deltaserve.compress.plan import load_rules, make_plan
    from deltaserve.errors import ConfigError

    if act_order is not None and not calibrate:
        raise ConfigError("--act-order is about calibration: add --calibrate")
    rules = load_rules(config) if config else ()
    solver = Solver(order=act_order is not False)
    return make_plan(codec, linear, embedding_codec, vocabulary, rules, solver)


def _targets(models: list[str], out: Path) -> list[Target]:
    """One model goes to ``out`` itself, several to folders of their names in it."""
    from deltaserve.compress.run import Target
    from deltaserve.errors import ConfigError

    if len(models) == 1:
        return [Target(models[0], out)]
    names = [Path(model).name for model in models]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"two models are called {twice[0]}, and their deltas would be; compress one at a time"
        )
    return [Target(model, out / name) for model, name in zip(models, names, strict=True)]
