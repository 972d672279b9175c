"""Is base + delta as good as the fine-tune? Measure it, and hold it against thresholds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deltaserve.artifact.checkpoint import Checkpoint, locate
from deltaserve.artifact.digest import checkpoint_digest
from deltaserve.artifact.quality import Quality
from deltaserve.artifact.reader import Delta
from deltaserve.artifact.writer import record_quality
from deltaserve.compress.common import PathLike, Progress, silent
from deltaserve.compress.lora import Adapter
from deltaserve.compress.measure import divergence, greedy, percentile, perplexity
from deltaserve.compress.models import (
    check_tokenizers,
    load_fine_tune,
    load_tokenizer,
    load_with_delta,
)
from deltaserve.compress.text import Text
from deltaserve.compress.textsource import TextOptions, check_tokens, gather_text
from deltaserve.errors import ArtifactError, ConfigError


@dataclass(frozen=True)
class Thresholds:
    """max_kl: of the mean divergence, nats per token; min_agreement: share 0 to 1."""

    max_kl: float | None = None
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        if self.max_kl is not None and not self.max_kl >= 0:
            raise ConfigError(f"--max-kl must be 0 or more, not {self.max_kl}")
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            raise ConfigError(f"--min-agreement must lie in 0 to 1, not {self.min_agreement}")

    def met(self, kl: float, agreement: float) -> bool:
        return (self.max_kl is None or kl <= self.max_kl) and (
            self.min_agreement is None or agreement >= self.min_agreement
        )


def verify(
    base: PathLike,
    delta: PathLike,
    model: PathLike,
    options: TextOptions | None = None,
    thresholds: Thresholds | None = None,
    *,
    prompts: int = 16,
    continued: int = 64,
    device: str = "cpu",
    progress: Progress = silent,
) -> Quality:
    """Compare the fine-tune ``model`` with base + delta and write the report into the delta.

    model: the checkpoint or adapter that the delta was made from. Both models are in
    memory in float32. Raises BaseMismatchError, ArtifactError if the delta was made from
    another model, CheckpointError, CompatibilityError, ConfigError.
    """
    artifact, origin = Delta.open(delta), Checkpoint.open(base)
    path, name = locate(model)
    lora = Adapter.is_adapter(path)
    source = Adapter.open(path, name) if lora else Checkpoint.open(model)
    _check_source(artifact, origin, source, progress)
    check_tokenizers(origin.path, source.path)
    fine_tune = load_fine_tune(origin, source, device)
    tokenizer = load_tokenizer(source.path, origin.path)
    context = int(origin.hf_config.get_text_config().max_position_embeddings)
    text = gather_text(options or TextOptions(seed=1), tokenizer, context, lambda: fine_tune)
    check_tokens(text, fine_tune.get_input_embeddings().weight.shape[0])
    quality = measure(
        fine_tune,
        load_with_delta(origin, artifact, device),
        text,
        artifact.manifest.digest,
        thresholds or Thresholds(),
        prompts=prompts,
        continued=continued,
        progress=progress,
    )
    record_quality(artifact.path, artifact.manifest, quality)
    return quality


def measure(
    fine_tune: Any,
    other: Any,
    text: Text,
    digest: str,
    thresholds: Thresholds,
    *,
    prompts: int,
    continued: int,
    progress: Progress = silent,
) -> Quality:
    """The report of ``other``, base + the delta of that digest, against the fine-tune."""
    found = divergence(fine_tune, other, text, progress)
    ends = greedy(fine_tune, other, text, prompts, continued)
    kl, agreement = float(found.kl_N.double().mean()), float(found.agrees_N.double().mean())
    return Quality(
        delta=digest,
        text=text.ref(),
        kl_mean=kl,
        kl_p99=percentile(found.kl_N, 0.99),
        kl_max=float(found.kl_N.max()),
        agreement=agreement,
        perplexity_fine_tune=perplexity(found.nll_fine_tune_N),
        perplexity_delta=perplexity(found.nll_delta_N),
        prompts=len(ends.first),
        continued=continued,
        identical=ends.identical,
        first_divergence=ends.median,
        max_kl=thresholds.max_kl,
        min_agreement=thresholds.min_agreement,
        passed=thresholds.met(kl, agreement),
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
