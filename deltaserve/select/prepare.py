"""From a pool to a problem: embeddings, utilities, duplicates, neighbours, budget.

n samples in the pool, m of them candidates (all that are no duplicates).
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deltaserve.errors import SelectionError
from deltaserve.select.budgets import make_limits
from deltaserve.select.duplicates import (
    Duplicates,
    keep_best,
    near_duplicates,
    similar_duplicates,
)
from deltaserve.select.embed import check_embeddings, embed_pool, load_embeddings, take_rows
from deltaserve.select.extras import load_extra
from deltaserve.select.lexical import embed_words
from deltaserve.select.neighbours import KnnOptions, find_neighbours, neighbour_graph
from deltaserve.select.policies.presampling import equal_shares
from deltaserve.select.pool import Groups, Pool, Progress
from deltaserve.select.scale import (
    Transform,
    check_utility,
    fit_whitening,
    min_centred,
    robust_scaled,
    untied,
)
from deltaserve.select.settings import COLUMN, Settings
from deltaserve.select.solve import Budget, Problem
from deltaserve.select.store import Store, digest, stamp
from deltaserve.select.tokens import ModelOptions
from deltaserve.select.utility import SCORES, relevance, score_pool

THRESHOLDS = {"exact": 1.0, "minhash": 0.8, "cosine": 0.95}
WORDS = "words and pairs of words, hashed"


@dataclass(frozen=True, eq=False)
class Prepared:
    """rows: int64 [m], candidates. raw: float64 [n], utilities as they came. duplicates: None if
    they were not looked for. vectors: [m, d]; transform: what makes cosines of them. facts: what
    a receipt says of the steps."""

    pool: Pool
    rows: np.ndarray
    raw: np.ndarray
    scores: dict[str, np.ndarray]
    duplicates: Duplicates | None
    vectors: np.ndarray
    transform: Transform
    problem: Problem
    facts: dict[str, Any]


class Preparation:
    """The steps, one method each; what takes long is kept in ``store``."""

    def __init__(self, settings: Settings, pool: Pool, store: Store, progress: Progress) -> None:
        self.settings, self.pool, self.store, self.progress = settings, pool, store, progress
        self.facts: dict[str, Any] = {}
        # bool [n]: selected before.
        self.chosen = np.zeros(len(pool), dtype=bool)
        if settings.keep is not None:
            ids = settings.keep if isinstance(settings.keep, list) else read_ids(settings.keep)
            self.chosen[pool.rows(ids)] = True
            self.facts["selected before"] = int(self.chosen.sum())

    def run(self) -> Prepared:
        settings, pool, chosen = self.settings, self.pool, self.chosen
        # Before hours of embedding: can the budget be met at all?
        everything = np.arange(len(pool))
        make_limits(self.budget(everything), len(pool), chosen)
        vectors = self.embeddings()
        transform = fit_whitening(vectors, settings.seed) if settings.whiten else Transform()
        scores = self.scores()
        raw = self.utility(vectors, scores)
        found = self.duplicates(vectors, transform, raw)
        rows = everything if found is None else np.flatnonzero(found.keep | chosen)
        if len(rows) < len(pool):
            every = vectors
            vectors = self.store.array(
                lambda path: take_rows(every, rows, path), "kept", digest(rows), *self.source()
            )
        self.check_candidates(rows)
        problem = Problem(
            self.graph(vectors, transform, "graph", digest(rows)),
            self.scaled(raw[rows], rows).astype(np.float32),
            self.budget(rows),
            settings.alpha,
            settings.beta,
            chosen[rows] if chosen.any() else None,
        )
        return Prepared(pool, rows, raw, scores, found, vectors, transform, problem, self.facts)

    def check_candidates(self, rows: np.ndarray) -> None:
        """The pool met the budget; what is left of it may not."""
        try:
            make_limits(self.budget(rows), len(rows), self.chosen[rows])
        except SelectionError as cause:
            removed = len(self.pool) - len(rows)
            raise SelectionError(
                f"{cause}, after {removed:,} duplicates were removed (--dedup none keeps them)"
            ) from None

    def model_options(self, model: str) -> ModelOptions:
        s = self.settings
        return ModelOptions(model, s.max_length, s.batch_tokens, s.device)

    def source(self) -> tuple[Any, ...]:
        """What decides the embeddings."""
        s = self.settings
        given = digest(s.embeddings) if isinstance(s.embeddings, np.ndarray) else s.embeddings
        at = given.stat().st_mtime_ns if isinstance(given, Path) and given.exists() else None
        return (self.pool.digest, str(given), at, s.embedding_column, stamp(s.embed), s.max_length)

    def embeddings(self) -> np.ndarray:
        """float [n, d], of a file, a model, or the words."""
        s, pool = self.settings, self.pool
        if isinstance(s.embeddings, np.ndarray):
            check_embeddings(s.embeddings, len(pool), "the array")
            found, name = s.embeddings, "an array"
        elif s.embeddings is not None:
            found = load_embeddings(s.embeddings, len(pool), s.embedding_column)
            name = str(s.embeddings)
        else:
            found = self.store.array(
                lambda path: self.embed(pool, path), "embeddings", *self.source()
            )
            name = s.embed or WORDS
        self.facts["embeddings"] = {"from": name, "dimensions": found.shape[1]}
        return found

    def embed(self, pool: Pool, path: Path | None = None) -> np.ndarray:
        if self.settings.embed is None:
            texts = (sample.text for sample in pool.samples())
            return embed_words(texts, len(pool), path, self.progress)
        options = self.model_options(self.settings.embed)
        return embed_pool(pool, options, out=path, progress=self.progress)

    def scores(self) -> dict[str, np.ndarray]:
        """SCORES of the model, and the loss of the reference, where they are given."""
        found: dict[str, np.ndarray] = {}
        if self.settings.model is not None:
            found |= self.scored(self.settings.model)
        if self.settings.reference is not None:
            found["reference_loss"] = self.scored(self.settings.reference)["loss"]
        return found

    def scored(self, model: str) -> dict[str, np.ndarray]:
        def make(_: Path) -> np.ndarray:
            scores = score_pool(self.pool, self.model_options(model), self.progress)
            return np.stack([scores[name] for name in SCORES], axis=1)

        key = (self.pool.digest, stamp(model), self.settings.max_length)
        table = self.store.array(make, "scores", *key)
        return {name: table[:, at] for at, name in enumerate(SCORES)}

    def utility(self, vectors: np.ndarray, scores: dict[str, np.ndarray]) -> np.ndarray:
        """float64 [n], not scaled yet."""
        s, pool, name = self.settings, self.pool, self.settings.utility
        if isinstance(name, np.ndarray):
            values, name = name, "an array"
        elif name.startswith(COLUMN):
            assert pool.utility is not None
            values = pool.utility
        elif name.endswith(".npy"):
            values = _read_utility(Path(name))
        elif name == "none":
            values = np.ones(len(pool))
        elif name == "length":
            values = pool.lengths if pool.tokens is None else pool.tokens
        elif name == "rho":
            values = scores["loss"] - scores["reference_loss"]
        elif name == "relevance":
            plain = replace(s.columns, label=None, source=None, tokens=None, utility=None)
            values = relevance(vectors, self.embed(Pool(s.target, plain)))
        else:
            values = scores[name]
        values = check_utility(values, len(pool), f"the utility {name}")
        self.facts["utility"] = {
            "from": name,
            "digest": digest(values),
            "lowest": float(values.min()),
            "median": float(np.median(values)),
            "highest": float(values.max()),
        }
        return values

    def scaled(self, raw: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """float64 [m], 0 or more."""
        s = self.settings
        if s.scale == "centre" and raw.min() < raw.max():
            return min_centred(raw)
        return untied(robust_scaled(raw, self.pool.sources.codes[rows]), s.seed)

    def duplicates(
        self, vectors: np.ndarray, transform: Transform, raw: np.ndarray
    ) -> Duplicates | None:
        s, pool = self.settings, self.pool
        if s.dedup is None:
            return None
        threshold = s.dedup_threshold or THRESHOLDS[s.dedup]
        # What was selected before stands for its copies.
        best = np.where(self.chosen, np.inf, raw)
        if s.dedup == "exact":
            found = keep_best(pool.contents, best)
        elif s.dedup == "minhash":
            found = near_duplicates(
                (sample.text for sample in pool.samples()),
                len(pool),
                threshold=threshold,
                utility=best,
                seed=s.seed,
                progress=self.progress,
            )
        else:
            graph = self.graph(vectors, transform, "likeness")
            found = similar_duplicates(graph, pool.contents, threshold=threshold, utility=best)
        self.facts["duplicates"] = {
            "by": s.dedup,
            "threshold": threshold,
            "removed": found.removed,
        }
        return found

    def graph(self, vectors: np.ndarray, transform: Transform, name: str, *key: Any) -> Any:
        s = self.settings
        options = KnnOptions(
            neighbours=s.neighbours,
            index=s.index,
            memory_bytes=s.memory_bytes,
            min_similarity=s.min_similarity,
            seed=s.seed,
        )
        facts: dict[str, Any] = {"neighbours": s.neighbours}
        note = self.store.path(name, options, s.whiten, s.workers, *self.source(), *key)

        def make(path: Path) -> Any:
            found = find_neighbours(vectors, options, transform, progress=self.progress)
            facts.update(index=found.index, recall=found.recall, recall_on=found.checked)
            note.with_suffix(".json").write_text(json.dumps(facts))
            shards = min(s.workers, len(vectors))
            return neighbour_graph(found, s.min_similarity, shards=shards, path=path)

        graph = self.store.graph(make, name, options, s.whiten, s.workers, *self.source(), *key)
        facts = json.loads(note.with_suffix(".json").read_text())
        facts |= {"edges": graph.num_edges, "digest": graph.digest}
        self.facts["graph" if name == "graph" else f"graph of {name}"] = facts
        return graph

    def budget(self, rows: np.ndarray) -> Budget:
        """The budget over the candidates ``rows``."""
        s, pool = self.settings, self.pool
        lengths = pool.tokens[rows] if s.tokens is not None and pool.tokens is not None else None
        if s.per is None:
            return Budget(k=s.k, tokens=s.tokens, lengths=lengths)
        groups = pool.labels if s.per == "label" else pool.sources
        assert groups is not None
        codes, free = groups.codes[rows], ~self.chosen[rows]
        sizes = np.bincount(codes[free], minlength=len(groups.names))
        counts = _counts(s, groups, sizes)
        present: dict[Hashable, int] = {int(c): int(counts[c]) for c in np.unique(codes)}
        return Budget(s.k, codes, present, s.tokens, lengths)


def read_ids(path: Path) -> list[str]:
    """Ids of an earlier selection: its directory, its ids.jsonl or its ids.parquet."""
    if path.is_dir():
        found = [p for p in (path / "ids.jsonl", path / "ids.parquet") if p.exists()]
        if not found:
            raise SelectionError(
                f"{path} is no selection: it has neither ids.jsonl nor ids.parquet"
            )
        path = found[0]
    try:
        if path.suffix == ".parquet":
            table = load_extra("pyarrow.parquet").read_table(path, columns=["id"])
            return [str(each) for each in table["id"].to_pylist()]
        return [str(json.loads(line)["id"]) for line in path.read_text().splitlines() if line]
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise SelectionError(f"{path} cannot be read as ids: {cause!r}") from None


def _counts(settings: Settings, groups: Groups, sizes: np.ndarray) -> np.ndarray:
    """Samples of each group: as named, or equal shares of k."""
    if not settings.counts:
        assert settings.k is not None
        return equal_shares(sizes, min(settings.k, int(sizes.sum())))
    wanted = np.zeros(len(groups.names), dtype=np.int64)
    for name, count in settings.counts.items():
        if name not in groups.names:
            known = ", ".join(groups.names[:5])
            raise SelectionError(f"no {settings.per} {name!r} in the pool; it has {known}")
        at = groups.names.index(name)
        if not 0 <= count <= sizes[at]:
            raise SelectionError(
                f"the {settings.per} {name!r} has {sizes[at]:,} samples, {count:,} were asked for"
            )
        wanted[at] = count
    return wanted


def _read_utility(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as cause:
        raise SelectionError(f"{path} cannot be read: {cause}") from None
