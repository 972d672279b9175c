"""What every policy has in common: what it is told, what it answers, one protocol.

n candidates, k of them chosen, d dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from deltaserve.errors import SelectionError


@dataclass(frozen=True)
class Features:
    """What is known of the n candidates. A policy needs some of it and ignores the rest.

    labels, triggers: int [n], the class and the trigger (batch of arrival) of each. used: int
    [n], how often each was trained on. scores: float [n] by name (`utility.SCORES`,
    "reference_loss"). vectors: float [n, d], embeddings or gradients of the last layer. epoch:
    how many times this policy was asked before with the same candidates and seed.
    """

    count: int
    labels: np.ndarray | None = None
    triggers: np.ndarray | None = None
    used: np.ndarray | None = None
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    vectors: np.ndarray | None = None
    epoch: int = 0


@dataclass(frozen=True)
class Choice:
    """rows: int64 [k], best first where the policy ranks. weights: float64 [k], what each one's
    loss is to be multiplied by; 1 where the policy has none."""

    rows: np.ndarray
    weights: np.ndarray


def unweighted(rows: np.ndarray) -> Choice:
    return Choice(np.asarray(rows, dtype=np.int64), np.ones(len(rows)))


class Rule(Protocol):
    def __call__(self, features: Features, k: int, seed: int) -> Choice: ...


@dataclass(frozen=True)
class Policy:
    """A named way to choose. needs: fields of Features, or names of scores.

    kind: "presampling" decides before the model sees the samples, "downsampling" by what the
    model says of them (Modyn's terms, Boether et al., SIGMOD 2025).
    """

    name: str
    kind: str
    needs: tuple[str, ...]
    rule: Rule

    def choose(self, features: Features, k: int, seed: int = 0) -> Choice:
        """k of the candidates; the same for the same seed. Raises SelectionError if k does not
        fit, or something that the policy needs is missing or not finite."""
        if not 1 <= k <= features.count:
            raise SelectionError(f"k is {k}, but there are {features.count} samples")
        for name in self.needs:
            self._check(name, features)
        choice = self.rule(features, k, seed)
        assert len(choice.rows) == len(choice.weights) == k
        return choice

    def _check(self, name: str, features: Features) -> None:
        value = features.scores.get(name, getattr(features, name, None))
        if value is None:
            raise SelectionError(f"the policy {self.name!r} needs {name}, which were not given")
        if len(value) != features.count:
            raise SelectionError(f"{len(value)} {name} for {features.count} samples: give one each")
        if not np.isfinite(value).all():
            raise SelectionError(f"the policy {self.name!r} was given {name} that are not finite")
