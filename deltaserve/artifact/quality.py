"""How close base + delta comes to the fine-tune: the verify report inside a manifest."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from deltaserve.artifact.fields import count_at, digest_at, object_at, text_at
from deltaserve.errors import ArtifactError


@dataclass(frozen=True)
class TextRef:
    """The text that something was measured or calibrated on.

    source: the file's name, or "sampled from the fine-tune". digest: sha256 over the
    sequences of token ids. seed: what drew or chose them. file_digest, file_bytes: sha256 and size
    of the file that they come from, None where the fine-tune wrote them.
    """

    source: str
    digest: str
    sequences: int
    tokens: int
    seed: int
    file_digest: str | None = None
    file_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-able object; what is said of a file only where there was one."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, value: object, where: str) -> TextRef:
        """Raises ArtifactError naming the first wrong field."""
        text = object_at(value, where)
        at = f"{where}."
        sequences, tokens, seed = (count_at(text, k, at) for k in ("sequences", "tokens", "seed"))
        source, digest = text_at(text, "source", at), digest_at(text, "digest", at)
        found = cls(source, digest, sequences, tokens, seed)
        if "file_digest" not in text:
            return found
        return replace(
            found,
            file_digest=digest_at(text, "file_digest", at),
            file_bytes=count_at(text, "file_bytes", at),
        )


@dataclass(frozen=True)
class Quality:
    """Fine-tune against base + delta on the same text.

    delta: digest of the artifact that was measured. kl_*: Kullback-Leibler divergence of
    the next-token distributions, fine-tune || delta, nats per token: mean, 99th percentile
    and largest. agreement: share of tokens where both have the same most likely next
    token. perplexity_*: of the text. prompts: greedy continuations that were compared, of
    up to ``continued`` tokens; identical: share of them without any difference;
    first_divergence: median place of the first difference among the others (-1: none).
    tasks: prompts with one right answer, None if there were none; tasks_*: share of exact
    matches. max_kl, min_agreement, min_tasks (share of the fine-tune's matches): thresholds, None
    where there was none; passed: all were met.
    """

    delta: str
    text: TextRef
    kl_mean: float
    kl_p99: float
    kl_max: float
    agreement: float
    perplexity_fine_tune: float
    perplexity_delta: float
    prompts: int
    continued: int
    identical: float
    first_divergence: int
    max_kl: float | None
    min_agreement: float | None
    passed: bool
    tasks: int | None = None
    tasks_fine_tune: float | None = None
    tasks_delta: float | None = None
    min_tasks: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-able object, in the order of the fields; tasks only where there were some."""
        tasks = self.tasks is not None
        found = {k: v for k, v in asdict(self).items() if tasks or "tasks" not in k}
        return found | {"text": self.text.to_json()}

    @classmethod
    def from_json(cls, value: object) -> Quality:
        """Check and convert; raises ArtifactError naming the first wrong field."""
        quality = object_at(value, "quality")
        known: dict[str, Any] = {}
        for field in fields(cls):
            given = quality.get(field.name)
            if field.name == "delta":
                known["delta"] = digest_at(quality, "delta", "quality.")
            elif field.name == "text":
                known["text"] = TextRef.from_json(given, "quality.text")
            elif _fits(given, str(field.type)):
                known[field.name] = given
            else:
                raise ArtifactError(
                    f"delta.json: quality.{field.name} is not {field.type}: {str(given)[:80]}"
                )
        return cls(**known)


def _fits(value: object, kind: str) -> bool:
    """Does a JSON value fit a field's annotation: bool, int, float or float | None?"""
    if kind == "bool" or isinstance(value, bool):
        return kind == "bool" and isinstance(value, bool)
    if value is None:
        return kind.endswith("None")
    if kind == "int":
        return isinstance(value, int)
    return isinstance(value, (int, float)) and math.isfinite(value)
