"""``deltaserve compress``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaserve.cli import compress_options as options
from deltaserve.cli.progress import progress_bar, stop_on_sigterm

if TYPE_CHECKING:
    from deltaserve.compress.choose import Request
    from deltaserve.compress.goal import Goal
    from deltaserve.compress.plan import Plan
    from deltaserve.compress.run import Target
    from deltaserve.compress.textsource import TextOptions

MISSED = 1


def run(
    base: options.Base,
    model: options.Models,
    out: options.Out,
    preset: options.Preset = None,
    target_ratio: options.TargetRatio = None,
    max_kl: options.MaxKl = None,
    explain: options.Explain = False,
    plain: options.Plain = False,
    codec: options.Codec = None,
    bits: options.Bits = None,
    group_size: options.GroupSize = None,
    planes: options.Planes = None,
    rank: options.Rank = None,
    keep: options.Keep = None,
    asymmetric: options.Asymmetric = False,
    scale_axis: options.ScaleAxis = None,
    clip: options.Clip = None,
    embedding_codec: options.EmbeddingCodec = None,
    embedding_bits: options.EmbeddingBits = None,
    config: options.Config = None,
    calibrate: options.Calibrate = False,
    act_order: options.ActOrder = None,
    distil: options.Distil = None,
    data: options.Data = None,
    samples: options.Samples = 64,
    seq_len: options.SeqLen = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
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
    from deltaserve.compress.goal import Goal
    from deltaserve.compress.textsource import TextOptions

    settings = {"bits": bits, "group_size": group_size, "planes": planes, "rank": rank,
                "keep": keep, "symmetric": False if asymmetric else None,
                "scale_axis": scale_axis, "clip": clip}  # fmt: skip
    hand = _Hand(codec, _given(settings), embedding_codec, _given({"bits": embedding_bits}),
                 config, act_order, calibrate)  # fmt: skip
    wanted = any(each is not None for each in (preset, target_ratio, max_kl))
    _check(wanted, hand, plain=plain, explain=explain)
    towards_goal = wanted or not (hand or plain)
    request = _request(
        Goal(preset, target_ratio, max_kl) if towards_goal else None,
        hand.plan() if hand else None,
        TextOptions(data, samples, seq_len, seed),
        measured=towards_goal or calibrate or (data is not None and not plain),
        device=device,
        distil=distil or 0,
    )
    return _compress(base, _targets(model, out), request, explain=explain)


@dataclass(frozen=True)
class _Hand:
    """What the user chose; false if nothing."""

    codec: str | None
    linear: dict[str, Any]
    embedding_codec: str | None
    vocabulary: dict[str, Any]
    config: Path | None
    act_order: bool | None
    calibrate: bool

    def __bool__(self) -> bool:
        return self.calibrate or self.chosen

    @property
    def chosen(self) -> bool:
        return bool(
            self.codec or self.linear or self.embedding_codec or self.vocabulary or self.config
        )

    def plan(self) -> Plan:
        from deltaserve.compress.gptq import Solver
        from deltaserve.compress.plan import load_rules, make_plan
        from deltaserve.errors import ConfigError

        if self.act_order is not None and not self.calibrate:
            raise ConfigError("--act-order is about calibration: add --calibrate")
        rules = load_rules(self.config) if self.config else ()
        solver = Solver(order=self.act_order is not False)
        return make_plan(
            self.codec, self.linear, self.embedding_codec, self.vocabulary, rules, solver
        )


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


def _check(wanted: bool, hand: _Hand, *, plain: bool, explain: bool) -> None:
    """Raises ConfigError for options that exclude each other."""
    from deltaserve.errors import ConfigError

    if plain and hand:
        raise ConfigError("--plain takes no codec and no calibration; drop it, or those")
    if wanted and (hand or plain):
        raise ConfigError(
            "--preset, --target-ratio and --max-kl choose the codecs themselves; "
            "drop them, or --plain, --calibrate, --codec and its settings"
        )
    if explain and (hand or plain):
        raise ConfigError(
            "--explain shows how --preset, --target-ratio or --max-kl choose; drop it, or --plain, "
            "--calibrate, --codec and its settings"
        )
    if hand.act_order is not None and not hand:
        raise ConfigError("--act-order is about calibration: add --calibrate")


def _request(
    goal: Goal | None, plan: Plan | None, text: TextOptions, *, measured: bool, device: str,
    distil: int,
) -> Request:  # fmt: skip
    """Options that need calibration are refused without it, not ignored."""
    from deltaserve.compress.choose import Request
    from deltaserve.compress.textsource import TextOptions
    from deltaserve.errors import ConfigError

    if distil < 0:
        raise ConfigError(f"--distil must be 1 or more steps, not {distil}")
    if goal is not None and goal.lossless:
        measured = False
    if not measured and (text != TextOptions() or device != "cpu" or distil):
        raise ConfigError(
            "--data, --samples, --seq-len, --seed, --device and --distil are for calibration: add "
            "--calibrate, --preset (not lossless), --target-ratio or --max-kl"
        )
    return Request(plan, goal, text if measured else None, device, distil)


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


def _compress(base: str, targets: list[Target], request: Request, *, explain: bool) -> int:
    from deltaserve.cli.tables import print_candidates, print_summary
    from deltaserve.compress.run import compress_many

    with stop_on_sigterm(), progress_bar() as progress:
        found = compress_many(base, targets, request, progress)
    for chosen, target in zip(found, targets, strict=True):
        if explain and chosen.table is not None:
            print_candidates(chosen)
        print_summary(chosen, Path(target.out))
    reports = [chosen.manifest.quality for chosen in found]
    return 0 if all(quality is None or quality.passed for quality in reports) else MISSED
