"""``deltaserve select``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltaserve.cli.progress import count_bar, stop_on_sigterm

BUDGET, WORTH, LIKENESS, COLUMNS = "Budget", "What a sample is worth", "Likeness", "Columns"


def run(
    pool: Annotated[
        list[Path],
        typer.Argument(
            metavar="POOL", help=".jsonl or .parquet files, or a directory of save_to_disk."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="New directory for the selection.")],
    k: Annotated[
        int | None, typer.Option("-k", help="Samples to select.", rich_help_panel=BUDGET)
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens to select (--tokens-column).", rich_help_panel=BUDGET),
    ] = None,
    per: Annotated[
        str | None,
        typer.Option(
            help="label or source: equal shares of k, or --count.", rich_help_panel=BUDGET
        ),
    ] = None,
    count: Annotated[
        list[str] | None,
        typer.Option(help="NAME=N of this label or source; repeat.", rich_help_panel=BUDGET),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            help="Directory of an earlier selection: select so many more.", rich_help_panel=BUDGET
        ),
    ] = None,
    objective: Annotated[
        str,
        typer.Option(
            help="pairwise (worth less likeness), or a policy: random, label_balanced, kcenter, ..."
        ),
    ] = "pairwise",
    alpha: Annotated[float, typer.Option(help="Weight of worth; likeness weighs 1 - alpha.")] = 0.9,
    beta: Annotated[float | None, typer.Option(help="Weight of likeness, if not that.")] = None,
    utility: Annotated[
        str,
        typer.Option(
            help="none, length, loss, margin, entropy, least_confidence, gradnorm, rho, relevance, "
            "column:NAME, or FILE.npy.",
            rich_help_panel=WORTH,
        ),
    ] = "none",
    model: Annotated[
        str | None,
        typer.Option(help="Causal model for loss, margin, ...", rich_help_panel=WORTH),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="rho: the model whose loss is subtracted.", rich_help_panel=WORTH),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option(help="relevance: examples of what is wanted.", rich_help_panel=WORTH),
    ] = None,
    scale: Annotated[
        str,
        typer.Option(
            help="robust: 0 to 1 within each source; centre: only shifted.", rich_help_panel=WORTH
        ),
    ] = "robust",
    embed: Annotated[
        str | None,
        typer.Option(
            help="Model to compare samples with (encoder or causal); else words are compared.",
            rich_help_panel=LIKENESS,
        ),
    ] = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(help=".npy, .safetensors or .parquet instead.", rich_help_panel=LIKENESS),
    ] = None,
    embedding_column: Annotated[
        str, typer.Option(help="Column of the Parquet file.", rich_help_panel=LIKENESS)
    ] = "embedding",
    whiten: Annotated[
        bool, typer.Option(help="Whiten embeddings first.", rich_help_panel=LIKENESS)
    ] = True,
    neighbours: Annotated[
        int, typer.Option(help="Neighbours of each sample.", rich_help_panel=LIKENESS)
    ] = 10,
    index: Annotated[
        str, typer.Option(help="flat (all pairs), ivf, or auto.", rich_help_panel=LIKENESS)
    ] = "auto",
    dedup: Annotated[
        str,
        typer.Option(
            help="Remove first: exact (copies), minhash (nearly the same words), cosine (nearly "
            "the same embedding), or none.",
            rich_help_panel=LIKENESS,
        ),
    ] = "exact",
    dedup_threshold: Annotated[
        float | None,
        typer.Option(help="Default 0.8 (minhash), 0.95 (cosine).", rich_help_panel=LIKENESS),
    ] = None,
    text_column: Annotated[str, typer.Option(rich_help_panel=COLUMNS)] = "text",
    messages_column: Annotated[str, typer.Option(rich_help_panel=COLUMNS)] = "messages",
    id_column: Annotated[str, typer.Option(rich_help_panel=COLUMNS)] = "id",
    label_column: Annotated[str | None, typer.Option(rich_help_panel=COLUMNS)] = None,
    source_column: Annotated[
        str | None, typer.Option(help="Default: the files.", rich_help_panel=COLUMNS)
    ] = None,
    tokens_column: Annotated[str | None, typer.Option(rich_help_panel=COLUMNS)] = None,
    solver: Annotated[
        str, typer.Option(help="dominance, greedy (the same set), or partition (the paper's).")
    ] = "dominance",
    bounding: Annotated[str, typer.Option(help="exact, approximate, or none.")] = "exact",
    partitions: Annotated[int, typer.Option(help="Of the solver partition.")] = 8,
    rounds: Annotated[int, typer.Option(help="Of the solver partition.")] = 8,
    gamma: Annotated[float, typer.Option(help="Of the solver partition.")] = 0.75,
    work: Annotated[
        Path | None,
        typer.Option(help="Keep what takes long in this folder, and go on from there."),
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens that models read of a sample.")] = 512,
    device: Annotated[str, typer.Option(help="For models: cpu, cuda, ...")] = "cpu",
    backend: Annotated[
        str, typer.Option(help="Where the solver runs: threads, processes or ray.")
    ] = "threads",
    workers: Annotated[int, typer.Option(help="Of the solver.")] = 1,
    seed: Annotated[int, typer.Option()] = 0,
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
    from deltaserve.cli.selected import parse_counts, print_receipt
    from deltaserve.errors import ConfigError
    from deltaserve.select.extras import require_extra

    require_extra()
    from deltaserve.artifact.staging import require_free
    from deltaserve.select.pool import Columns
    from deltaserve.select.selector import Selector

    if bounding not in ("exact", "approximate", "none"):
        raise ConfigError(f"no bounding {bounding!r}: choose exact, approximate or none")
    require_free(out)
    selector = Selector(
        k=k,
        tokens=tokens,
        per=per,
        counts=parse_counts(count or []),
        keep=keep,
        objective=objective,
        alpha=alpha,
        beta=beta,
        utility=utility,
        model=model,
        reference=reference,
        target=target,
        scale=scale,
        embed=embed,
        embeddings=embeddings,
        embedding_column=embedding_column,
        whiten=whiten,
        neighbours=neighbours,
        index=index,
        dedup=None if dedup == "none" else dedup,
        dedup_threshold=dedup_threshold,
        columns=Columns(
            text_column, messages_column, id_column, label_column, source_column, tokens_column
        ),
        solver=solver,
        bounding=None if bounding == "none" else bounding,
        partitions=partitions,
        rounds=rounds,
        gamma=gamma,
        work=work,
        max_length=max_length,
        device=device,
        backend=backend,
        workers=workers,
        seed=seed,
    )
    with stop_on_sigterm():
        with count_bar() as progress:
            selector.fit(pool, progress=progress)
        selector.save(out)
    print_receipt(selector.receipt_, out)
