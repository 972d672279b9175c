"""``deltaserve select``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltaserve.cli import select_options as options
from deltaserve.cli.progress import count_bar, stop_on_sigterm

COLUMNS = ("text", "messages", "id", "label", "source", "tokens")


def run(
    pool: options.Pool,
    out: options.Out,
    k: options.K = None,
    tokens: options.Tokens = None,
    per: options.Per = None,
    count: options.Count = None,
    keep: options.Keep = None,
    objective: options.Objective = "pairwise",
    alpha: options.Alpha = 0.9,
    beta: options.Beta = None,
    utility: options.Utility = "none",
    model: options.Model = None,
    reference: options.Reference = None,
    target: options.Target = None,
    scale: options.Scale = "robust",
    embed: options.Embed = None,
    embeddings: options.Embeddings = None,
    embedding_column: options.EmbeddingColumn = "embedding",
    whiten: options.Whiten = True,
    neighbours: options.Neighbours = 10,
    index: options.Index = "auto",
    dedup: options.Dedup = "exact",
    dedup_threshold: options.DedupThreshold = None,
    text_column: options.TextColumn = "text",
    messages_column: options.MessagesColumn = "messages",
    id_column: options.IdColumn = "id",
    label_column: options.LabelColumn = None,
    source_column: options.SourceColumn = None,
    tokens_column: options.TokensColumn = None,
    solver: options.Solver = "dominance",
    bounding: options.Bounding = "exact",
    partitions: options.Partitions = 8,
    rounds: options.Rounds = 8,
    gamma: options.Gamma = 0.75,
    work: options.Work = None,
    max_length: options.MaxLength = 512,
    device: options.Device = "cpu",
    backend: options.Backend = "threads",
    workers: options.Workers = 1,
    seed: options.Seed = 0,
) -> None:
    """Select the best samples of a pool: worth having, and unlike each other.

    Example: deltaserve select pool.jsonl -k 10000 -o chosen

    compares samples by their words and takes 10,000 that differ most. To take samples that the
    base is uncertain about, compared by what it makes of them:

    deltaserve select pool.jsonl -k 10000 --utility margin --model ./base --embed ./base -o chosen

    OUT gets ids with rank, gain and weight, the samples in the pool's own format, and
    receipt.json. Random, stratified random, top-utility and length selections are always
    compared with it. See docs/select.md.
    """
    flags = dict(locals())
    for name in ("pool", "out"):
        del flags[name]
    _select(pool, out, flags)


def _select(pool: list[Path], out: Path, flags: dict[str, Any]) -> None:
    from deltaserve.cli.selected import print_receipt
    from deltaserve.select.extras import require_extra

    require_extra()
    from deltaserve.artifact.staging import require_free
    from deltaserve.select.selector import Selector

    require_free(out)
    selector = Selector(**_settings(flags))
    with stop_on_sigterm():
        with count_bar() as progress:
            selector.fit(pool, progress=progress)
        selector.save(out)
    print_receipt(selector.receipt_, out)


def _settings(flags: dict[str, Any]) -> dict[str, Any]:
    """Those of `Selector`: they have the flags' names, but for columns, counts and "none"."""
    from deltaserve.cli.selected import parse_counts
    from deltaserve.errors import ConfigError
    from deltaserve.select.pool import Columns

    if flags["bounding"] not in ("exact", "approximate", "none"):
        raise ConfigError(f"no bounding {flags['bounding']!r}: choose exact, approximate or none")
    columns = {name: flags.pop(f"{name}_column") for name in COLUMNS}
    counts = parse_counts(flags.pop("count") or [])
    absent = {name: None for name in ("bounding", "dedup") if flags[name] == "none"}
    return flags | absent | {"counts": counts, "columns": Columns(**columns)}
