"""Compressing with text: measure, allocate, compress, check, and spend more if that fails."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from deltaserve import __version__
from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.artifact.codecs import get_codec
from deltaserve.artifact.manifest import Manifest
from deltaserve.artifact.quality import Quality
from deltaserve.compress.allocate import Candidate, Table, allocate, largest, predicted, smallest
from deltaserve.compress.calibrate import Changes, Pair, calibrated_changes
from deltaserve.compress.candidates import measure_candidates
from deltaserve.compress.change import check_finite, compare
from deltaserve.compress.common import Progress
from deltaserve.compress.goal import Goal
from deltaserve.compress.models import check_tokenizers, load_fine_tune, load_tokenizer
from deltaserve.compress.plan import Plan, Rule, make_plan
from deltaserve.compress.sampling import continued_greedily
from deltaserve.compress.store import Destination, Origin, store
from deltaserve.compress.text import FileRef, Sample, Text
from deltaserve.compress.textsource import TextOptions, check_tokens, gather_text
from deltaserve.compress.verify import Question, Thresholds, examine
from deltaserve.compress.weights import of_changes, of_model
from deltaserve.compress.work import Work
from deltaserve.errors import ConfigError

# One sequence is kept for the check to every four that are calibrated on.
HELD_OUT = 5
PROMPTS, CONTINUED = 8, 32
# A failed attempt is followed by one that is predicted to diverge by this share of the limit,
# and that has at least this many times the bytes.
AIM, GROWTH = 0.7, 1.1


@dataclass(frozen=True)
class Request:
    """How to compress: by a plan, or towards a goal. options: the text, None for none at all.
    distil: steps of scale distillation. table: candidates that an earlier run measured."""

    plan: Plan | None = None
    goal: Goal | None = None
    options: TextOptions | None = None
    device: str = "cpu"
    distil: int = 0
    table: Table | None = None

    def to_json(self) -> dict[str, Any]:
        """All that the result depends on, the text's content included."""
        values = asdict(self)
        if self.options is not None:
            data = self.options.data
            values["options"]["data"] = (
                None if data is None or not data.is_file()
                else hashlib.sha256(data.read_bytes()).hexdigest()
            )  # fmt: skip
        return values


@dataclass(frozen=True)
class Chosen:
    """What came out. table: None where no candidates were compared; ``note`` may say why."""

    manifest: Manifest
    table: Table | None = None
    picks: Mapping[str, Candidate] = field(default_factory=dict)
    note: str = ""

    @property
    def exact(self) -> bool:
        """Whether base + delta is the fine-tune, bit for bit; an adapter is as good as that."""
        every = self.manifest.tensors.values()
        return self.manifest.source.kind == "lora" or all(entry.error == 0 for entry in every)


@dataclass(frozen=True)
class _Attempt:
    changes: Changes
    report: Callable[[str, Thresholds], Quality]


def calibrated(
    origin: Origin,
    tuned: Checkpoint,
    digest: str,
    names: list[str],
    to: Destination,
    request: Request,
    report: Progress,
) -> Generator[None, None, Chosen]:
    """Compress a full fine-tune with text; a killed run is taken up where it stopped."""
    base, goal = origin.checkpoint, request.goal
    plan = request.plan or make_plan()
    plan.check_rules(names)
    job = {"version": __version__, "base": origin.digest, "model": digest, **request.to_json()}
    with Work(to.out, job) as work:
        fit, asked = _texts(work, base, tuned, request)
        pair = Pair(base, tuned, names, fit, request.device, work, report)
        table: Table | None = None
        picks: dict[str, Candidate] = {}
        budget = 0
        if goal is not None:
            table = request.table or (yield from measure_candidates(pair, fit.seed))
            budget = _budget(goal, table, pair)
        for number in range(1_000_000):
            if table is not None:
                picks = allocate(table, budget)
                plan = replace(plan, rules=(*plan.rules, *_rules(picks)))
            attempt = yield from _attempt(pair, plan, asked, request, f"attempt-{number}")
            limits = Thresholds(max_kl=goal.limit if goal else None)
            quality = attempt.report(digest, limits)
            if table is None or quality.passed or goal is None or goal.target_ratio is not None:
                break
            if budget >= largest(table):
                break
            budget = _more(table, budget, quality.kl_mean, goal.limit or 0.0)
            plan = request.plan or make_plan()
            work.forget(f"attempt-{number}")
        manifest = yield from store(
            origin, tuned, digest, attempt.changes(), to, report, fit,
            lambda made: attempt.report(made, limits),
        )  # fmt: skip
        return Chosen(manifest, table, picks)


def _attempt(
    pair: Pair, plan: Plan, asked: Question, request: Request, stage: str
) -> Generator[None, None, _Attempt]:
    """Encode everything by the plan, and compare the result with the fine-tune."""
    changes = yield from calibrated_changes(pair, plan, stage)
    if request.distil:
        from deltaserve.compress.distill import distilled  # needs the whole model

        changes = distilled(pair, changes, stage, request.distil)
    theirs = of_changes(pair.base, changes())
    mine = of_model(pair.base, pair.model)
    folder = pair.work.folder(f"{stage}/judge")
    pair.work.forget(f"{stage}/judge")  # half of an earlier comparison is of no use
    report = examine(pair.base, mine, theirs, asked, folder, pair.device, pair.report)
    pair.work.forget(f"{stage}/judge")
    return _Attempt(changes, report)


def _texts(
    work: Work, base: Checkpoint, tuned: Checkpoint, request: Request
) -> tuple[Text, Question]:
    """What is calibrated on, and what the result is checked on; written once."""
    options = request.options
    assert options is not None
    if (known := work.get("text.json")) is None:
        known = _write_texts(base, tuned, options, request.device)
        work.put("text.json", known)
    file = FileRef(*known["file"]) if known["file"] else None
    fit, held = (
        Text(_samples(known[part]), known["source"], options.seed, file) for part in ("fit", "held")
    )
    return fit, Question(held, _samples(known["continued"]), CONTINUED)


def _samples(rows: list[Any]) -> tuple[Sample, ...]:
    return tuple(Sample(tuple(tokens), prompt) for tokens, prompt in rows)


def _write_texts(
    base: Checkpoint, tuned: Checkpoint, options: TextOptions, device: str
) -> dict[str, Any]:
    """Raises ConfigError for a bad file, CompatibilityError for tokenizers that disagree."""
    check_tokenizers(base.path, tuned.path)
    check_finite(base, tuned)
    config = tuned.hf_config.get_text_config()
    context = int(config.max_position_embeddings)
    loaded: list[Any] = []

    def writer() -> Any:
        if not loaded:
            loaded.append(load_fine_tune(base, tuned, device))
        return loaded[0]

    more = replace(options, samples=options.samples + max(1, options.samples // (HELD_OUT - 1)))
    text = gather_text(more, load_tokenizer(tuned.path, base.path), context, writer)
    check_tokens(text.samples, int(config.vocab_size))
    fit, held = text.split(HELD_OUT)
    fit = replace(fit, samples=fit.samples[: options.samples])
    continued = continued_greedily(writer(), held.samples[:PROMPTS], CONTINUED, context)

    def rows(samples: tuple[Sample, ...]) -> list[Any]:
        return [[list(s.tokens), s.prompt] for s in samples]

    parts = {"fit": rows(fit.samples), "held": rows(held.samples), "continued": rows(continued)}
    file = None if text.file is None else [text.file.digest, text.file.size]
    return {"source": text.source, "file": file, **parts}


def _rules(picks: dict[str, Candidate]) -> tuple[Rule, ...]:
    """One per tensor; the defaults serve for what was not measured."""
    return tuple(Rule(name, candidate.choice) for name, candidate in picks.items())


def _budget(goal: Goal, table: Table, pair: Pair) -> int:
    """Bytes for the tensors of the table."""
    rest = [name for name in pair.names if name not in table]
    fixed = _resident(rest, pair.base, pair.model, make_plan())
    ratio = goal.target_ratio or goal.start.ratio
    budget = int(pair.model.num_bytes / ratio) - fixed
    if goal.target_ratio is not None and budget < smallest(table):
        best = pair.model.num_bytes / max(1, fixed + smallest(table))
        raise ConfigError(
            f"--target-ratio {goal.target_ratio:g} cannot be reached: the smallest delta of this "
            f"fine-tune is {best:.1f} times smaller than it"
        )
    budget = max(budget, smallest(table))
    if goal.smallest and goal.limit is not None:
        return _predicting(table, smallest(table), goal.limit * AIM)
    return budget


def _more(table: Table, budget: int, found: float, limit: float) -> int:
    """Bytes for another attempt, by how far the prediction was off for this one."""
    wanted = predicted(allocate(table, budget)) * AIM * limit / found
    return min(_predicting(table, int(budget * GROWTH), wanted), largest(table))


def _predicting(table: Table, least: int, error: float) -> int:
    """The least budget, from ``least`` on, that is predicted to diverge by no more."""
    low, high = least, max(least, largest(table))
    while high - low > max(64, high // 1000):
        middle = (low + high) // 2
        if predicted(allocate(table, middle)) <= error:
            high = middle
        else:
            low = middle
    return least if predicted(allocate(table, least)) <= error else high


def _resident(names: list[str], base: Checkpoint, model: Checkpoint, plan: Plan) -> int:
    encs = (compare(name, base, model, plan).enc for name in names)
    return sum(get_codec(enc.codec).resident_bytes(enc) for enc in encs if enc is not None)
