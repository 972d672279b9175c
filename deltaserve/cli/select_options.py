"""The options of ``deltaserve select``, in the order and the groups of its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

BUDGET, WORTH, LIKENESS, COLUMNS = "Budget", "What a sample is worth", "Likeness", "Columns"

Pool = Annotated[
    list[Path],
    typer.Argument(
        metavar="POOL", help=".jsonl or .parquet files, or a directory of save_to_disk."
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="New directory for the selection.")]
K = Annotated[int | None, typer.Option("-k", help="Samples to select.", rich_help_panel=BUDGET)]
Tokens = Annotated[
    int | None,
    typer.Option(help="Tokens to select (--tokens-column).", rich_help_panel=BUDGET),
]
Per = Annotated[
    str | None,
    typer.Option(help="label or source: equal shares of k, or --count.", rich_help_panel=BUDGET),
]
Count = Annotated[
    list[str] | None,
    typer.Option(help="NAME=N of this label or source; repeat.", rich_help_panel=BUDGET),
]
Keep = Annotated[
    Path | None,
    typer.Option(
        help="Directory of an earlier selection: select so many more.", rich_help_panel=BUDGET
    ),
]
Objective = Annotated[
    str,
    typer.Option(
        help="pairwise (worth less likeness), or a policy: random, label_balanced, kcenter, ..."
    ),
]
Alpha = Annotated[float, typer.Option(help="Weight of worth; likeness weighs 1 - alpha.")]
Beta = Annotated[float | None, typer.Option(help="Weight of likeness, if not that.")]
Utility = Annotated[
    str,
    typer.Option(
        help="none, length, loss, margin, entropy, least_confidence, gradnorm, rho, relevance, "
        "column:NAME, or FILE.npy.",
        rich_help_panel=WORTH,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(help="Causal model for loss, margin, ...", rich_help_panel=WORTH),
]
Reference = Annotated[
    str | None,
    typer.Option(help="rho: the model whose loss is subtracted.", rich_help_panel=WORTH),
]
Target = Annotated[
    Path | None,
    typer.Option(help="relevance: examples of what is wanted.", rich_help_panel=WORTH),
]
Scale = Annotated[
    str,
    typer.Option(
        help="robust: 0 to 1 within each source; centre: only shifted.", rich_help_panel=WORTH
    ),
]
Embed = Annotated[
    str | None,
    typer.Option(
        help="Model to compare samples with (encoder or causal); else words are compared.",
        rich_help_panel=LIKENESS,
    ),
]
Embeddings = Annotated[
    Path | None,
    typer.Option(help=".npy, .safetensors or .parquet instead.", rich_help_panel=LIKENESS),
]
EmbeddingColumn = Annotated[
    str, typer.Option(help="Column of the Parquet file.", rich_help_panel=LIKENESS)
]
Whiten = Annotated[bool, typer.Option(help="Whiten embeddings first.", rich_help_panel=LIKENESS)]
Neighbours = Annotated[
    int, typer.Option(help="Neighbours of each sample.", rich_help_panel=LIKENESS)
]
Index = Annotated[
    str, typer.Option(help="flat (all pairs), ivf, or auto.", rich_help_panel=LIKENESS)
]
Dedup = Annotated[
    str,
    typer.Option(
        help="Remove first: exact (copies), minhash (nearly the same words), cosine (nearly "
        "the same embedding), or none.",
        rich_help_panel=LIKENESS,
    ),
]
DedupThreshold = Annotated[
    float | None,
    typer.Option(help="Default 0.8 (minhash), 0.95 (cosine).", rich_help_panel=LIKENESS),
]
TextColumn = Annotated[str, typer.Option(rich_help_panel=COLUMNS)]
MessagesColumn = Annotated[str, typer.Option(rich_help_panel=COLUMNS)]
IdColumn = Annotated[str, typer.Option(rich_help_panel=COLUMNS)]
LabelColumn = Annotated[str | None, typer.Option(rich_help_panel=COLUMNS)]
SourceColumn = Annotated[
    str | None, typer.Option(help="Default: the files.", rich_help_panel=COLUMNS)
]
TokensColumn = Annotated[str | None, typer.Option(rich_help_panel=COLUMNS)]
Solver = Annotated[
    str, typer.Option(help="dominance, greedy (the same set), or partition (the paper's).")
]
Bounding = Annotated[str, typer.Option(help="exact, approximate, or none.")]
Partitions = Annotated[int, typer.Option(help="Of the solver partition.")]
Rounds = Annotated[int, typer.Option(help="Of the solver partition.")]
Gamma = Annotated[float, typer.Option(help="Of the solver partition.")]
Work = Annotated[
    Path | None,
    typer.Option(help="Keep what takes long in this folder, and go on from there."),
]
MaxLength = Annotated[int, typer.Option(help="Tokens that models read of a sample.")]
Device = Annotated[str, typer.Option(help="For models: cpu, cuda, ...")]
Backend = Annotated[str, typer.Option(help="Where the solver runs: threads, processes or ray.")]
Workers = Annotated[int, typer.Option(help="Of the solver.")]
Seed = Annotated[int, typer.Option()]
