"""What a selection leaves on the disk: ids, samples, receipt; all of it or nothing.

ids.jsonl (or ids.parquet)   {"id", "rank", "gain", "weight"}, in order of selection
samples.jsonl, samples.parquet or samples/   the selected samples as they were, in pool order
receipt.json                 how they were selected
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deltaserve.artifact.staging import StagedDirectory, sync, write_text
from deltaserve.select.extras import load_extra
from deltaserve.select.formats import write_samples
from deltaserve.select.pool import Pool

RECEIPT = "receipt.json"
BLOCK = 1 << 16


def write_selection(
    out: Path,
    pool: Pool,
    rows: np.ndarray,
    gains: np.ndarray,
    weights: np.ndarray,
    receipt: dict[str, Any],
) -> None:
    """Write ``out``, a new directory.

    rows: int64 [k] in order of selection; gains, weights: float64 [k]. Raises
    OutputExistsError if ``out`` holds something.
    """
    with StagedDirectory(out) as staged:
        if pool.inputs[0].kind == "parquet":
            _ids_parquet(staged.path / "ids.parquet", pool, rows, gains, weights)
        else:
            _ids_lines(staged.path / "ids.jsonl", pool, rows, gains, weights)
        chosen = np.zeros(len(pool), dtype=bool)
        chosen[rows] = True
        write_samples(pool.inputs, chosen, staged.path)
        write_text(staged.path / RECEIPT, json.dumps(receipt, indent=1, allow_nan=False) + "\n")
        sync(staged.path)
        staged.commit()


Block = dict[str, list[Any]]


def _blocks(
    pool: Pool, rows: np.ndarray, gains: np.ndarray, weights: np.ndarray
) -> Iterator[Block]:
    for start in range(0, len(rows), BLOCK):
        part = slice(start, start + BLOCK)
        yield {
            "id": pool.ids(rows[part]),
            "rank": list(range(start, min(start + BLOCK, len(rows)))),
            "gain": gains[part].tolist(),
            "weight": weights[part].tolist(),
        }


def _ids_lines(
    path: Path, pool: Pool, rows: np.ndarray, gains: np.ndarray, weights: np.ndarray
) -> None:
    with path.open("w", encoding="utf-8") as file:
        for block in _blocks(pool, rows, gains, weights):
            for values in zip(*block.values(), strict=True):
                file.write(json.dumps(dict(zip(block, values, strict=True))) + "\n")


def _ids_parquet(
    path: Path, pool: Pool, rows: np.ndarray, gains: np.ndarray, weights: np.ndarray
) -> None:
    arrow, parquet = load_extra("pyarrow"), load_extra("pyarrow.parquet")
    kinds = (arrow.string(), arrow.int64(), arrow.float64(), arrow.float64())
    schema = arrow.schema(list(zip(("id", "rank", "gain", "weight"), kinds, strict=True)))
    with parquet.ParquetWriter(path, schema) as writer:
        for block in _blocks(pool, rows, gains, weights):
            writer.write_table(arrow.table(block, schema=schema))
