"""Files of samples in their own format: JSON Lines, Parquet, Hugging Face datasets.

A source streams its records; ``write`` streams the chosen ones into the same format, so that
neither ever holds a file in memory.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from deltaserve.errors import SelectionError
from deltaserve.select.extras import load_extra

Record = dict[str, Any]
BATCH = 1024
JSON_LINES = (".jsonl", ".ndjson", ".json")
STEM = "samples"


class Source(Protocol):
    """One file, or one dataset."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    def records(self, columns: Sequence[str]) -> Iterator[tuple[str, Record]]:
        """(where, record) in order; at least those of ``columns`` that exist. ``where`` names
        the file and the line or row. Raises SelectionError for what cannot be read."""


class JsonLines:
    """A file with one JSON object a line; empty lines do not count."""

    kind = "jsonl"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)

    def records(self, columns: Sequence[str]) -> Iterator[tuple[str, Record]]:
        for number, line in self.lines():
            where = f"{self.path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as cause:
                raise SelectionError(f"{where}: not JSON: {cause}") from None
            if not isinstance(record, dict):
                raise SelectionError(f"{where}: not a JSON object, but a {type(record).__name__}")
            yield where, record

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Line numbers from 1, and lines without their end."""
        with _opened(self.path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.rstrip(b"\r\n")


class Parquet:
    """A Parquet file."""

    kind = "parquet"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        with _opened(path):  # a missing file is told apart from a damaged one
            pass
        arrow = load_extra("pyarrow")
        try:
            self.file = load_extra("pyarrow.parquet").ParquetFile(path)
        except (arrow.ArrowException, OSError) as cause:
            raise SelectionError(f"{path} is not a readable Parquet file: {cause}") from None

    def records(self, columns: Sequence[str]) -> Iterator[tuple[str, Record]]:
        wanted = [name for name in self.file.schema_arrow.names if name in columns]
        row = itertools.count()
        for batch in self.file.iter_batches(BATCH, columns=wanted):
            for record in batch.to_pylist():
                yield f"{self.path}, row {next(row)}", record


class Dataset:
    """A ``datasets.Dataset``."""

    kind = "dataset"

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset = dataset.with_format(None)
        self.name = name

    def records(self, columns: Sequence[str]) -> Iterator[tuple[str, Record]]:
        wanted = [name for name in self.dataset.column_names if name in columns]
        row = itertools.count()
        for batch in self.dataset.select_columns(wanted).iter(BATCH):
            for values in zip(*batch.values(), strict=True):
                where = f"{self.name}, row {next(row)}"
                yield where, dict(zip(wanted, values, strict=True))


def open_sources(pool: Any) -> list[Source]:
    """The sources of a path, several paths, a ``datasets.Dataset``, or a directory of files.

    Raises SelectionError if there are none, or files of several formats.
    """
    given = list(pool) if isinstance(pool, (list, tuple)) else [pool]
    sources = [source for each in given for source in _open(each)]
    kinds = sorted({source.kind for source in sources})
    if len(kinds) > 1:
        raise SelectionError(
            f"the pool mixes {' and '.join(kinds)}; the selected samples are written in the "
            "pool's format, so give files of one"
        )
    if not sources:
        raise SelectionError(f"{pool} holds no samples: give .jsonl or .parquet files")
    return sources


def write_samples(sources: Sequence[Source], chosen: np.ndarray, folder: Path) -> Path:
    """Write the records where ``chosen`` (bool [n], over all sources) into ``folder``.

    They keep the pool's order. Returns samples.jsonl, samples.parquet or samples/.
    """
    kind = sources[0].kind
    writer = {"jsonl": _write_lines, "parquet": _write_parquet, "dataset": _write_dataset}[kind]
    return writer(sources, chosen, folder)


def _open(pool: Any) -> list[Source]:
    if not isinstance(pool, (str, Path)):
        # By its name: importing datasets to ask would make everybody install it.
        if type(pool).__module__.startswith("datasets.") and type(pool).__name__ == "Dataset":
            return [Dataset(pool, "dataset")]
        raise SelectionError(
            f"a pool is a path, several paths or a datasets.Dataset, not a {type(pool).__name__}"
        )
    path = Path(pool)
    if not path.is_dir():
        return [_open_file(path)]
    if (path / "dataset_dict.json").exists():
        splits = ", ".join(sorted(str(p) for p in path.iterdir() if p.is_dir()))
        raise SelectionError(f"{path} holds several splits; name one of {splits}")
    if (path / "dataset_info.json").exists():
        datasets = load_extra("datasets")
        return [Dataset(datasets.load_from_disk(str(path)), str(path))]
    files = sorted(p for p in path.rglob("*") if p.suffix in (*JSON_LINES, ".parquet"))
    return [_open_file(file) for file in files]


def _open_file(path: Path) -> Source:
    if path.suffix == ".parquet":
        return Parquet(path)
    if path.suffix in JSON_LINES:
        return JsonLines(path)
    raise SelectionError(
        f"{path}: a pool is .jsonl or .parquet files, or a directory written by save_to_disk"
    )


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as cause:
        raise SelectionError(f"{path} cannot be read: {cause.strerror}") from None


def _pieces(sources: Sequence[Any], sizes: Iterable[int], chosen: np.ndarray) -> Iterator[Any]:
    """Each source with its part of ``chosen``."""
    start = 0
    for source, size in zip(sources, sizes, strict=True):
        yield source, chosen[start : start + size]
        start += size
    assert start == len(chosen)


def _write_lines(sources: Sequence[Any], chosen: np.ndarray, folder: Path) -> Path:
    out, row = folder / f"{STEM}.jsonl", itertools.count()
    with out.open("wb") as file:
        for source in sources:
            file.writelines(line + b"\n" for _, line in source.lines() if chosen[next(row)])
    return out


def _write_parquet(sources: Sequence[Any], chosen: np.ndarray, folder: Path) -> Path:
    parquet, arrow = load_extra("pyarrow.parquet"), load_extra("pyarrow")
    out, schema = folder / f"{STEM}.parquet", sources[0].file.schema_arrow
    sizes = [source.file.metadata.num_rows for source in sources]
    with parquet.ParquetWriter(out, schema) as writer:
        for source, keep in _pieces(sources, sizes, chosen):
            if not source.file.schema_arrow.equals(schema):
                raise SelectionError(
                    f"{source.path} has other columns than {sources[0].path}; give files of one "
                    "schema"
                )
            start = 0
            for batch in source.file.iter_batches(BATCH):
                mask = keep[start : start + batch.num_rows]
                start += batch.num_rows
                if mask.any():
                    writer.write_batch(batch.filter(arrow.array(mask)))
    return out


def _write_dataset(sources: Sequence[Any], chosen: np.ndarray, folder: Path) -> Path:
    datasets = load_extra("datasets")
    sizes = [len(source.dataset) for source in sources]
    parts = [
        source.dataset.select(np.flatnonzero(keep))
        for source, keep in _pieces(sources, sizes, chosen)
    ]
    out = folder / STEM
    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        whole = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
        whole.save_to_disk(str(out))
    finally:
        if shown:
            datasets.enable_progress_bars()
    return out
