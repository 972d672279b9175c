"""Compressing towards a goal: measure, allocate, compress, check, and spend more if needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from deltaserve.artifact.checkpoint import Checkpoint, locate
from deltaserve.artifact.codecs import get_codec
from deltaserve.artifact.manifest import Manifest
from deltaserve.artifact.reader import Delta
from deltaserve.artifact.staging import require_free
from deltaserve.artifact.writer import record_quality
from deltaserve.compress.allocate import Candidate, Table, allocate, largest, smallest
from deltaserve.compress.calibrate import calibration_text
from deltaserve.compress.candidates import measure_candidates
from deltaserve.compress.change import compare
from deltaserve.compress.common import PathLike, Progress, silent
from deltaserve.compress.compat import check_compatible
from deltaserve.compress.goal import Goal
from deltaserve.compress.layers import ARCHITECTURES
from deltaserve.compress.lora import Adapter
from deltaserve.compress.models import load_fine_tune, load_with_delta
from deltaserve.compress.plan import Plan, Rule, make_plan
from deltaserve.compress.run import compress
from deltaserve.compress.text import Text
from deltaserve.compress.textsource import TextOptions
from deltaserve.compress.verify import Thresholds, measure
from deltaserve.errors import ConfigError

# Every fourth sequence is kept for the check.
HELD_OUT = 4
ESCALATION = 1.5
PROMPTS, CONTINUED = 8, 32


@dataclass(frozen=True)
class Chosen:
    """What came out. table: None where no candidates were compared; ``note`` may say why."""

    manifest: Manifest
    table: Table | None = None
    picks: Mapping[str, Candidate] = field(default_factory=dict)
    note: str = ""


class _MissedError(Exception):
    """This attempt diverges too much; the next may be larger."""


def compress_to(
    base: PathLike,
    model: PathLike,
    out: PathLike,
    goal: Goal,
    options: TextOptions | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Chosen:
    """Like ``compress``, with codecs chosen per tensor and the result checked on held-out text.

    The manifest's quality tells whether the goal was met. A model that cannot be
    calibrated is rounded plainly, and ``note`` says so. Raises what ``compress`` raises,
    and ConfigError for a ratio that no choice reaches.
    """
    require_free(Path(out))
    path, _ = locate(model)
    if goal.lossless and not Adapter.is_adapter(path):
        return Chosen(compress(base, model, out, make_plan("xor"), progress))
    if Adapter.is_adapter(path):
        return Chosen(compress(base, model, out, None, progress), note="adapters are kept exactly")
    origin, tuned = Checkpoint.open(base), Checkpoint.open(model)
    if tuned.architecture not in ARCHITECTURES:
        note = f"{tuned.architecture} cannot be calibrated: rounded plainly to 2 bits, not checked"
        return Chosen(compress(base, model, out, None, progress), note=note)
    names = check_compatible(origin, tuned)
    fit, held = calibration_text(origin, tuned, options or TextOptions(), device).split(HELD_OUT)
    table = measure_candidates(names, origin, tuned, fit, device)
    budget = _budget(goal, table, names, origin, tuned)
    while True:
        picks = allocate(table, budget)
        largest_yet = goal.target_ratio is not None or budget >= largest(table)
        checked = _Check(origin, tuned, held, goal, device, progress, last=largest_yet)
        try:
            manifest = compress(
                base,
                model,
                out,
                _plan(picks),
                progress,
                calibration=fit,
                device=device,
                check=checked,
            )
        except _MissedError:
            budget = min(int(budget * ESCALATION), largest(table))
            continue
        return Chosen(manifest, table, picks)


@dataclass(frozen=True)
class _Check:
    """Measures a finished delta on held-out text and refuses it unless it is good or ``last``."""

    base: Checkpoint
    model: Checkpoint
    held: Text
    goal: Goal
    device: str
    progress: Progress
    last: bool

    def __call__(self, directory: Path, manifest: Manifest) -> Manifest:
        quality = measure(
            load_fine_tune(self.base, self.model, self.device),
            load_with_delta(self.base, Delta.open(directory), self.device),
            self.held,
            manifest.digest,
            Thresholds(max_kl=self.goal.limit),
            prompts=PROMPTS,
            continued=CONTINUED,
            progress=self.progress,
        )
        if not quality.passed and not self.last:
            raise _MissedError
        return record_quality(directory, manifest, quality)


def _plan(picks: dict[str, Candidate]) -> Plan:
    """One rule per tensor; the defaults for what was not measured."""
    rules = tuple(Rule(name, candidate.choice) for name, candidate in picks.items())
    return replace(make_plan(), rules=rules)


def _budget(goal: Goal, table: Table, names: list[str], base: Checkpoint, model: Checkpoint) -> int:
    """Bytes for the tensors of the table."""
    values = sum(model.tensor(name).numel() for name in table)
    if goal.target_ratio is None:
        return max(int(values * goal.start.bits / 8), smallest(table))
    rest = [name for name in names if name not in table]
    fixed = _resident(rest, base, model, make_plan())
    budget = int(model.num_bytes / goal.target_ratio) - fixed
    if budget < smallest(table):
        best = model.num_bytes / (fixed + smallest(table))
        raise ConfigError(
            f"--target-ratio {goal.target_ratio:g} cannot be reached: the smallest delta of this "
            f"fine-tune is {best:.1f} times smaller than it"
        )
    return budget


def _resident(names: list[str], base: Checkpoint, model: Checkpoint, plan: Plan) -> int:
    encs = (compare(name, base, model, plan).enc for name in names)
    return sum(get_codec(enc.codec).resident_bytes(enc) for enc in encs if enc is not None)
