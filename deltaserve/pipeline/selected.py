"""Rows that a selection chose: an index into another source."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltaserve.errors import PipelineError
from deltaserve.pipeline.sources import JsonLines, Source, extra

BLOCK = 1024


class Selected(Source):
    """Some rows of another source, in the order of a selection."""

    def __init__(self, selection: Any, source: Source) -> None:
        super().__init__()
        self._source = source
        self._rows = _selected_rows(selection, source)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: Sequence[int]) -> list[Any]:
        rows = self._source.read([int(self._rows[index]) for index in indices])
        self.bytes_read = self._source.bytes_read
        return rows

    def weight(self, indices: Sequence[int] | None = None) -> float:
        rows = self._rows if indices is None else self._rows[list(indices)]
        return self._source.weight(rows.tolist())

    def digest(self) -> str:
        return f"{self._source.digest()} {hashlib.sha256(self._rows.tobytes()).hexdigest()}"

    def close(self) -> None:
        self._source.close()


def _selected_rows(selection: Any, source: Source) -> np.ndarray:
    ids = _selection_ids(Path(selection)) if isinstance(selection, str) else list(selection)
    if all(isinstance(each, int) for each in ids):
        rows = np.array(ids, np.int64)
        outside = rows[(rows < 0) | (rows >= len(source))]
        if len(outside):
            raise PipelineError(
                f"the index names row {outside[0]}; the source has {len(source)} rows"
            )
        return rows
    # Selections write every id as text.
    found = _numbers(source, {str(each) for each in ids})
    for each in ids:
        if str(each) not in found:
            where = f"the selection {selection}" if isinstance(selection, str) else "the index"
            raise PipelineError(
                f"{where} names {str(each)!r}, and no row of the source has that id; if rows have "
                "no ids, take the selection's own samples as the source"
            )
    return np.array([found[str(each)] for each in ids], np.int64)


def _numbers(source: Source, wanted: set[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for start in range(0, len(source), BLOCK):
        numbers = range(start, min(start + BLOCK, len(source)))
        for number, record in zip(numbers, source.read(numbers), strict=True):
            name = None if record is None else str(record.get("id"))
            if name in wanted:
                found[name] = number
    return found


def _selection_ids(path: Path) -> list[Any]:
    file = path
    if path.is_dir():
        file = next((f for f in (path / "ids.jsonl", path / "ids.parquet") if f.exists()), path)
        if file == path:
            raise PipelineError(f"{path} is not a selection: it holds no ids.jsonl or ids.parquet")
    if not file.exists():
        raise PipelineError(f"the selection {path} does not exist")
    try:
        if file.suffix == ".parquet":
            ids: list[Any] = extra("pyarrow.parquet").read_table(file)["id"].to_pylist()
            return ids
        if file.suffix == ".npy":
            numbers: list[Any] = np.load(file, allow_pickle=False).tolist()
            return numbers
    except (OSError, ValueError, KeyError) as cause:
        raise PipelineError(f"{file} holds no list of ids: {cause}") from None
    lines = JsonLines((str(file),))
    records = lines.read(range(len(lines)))
    for number, record in enumerate(records, 1):
        if "id" not in record:
            raise PipelineError(f"{file}, entry {number}: no field 'id'")
    return [record["id"] for record in records]
