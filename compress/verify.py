"""Is base + delta as good as the fine-tune? Measure it, and hold it against thresholds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaserve.artifact.checkpoint import Checkpoint, locate
from deltaserve.artifact.digest import checkpoint_digest
from deltaserve.artifact.quality import Quality
from deltaserve.artifact.reader import Delta
from deltaserve.artifact.writer import record_quality
from deltaserve.compress.common import PathLike, Progress, check_device, silent
from deltaserve.compress.compare import Tokens
from deltaserve.compress.jsonl import read_tasks
from deltaserve.compress.judge import Read, judge, matches, parting, percentile, perplexity
from deltaserve.compress.lora import Adapter
from deltaserve.compress.models import check_tokenizers, load_fine_tune, load_tokenizer
from deltaserve.compress.sampling import continued_greedily
from deltaserve.compress.text import Sample, Text
from deltaserve.compress.textsource import TextOptions, check_tokens, gather_text
from deltaserve.compress.weights import Source, of_delta, of_model
from deltaserve.errors import ArtifactError, ConfigError


@dataclass(frozen=True)
class Thresholds:
    """max_kl: of the mean divergence, nats per token; min_agreement: share 0 to 1;
    min_tasks: share of exact matches of the fine-tune that base + delta must keep."""

    max_kl: float | None = None
    min_agreement: float | None = None
    min_tasks: float | None = None

    def __post_init__(self) -> None:
        if self.max_kl is not None and not self.max_kl >= 0:
            raise ConfigError(f"--max-kl must be 0 or more, not {self.max_kl}")
        for name in ("min_agreement", "min_tasks"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"--{name.replace('_', '-')} must lie in 0 to 1, not {value}")

    def met(self, kl: float, agreement: float, tasks: float | None = None) -> bool:
        """tasks: share of the fine-tune's exact matches that were kept; None: not measured."""
        return (
            (self.max_kl is None or kl <= self.max_kl)
            and (self.min_agreement is None or agreement >= self.min_agreement)
            and (self.min_tasks is None or (tasks is not None and tasks >= self.min_tasks))
        )


@dataclass(frozen=True)
class Question:
    """What two models are compared on. text: for divergence; continued: greedy continuations of
    the fine-tune, of up to ``tokens`` tokens; tasks: prompts with the only right answer."""

    text: Text
    continued: Sequence[Sample] = ()
    tokens: int = 0
    tasks: Sequence[Sample] = ()


def verify(
    base: PathLike,
    delta: PathLike,
    model: PathLike,
    options: TextOptions | None = None,
    thresholds: Thresholds | None = None,
    *,
    prompts: int = 16,
    continued: int = 64,
    tasks: Path | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Quality:
    """Compare the fine-tune ``model`` with base + delta and write the report into the delta.

    model: the checkpoint or adapter that the delta was made from. tasks: JSONL of messages that
    end with the right answer. Both models are read layer by layer; the fine-tune's weights are
    mapped while it writes text. Raises BaseMismatchError, ArtifactError if the delta was made
    from another model, CheckpointError, CompatibilityError, ConfigError.
    """
    thresholds = thresholds or Thresholds()
    if thresholds.min_tasks is not None and tasks is None:
        raise ConfigError("--min-tasks needs --tasks, a file of prompts and answers")
    check_device(device)
    artifact, origin = Delta.open(delta), Checkpoint.open(base)
    path, name = locate(model)
    lora = Adapter.is_adapter(path)
    source = Adapter.open(path, name) if lora else Checkpoint.open(model)
    _check_source(artifact, origin, source, progress)
    check_tokenizers(origin.path, source.path)
    tokenizer = load_tokenizer(source.path, origin.path)
    settings = origin.hf_config.get_text_config()
    context = int(settings.max_position_embeddings)
    mine = of_model(origin, source)

    def writer() -> Any:
        return load_fine_tune(origin, source, device)

    text = gather_text(options or TextOptions(seed=1), tokenizer, context, writer)
    items = () if tasks is None else read_tasks(tasks, tokenizer, context)
    vocabulary = len(mine.table(origin.embedding or ""))
    for samples in (text.samples, items):
        check_tokens(samples, vocabulary)
    continuations = _continued(text, prompts, continued, context, writer)
    asked = Question(text, continuations, continued, items)
    with tempfile.TemporaryDirectory(
        prefix=".verify.", dir=artifact.path.absolute().parent
    ) as work:
        report = examine(
            origin, mine, of_delta(origin, artifact), asked, Path(work), device, progress
        )
    quality = report(artifact.manifest.digest, thresholds)
    record_quality(artifact.path, artifact.manifest, quality)
    return quality


def _continued(
    text: Text, prompts: int, tokens: int, context: int, writer: Callable[[], Any]
) -> tuple[Sample, ...]:
    return continued_greedily(writer(), text.samples[:prompts], tokens, context)


def examine(
    base: Checkpoint,
    mine: Source,
    theirs: Source,
    asked: Question,
    folder: Path,
    device: str,
    progress: Progress = silent,
) -> Callable[[str, Thresholds], Quality]:
    """Compare; returns what makes the report for a delta of a digest, held against thresholds."""
    texts = [list(asked.text.samples), list(asked.continued), list(asked.tasks)]
    read, continued, tasks = judge(base, mine, theirs, texts, folder, device, progress)

    def report(digest: str, thresholds: Thresholds) -> Quality:
        return _report(asked, Tokens.join([r.tokens for r in read]), continued, tasks, digest,
                       thresholds)  # fmt: skip

    return report


def _report(
    asked: Question,
    found: Tokens,
    continued: list[Read],
    tasks: list[Read],
    digest: str,
    thresholds: Thresholds,
) -> Quality:
    kl, agreement = float(found.kl_N.double().mean()), float(found.agrees_N.double().mean())
    places = [parting(read) for read in continued]
    parted = sorted(place for place in places if place >= 0)
    scores = [sum(each) / len(tasks) for each in zip(*map(matches, tasks), strict=True)] or [
        None
    ] * 2
    kept = None if scores[0] is None else min(1.0, scores[1] / scores[0]) if scores[0] else 1.0
    return Quality(
        delta=digest,
        text=asked.text.ref(),
        kl_mean=kl,
        kl_p99=percentile(found.kl_N, 0.99),
        kl_max=float(found.kl_N.max()),
        agreement=agreement,
        perplexity_fine_tune=perplexity(found.nll_fine_tune_N),
        perplexity_delta=perplexity(found.nll_delta_N),
        prompts=len(places),
        continued=asked.tokens,
        identical=places.count(-1) / len(places) if places else 1.0,
        first_divergence=parted[len(parted) // 2] if parted else -1,
        max_kl=thresholds.max_kl,
        min_agreement=thresholds.min_agreement,
        passed=thresholds.met(kl, agreement, kept),
        tasks=len(tasks) or None,
        tasks_fine_tune=scores[0],
        tasks_delta=scores[1],
        min_tasks=thresholds.min_tasks,
    )


def _check_source(
    delta: Delta, base: Checkpoint, source: Checkpoint | Adapter, report: Progress
) -> None:
    delta.verify_digest()
    delta.check_base(checkpoint_digest(base, lambda done, total: report("hash base", done, total)))
    expected = delta.manifest.source
    found = checkpoint_digest(source, lambda done, total: report("hash model", done, total))
    if found != expected.digest:
        raise ArtifactError(
            f"{delta.path} was made from {expected.name} with digest {expected.digest}, but "
            f"{source.name} has {found}; give the model that was compressed"
        )
