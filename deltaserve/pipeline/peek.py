"""The first row of a source, without reading or indexing the rest of it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from deltaserve.errors import PipelineError
from deltaserve.pipeline.lines import files_of
from deltaserve.pipeline.node import Node
from deltaserve.pipeline.sources import JSON_SUFFIXES, KINDS, extra


def first_row(node: Node) -> dict[str, Any] | None:
    """None where there is no row, or none that can be read: that is told when it is read.

    Raises PipelineError: a file does not exist, or a package is missing.
    """
    params = node.params
    if node.op == "text":
        return {"text": ""}
    if node.op == "tokens":
        return {"input_ids": np.zeros(1, np.int32)}
    if node.op == "jsonl":
        return _json_line(files_of(params["paths"], JSON_SUFFIXES)[0])
    if node.op == "parquet":
        return _parquet_row(files_of(params["paths"], (".parquet",))[0], params["columns"])
    source = KINDS[node.op](**params)
    return source.read([0])[0] if len(source) else None


def _json_line(file: str) -> dict[str, Any] | None:
    try:
        with open(file, "rb") as lines:
            for line in lines:
                if line.strip():
                    row = json.loads(line)
                    return row if isinstance(row, dict) else None
    except OSError as cause:
        raise PipelineError(f"{file} cannot be read: {cause.strerror}") from None
    except ValueError:
        return None
    return None


def _parquet_row(file: str, columns: tuple[str, ...] | None) -> dict[str, Any] | None:
    parquet, arrow = extra("pyarrow.parquet"), extra("pyarrow")
    try:
        with parquet.ParquetFile(file) as opened:
            batch = next(opened.iter_batches(1, columns=list(columns) if columns else None), None)
            return batch.to_pylist()[0] if batch is not None and batch.num_rows else None
    except (arrow.ArrowException, OSError):
        return None
