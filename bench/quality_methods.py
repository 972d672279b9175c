"""What is compared: published recipes re-implemented at their own settings, and ours.

Recipes use our codecs and solver with the settings of their papers and code. DeltaZip: 2 of 4
values kept, one scale per row over the whole range, no refit of scales, columns in order,
embedding and head dense. BitDelta: sign and one scale per matrix, distilled for 200 steps.
Per-axis: a scale per row or per column, by the smaller error, distilled. Delta-CoMe: bands of
singular vectors at 8, 3 and 2 bits, one bit per value in all. DARE: a tenth of the values kept
at random and scaled up. Changed norms and biases are stored in every method; DeltaZip's own
server drops them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.compress.choose import Request
from deltaserve.compress.classify import classify
from deltaserve.compress.goal import Goal
from deltaserve.compress.gptq import Solver
from deltaserve.compress.plan import CodecChoice, Plan, Rule, make_plan
from deltaserve.compress.textsource import TextOptions

DISTIL = 200


# Base, fine-tune, calibration text -> what is asked of the compressor.
Ask = Callable[[Path, Path, TextOptions], Request]


@dataclass(frozen=True)
class Method:
    """ours: one of this project's presets or targets, whose candidates are measured once."""

    name: str
    ask: Ask
    ours: bool = False


def _plain(name: str, plan: Plan) -> Method:
    return Method(name, lambda base, model, text: Request(plan=plan))


def _fitted(name: str, plan: Plan, distil: int = 0) -> Method:
    return Method(name, lambda base, model, text: Request(plan=plan, options=text, distil=distil))


def _ours(name: str, goal: Goal, distil: int = 0) -> Method:
    return Method(
        name, lambda base, model, text: Request(goal=goal, options=text, distil=distil), ours=True
    )


def _deltazip(bits: int) -> Method:
    settings = {"bits": bits, "group_size": 0, "clip": "absmax"}
    solver = Solver(rounds=1, order=False, refit=False)
    plan = make_plan("nm24", settings, vocabulary_codec="raw", solver=solver)
    return _fitted(f"DeltaZip {bits}-bit 2:4", plan)


def _per_axis(base: Path, model: Path, text: TextOptions) -> Request:
    """A scale per row or per column of each matrix, by the smaller error of plain rounding."""
    origin, tuned = Checkpoint.open(base), Checkpoint.open(model)
    rules = []
    for name in tuned.names():
        if classify(name, tuned.shape(name)) == "linear":
            delta = tuned.tensor(name).float() - origin.tensor(name).float()
            errors = {
                axis: float((delta.abs() - delta.abs().mean(dim, keepdim=True)).square().sum())
                for axis, dim in (("row", 1), ("column", 0))
            }
            settings = {"bits": 1, "scale_axis": min(errors, key=errors.__getitem__)}
            rules.append(Rule(name, CodecChoice("int", settings)))
    plan = replace(_one_bit("row"), rules=tuple(rules))
    return Request(plan=plan, options=text, distil=DISTIL)


def _one_bit(axis: str) -> Plan:
    """BitDelta's signs are those of the delta itself: nothing is calibrated."""
    settings = {"bits": 1, "scale_axis": axis}
    return make_plan("int", settings, vocabulary_codec="raw", solver=Solver(rounds=0, refit=False))


PUBLISHED: tuple[Method, ...] = (
    _deltazip(4),
    _deltazip(2),
    _plain("BitDelta, not distilled", _one_bit("tensor")),
    _fitted("BitDelta", _one_bit("tensor"), DISTIL),
    Method("per-axis 1-bit", _per_axis),
    _fitted("Delta-CoMe, 1 bit", make_plan("sum", vocabulary_codec="raw")),
    _plain("DARE, 10 % kept", make_plan("sparse", {"keep": 0.1}, vocabulary_codec="raw")),
    _plain("rounding, 2-bit g64", make_plan("int", {"bits": 2})),
    _plain("rounding, 1-bit g64", make_plan("int", {"bits": 1})),
)
OURS: tuple[Method, ...] = (
    _ours("preset balanced", Goal("balanced")),
    _ours("preset quality", Goal("quality")),
    _ours("preset small", Goal("small")),
    _ours("target ratio 16", Goal(target_ratio=16.0)),
    _ours("target ratio 16, distilled", Goal(target_ratio=16.0), DISTIL),
)


def no_larger(rival: str, model: Path, bytes_: int) -> Method:
    """Ours at no more bytes in memory than a rival took."""
    return _ours(
        f"ours, as small as {rival}", Goal(target_ratio=Checkpoint.open(model).num_bytes / bytes_)
    )
