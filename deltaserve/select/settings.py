"""Every setting of a selection, once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deltaserve.errors import SelectionError
from deltaserve.select.policies import POLICIES
from deltaserve.select.pool import Columns
from deltaserve.select.utility import SCORES

PAIRWISE = "pairwise"
OBJECTIVES = (PAIRWISE, *POLICIES)
COLUMN = "column:"
UTILITIES = ("none", "length", *SCORES, "rho", "relevance", f"{COLUMN}NAME", "FILE.npy")


@dataclass(frozen=True, eq=False)
class Settings:
    """What to select, how samples are compared, what they are worth. Raises SelectionError."""

    k: int | None = None
    """Samples to select."""
    tokens: int | None = None
    """Tokens to select, instead of k or besides it; needs ``columns.tokens``."""
    per: str | None = None
    """"label" or "source": k is shared equally, or ``counts`` says how many of each."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Samples of each label or source; those not named get none."""
    keep: Path | list[str] | None = None
    """Ids selected before (or the OUT of that selection): k more are added to them."""

    objective: str = PAIRWISE
    """"pairwise", or the name of a policy."""
    alpha: float = 0.9
    """Weight of utility, above 0."""
    beta: float | None = None
    """Weight of similarity; None is 1 - alpha."""
    solver: str = "dominance"
    """"dominance" or "greedy" (the same set), or "partition" (the paper's approximation)."""
    bounding: str | None = "exact"
    """"exact", "approximate", or None: decide what can be decided before solving."""
    partitions: int = 8
    rounds: int = 8
    gamma: float = 0.75
    """Of the solver "partition": see `options.Partition`."""

    utility: str | np.ndarray = "none"
    """One of UTILITIES, or a number for each sample."""
    model: str | None = None
    """Causal model for the utilities that look at logits."""
    reference: str | None = None
    """Model whose loss "rho" and the policy "rholoss" subtract."""
    target: Any = None
    """A pool of examples of what is wanted, for "relevance"."""
    scale: str = "robust"
    """"robust": 0 to 1 within each source; "centre": shifted to 0 (as in the paper)."""

    embeddings: Path | np.ndarray | None = None
    """Embeddings of the samples: an array or a file."""
    embedding_column: str = "embedding"
    embed: str | None = None
    """Model to embed with; without it and without ``embeddings``, words are compared."""
    whiten: bool = True
    neighbours: int = 10
    min_similarity: float = 0.0
    index: str = "auto"
    """"flat" (all pairs), "ivf", or "auto"."""
    memory_bytes: int = 4 << 30
    """Above this, vectors and index stay on the disk."""

    dedup: str | None = "exact"
    """Remove first: "exact" (copies of a text), "minhash" (nearly the same words), "cosine" (nearly
    the same embedding), or None. The best of each cluster stays."""
    dedup_threshold: float | None = None
    """Similarity that makes a duplicate; None: 0.8 of words, 0.95 of cosine."""

    columns: Columns = field(default_factory=Columns)
    max_length: int = 512
    batch_tokens: int = 8192
    device: str = "cpu"
    backend: str = "threads"
    """Where the solver runs: "threads", "processes", or "ray"; the answer is the same."""
    workers: int = 1
    work: Path | None = None
    """Folder that keeps embeddings, utilities, graph and progress, to go on after a stop."""
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("objective", self.objective, OBJECTIVES)
        _one_of("solver", self.solver, ("dominance", "greedy", "partition"))
        _one_of("bounding", self.bounding, ("exact", "approximate", None))
        _one_of("backend", self.backend, ("threads", "processes", "ray"))
        _one_of("scale", self.scale, ("robust", "centre"))
        _one_of("dedup", self.dedup, ("exact", "minhash", "cosine", None))
        _one_of("per", self.per, ("label", "source", None))
        self._check_budget()
        self._check_utility()
        if self.embed is not None and self.embeddings is not None:
            raise SelectionError("give either embeddings or a model to embed with, not both")
        if self.dedup_threshold is not None and not 0 < self.dedup_threshold <= 1:
            raise SelectionError(f"dedup_threshold must lie in 0 to 1, not {self.dedup_threshold}")
        if self.seed < 0 or self.workers < 1:
            raise SelectionError("seed must be 0 or more, and workers at least 1")

    def _check_budget(self) -> None:
        if self.k is None and self.tokens is None and not self.counts:
            raise SelectionError("how much to select? Give k, tokens, or counts")
        if self.k is not None and self.k < 1:
            raise SelectionError(f"k must be at least 1, not {self.k}")
        if self.tokens is not None and self.columns.tokens is None:
            raise SelectionError("a budget in tokens needs the column that counts them")
        if self.counts and self.per is None:
            raise SelectionError("counts of what? Set per to label or source")
        if self.per is not None and not self.counts and self.k is None:
            raise SelectionError(f"equal shares per {self.per} need k")
        if self.per == "label" and self.columns.label is None:
            raise SelectionError("a budget per label needs the column of the labels")
        if self.objective != PAIRWISE and (self.k is None or self.tokens or self.per):
            raise SelectionError(
                f"the objective {self.objective!r} takes k and no other budget; pairwise takes all"
            )

    def _check_utility(self) -> None:
        """What the utility and the policy need is given, and nothing that nobody needs."""
        needed = set(POLICIES[self.objective].needs if self.is_policy else ())
        if isinstance(self.utility, str):
            known = (*UTILITIES, COLUMN + self.utility.removeprefix(COLUMN))
            if self.utility not in known and not self.utility.endswith(".npy"):
                raise SelectionError(
                    f"no utility {self.utility!r}: choose one of {', '.join(UTILITIES)}"
                )
            needed.add(self.utility)
        needs_model = bool(needed & {*SCORES, "rho"})
        needs_reference = bool(needed & {"rho", "reference_loss"})
        _given("a model", self.model, needs_model, f"{', '.join(SCORES)} and rho")
        _given("a reference model", self.reference, needs_reference, "rho and rholoss")
        _given("target examples", self.target, "relevance" in needed, "relevance")
        if "relevance" in needed and self.embeddings is not None:
            raise SelectionError(
                "relevance embeds the targets as well: name the model (embed) instead of embeddings"
            )
        if "labels" in needed and self.columns.label is None:
            raise SelectionError(f"{self.objective} needs the column of the labels")

    @property
    def is_policy(self) -> bool:
        return self.objective != PAIRWISE

    def to_json(self) -> dict[str, Any]:
        """What a receipt says: arrays by their shapes, their digests stand elsewhere in it."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


def _given(what: str, value: Any, needed: bool, whom: str) -> None:
    if needed and value is None:
        raise SelectionError(f"{whom} cannot do without {what}")
    if value is not None and not needed:
        raise SelectionError(
            f"{what} given, but only {whom} would use it: ask for that, or drop it"
        )


def _one_of(name: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        raise SelectionError(f"no {name} {value!r}: choose one of {', '.join(map(str, allowed))}")


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} array of shape {list(value.shape)}"
    if isinstance(value, Columns):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (list, tuple)):
        return f"{len(value)} given" if len(value) > 20 else [str(each) for each in value]
    return value if isinstance(value, (int, float, str, type(None))) else str(value)
