"""What a run of the demo found: numbers for the table, for results.json, and a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from deltaserve.artifact.manifest import Manifest, TensorEntry
from deltaserve.bench.record import environment
from deltaserve.demo.family import BASE, Family, FineTune
from deltaserve.demo.questions import EngineWork, Session

LEAST_KEPT = 0.97
LEAST_RATIO = 6.0


@dataclass(frozen=True)
class ModelRow:
    """One fine-tune. Scores are exact match on the same held-out prompts, 0 to 1.

    full_bytes: all that the fine-tune stores; for a LoRA adapter, the dense model
    that it stands for.  base_score and served_score come from HTTP responses,
    fine_tune_score from transformers.  tokens_per_second: of all that was served at
    once, this model's share.
    """

    name: str
    task: str
    kind: str
    codecs: tuple[str, ...]
    full_bytes: int
    resident_bytes: int
    disk_bytes: int
    resident_ratio: float
    disk_ratio: float
    base_score: float
    fine_tune_score: float
    served_score: float
    kept: float
    prompts: int
    completion_tokens: int
    tokens_per_second: float


@dataclass(frozen=True)
class Throughput:
    """What was served in one go: a model, or everything."""

    prompts: int
    completion_tokens: int
    tokens_per_second: float


@dataclass(frozen=True)
class Results:
    """One run. phase_seconds: of this run; training_seconds: when each model was trained."""

    environment: dict[str, Any]
    directory: str
    seed: int
    models: tuple[ModelRow, ...]
    base: Throughput
    total: Throughput
    serving_seconds: float
    engine: EngineWork
    phase_seconds: dict[str, float]
    training_seconds: dict[str, float]

    def failures(self) -> list[str]:
        """What the demo promises and this run did not keep, one sentence each."""
        return [failure for row in self.models for failure in _failures(row)]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"failures": self.failures()}


def assemble(
    family: Family,
    seed: int,
    manifests: Mapping[str, Manifest],
    session: Session,
    phase_seconds: Mapping[str, float],
    training_seconds: Mapping[str, float],
) -> Results:
    """Bring together what was built, compressed and answered."""
    total = sum(answer.completion_tokens for answer in session.answers)
    return Results(
        environment=environment() | {name: version(name) for name in ("deltaserve", "openai")},
        directory=str(family.root),
        seed=seed,
        models=tuple(model_row(m, manifests[m.name], session) for m in family.members),
        base=_throughput(session, BASE),
        total=Throughput(len(session.answers), total, total / session.seconds),
        serving_seconds=session.seconds,
        engine=session.engine,
        phase_seconds=dict(phase_seconds),
        training_seconds=dict(training_seconds),
    )


def model_row(member: FineTune, manifest: Manifest, session: Session) -> ModelRow:
    served = session.score(member.name, member.task)
    sizes, throughput = manifest.sizes, _throughput(session, member.name)
    return ModelRow(
        name=member.name,
        task=member.task,
        kind=member.kind,
        codecs=codec_names(manifest),
        full_bytes=sizes.full.total,
        resident_bytes=sizes.resident.total,
        disk_bytes=sizes.disk.total,
        resident_ratio=sizes.resident_ratio,
        disk_ratio=sizes.disk_ratio,
        base_score=session.score(BASE, member.task),
        fine_tune_score=member.score,
        served_score=served,
        # A fine-tune that learnt nothing has nothing to keep: that is no success.
        kept=served / member.score if member.score else 0.0,
        prompts=throughput.prompts,
        completion_tokens=throughput.completion_tokens,
        tokens_per_second=throughput.tokens_per_second,
    )


def codec_names(manifest: Manifest) -> tuple[str, ...]:
    """Codecs with their width or rank, the one that holds most bytes first."""
    held: dict[str, int] = {}
    for entry in manifest.tensors.values():
        name = _codec_name(entry)
        held[name] = held.get(name, 0) + entry.resident_bytes
    return tuple(sorted(held, key=lambda name: -held[name]))


def _throughput(session: Session, model: str) -> Throughput:
    tokens = session.completion_tokens(model)
    return Throughput(session.prompts(model), tokens, tokens / session.seconds)


def _failures(row: ModelRow) -> list[str]:
    found = []
    if row.kept < LEAST_KEPT:
        found.append(
            f"{row.name} keeps {row.kept:.1%} of its fine-tune's score, less than {LEAST_KEPT:.0%}"
        )
    if row.resident_ratio < LEAST_RATIO:
        found.append(
            f"{row.name} is {row.resident_ratio:.2f}x smaller in memory, less than {LEAST_RATIO:g}x"
        )
    return found


def _codec_name(entry: TensorEntry) -> str:
    if entry.params.get("bits"):
        return f"{entry.codec} {entry.params['bits']}-bit"
    if "rank" in entry.params:
        return f"{entry.codec} r{entry.params['rank']}"
    return entry.codec
