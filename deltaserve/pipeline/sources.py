"""Sources: rows by number, so that shuffles, splits and resumption need no buffer.

``read`` is called from several threads at once.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltaserve.errors import PipelineError
from deltaserve.pipeline.lines import LineFile, files_of

# Decoded row groups that a Parquet source keeps.
ROW_GROUP_BYTES = 256 << 20
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
EXTRA = "pip install 'deltaserve[pipeline]'"


class Source(ABC):
    """Numbered rows. ``bytes_read`` counts what ``read`` took from the files."""

    def __init__(self) -> None:
        self.bytes_read = 0

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, indices: Sequence[int]) -> list[Any]:
        """The rows; None for one that is skipped because it is broken. Raises PipelineError
        naming the file and the line or row."""

    def weight(self, indices: Sequence[int] | None = None) -> float:
        """How much of the source these rows are (None: all): bytes where they are lines of files,
        else their number."""
        return float(len(self) if indices is None else len(indices))

    def where(self, index: int) -> str:
        """The file and line of a row, or nothing if that is not known."""
        return ""

    @abstractmethod
    def digest(self) -> str:
        """A hash of the contents, not of names or times."""

    def close(self) -> None:  # noqa: B027 - most have nothing to release
        """Release files."""


class _Files(Source):
    """Several files, one after the other; ``self._starts`` holds the number of each one's
    first row, and the number of all rows at the end."""

    def __init__(self, files: list[str], sizes: list[int]) -> None:
        super().__init__()
        self.files = files
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64).tolist()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _place(self, index: int) -> tuple[int, int]:
        """Which file, and which row of it."""
        file = bisect_right(self._starts, index) - 1
        return file, index - self._starts[file]

    def where(self, index: int) -> str:
        file, at = self._place(index)
        return f"{self.files[file]}, row {at}"

    def _line_weight(self, lines: list[LineFile], indices: Sequence[int] | None) -> float:
        if indices is None:
            return float(sum(each.bytes for each in lines))
        places = map(self._place, indices)
        return float(sum(lines[file].size(at) for file, at in places))

    def digest(self) -> str:
        hashed = hashlib.sha256()
        for file in self.files:
            with open(file, "rb") as opened:
                hashed.update(hashlib.file_digest(opened, "sha256").digest())
        return hashed.hexdigest()


class JsonLines(_Files):
    """One JSON object a line."""

    def __init__(self, paths: tuple[str, ...], on_error: str = "raise") -> None:
        files = files_of(paths, JSON_SUFFIXES)
        self._lines = [LineFile(file) for file in files]
        super().__init__(files, [len(each) for each in self._lines])
        self._skip = on_error == "skip"

    def read(self, indices: Sequence[int]) -> list[Any]:
        return [self._read(index) for index in indices]

    def _read(self, index: int) -> Any:
        file, at = self._place(index)
        lines = self._lines[file]
        line = lines.read(at)
        self.bytes_read += len(line) + 1
        try:
            record = json.loads(line)
            if isinstance(record, dict):
                return record
            wrong = f"not a JSON object, but a {type(record).__name__}"
        except ValueError as cause:
            wrong = f"not JSON: {cause}"
        if self._skip:
            return None
        raise PipelineError(f'{lines.where(at)}: {wrong} (on_error="skip" passes over such lines)')

    def weight(self, indices: Sequence[int] | None = None) -> float:
        return self._line_weight(self._lines, indices)

    def where(self, index: int) -> str:
        file, at = self._place(index)
        return self._lines[file].where(at)

    def close(self) -> None:
        for lines in self._lines:
            lines.close()


class Text(_Files):
    """A row {"text"} is a line, or a whole file."""

    def __init__(self, paths: tuple[str, ...], by: str = "line") -> None:
        files = files_of(paths, (".txt", ".md", ".text"))
        self._lines = [LineFile(file) for file in files] if by == "line" else None
        sizes = [len(each) for each in self._lines] if self._lines else [1] * len(files)
        super().__init__(files, sizes)

    def read(self, indices: Sequence[int]) -> list[Any]:
        return [self._read(index) for index in indices]

    def _read(self, index: int) -> dict[str, str]:
        file, at = self._place(index)
        raw = self._lines[file].read(at) if self._lines else Path(self.files[file]).read_bytes()
        self.bytes_read += len(raw)
        try:
            return {"text": raw.decode()}
        except UnicodeDecodeError as cause:
            raise PipelineError(f"{self.where(index)}: not UTF-8: {cause}") from None

    def weight(self, indices: Sequence[int] | None = None) -> float:
        return self._line_weight(self._lines, indices) if self._lines else super().weight(indices)

    def where(self, index: int) -> str:
        file, at = self._place(index)
        return self._lines[file].where(at) if self._lines else self.files[file]

    def close(self) -> None:
        for lines in self._lines or ():
            lines.close()


class Parquet(_Files):
    """Parquet files. A row is read with its row group, of which some are kept decoded."""

    def __init__(self, paths: tuple[str, ...], columns: tuple[str, ...] | None = None) -> None:
        files = files_of(paths, (".parquet",))
        self._parquet, self._arrow = extra("pyarrow.parquet"), extra("pyarrow")
        self._open = [self._opened(file, columns) for file in files]
        super().__init__(files, [file.metadata.num_rows for file in self._open])
        self._paths = paths
        self._columns = list(columns) if columns else None
        self._groups = [
            np.cumsum([0] + [f.metadata.row_group(g).num_rows for g in range(f.num_row_groups)])
            for f in self._open
        ]
        self._kept: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()

    def read(self, indices: Sequence[int]) -> list[Any]:
        rows: list[Any] = [None] * len(indices)
        wanted: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for place, index in enumerate(indices):
            file, at = self._place(index)
            group = int(np.searchsorted(self._groups[file], at, side="right")) - 1
            wanted.setdefault((file, group), []).append((place, at - self._groups[file][group]))
        for which, places in wanted.items():
            table = self._group(*which).take([at for _, at in places]).to_pylist()
            for (place, _), record in zip(places, table, strict=True):
                rows[place] = record
        return rows

    def __reduce__(self) -> Any:
        columns = tuple(self._columns) if self._columns else None
        return Parquet, (self._paths, columns)

    def _opened(self, path: str, columns: tuple[str, ...] | None) -> Any:
        try:
            file = self._parquet.ParquetFile(path)
        except (self._arrow.ArrowException, OSError) as cause:
            raise PipelineError(f"{path} is not a readable Parquet file: {cause}") from None
        for name in columns or ():
            if name not in file.schema_arrow.names:
                has = ", ".join(file.schema_arrow.names)
                raise PipelineError(f"{path} has no column {name!r}; it has {has}")
        return file

    def _group(self, file: int, group: int) -> Any:
        with self._lock:
            if (file, group) in self._kept:
                self._kept.move_to_end((file, group))
                return self._kept[file, group]
            try:
                table = self._open[file].read_row_group(group, columns=self._columns)
            except (self._arrow.ArrowException, OSError) as cause:
                raise PipelineError(f"{self.files[file]}, row group {group}: {cause}") from None
            self.bytes_read += self._open[file].metadata.row_group(group).total_byte_size
            self._kept[file, group] = table
            self._kept_bytes += table.nbytes
            while self._kept_bytes > ROW_GROUP_BYTES and len(self._kept) > 1:
                self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
            return table

    def close(self) -> None:
        for file in self._open:
            file.close()


class Dataset(Source):
    """A ``datasets.Dataset``."""

    def __init__(self, dataset: Any = None, path: str | None = None) -> None:
        super().__init__()
        if path is not None:
            dataset = _load_dataset(path)
        if not hasattr(dataset, "with_format") or not hasattr(dataset, "__len__"):
            raise PipelineError(
                "from_dataset takes a datasets.Dataset or the directory of one, not a "
                f"{type(dataset).__name__}; of a DatasetDict, name the split"
            )
        self._dataset = dataset.with_format(None)

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, indices: Sequence[int]) -> list[Any]:
        columns = self._dataset[list(indices)]
        names = list(columns)
        return [
            dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)
        ]

    def digest(self) -> str:
        return f"dataset {self._dataset._fingerprint} {len(self)}"


class Tokens(_Files):
    """Token ids in shards, memory-mapped; a row is up to ``length`` of one shard."""

    def __init__(self, paths: tuple[str, ...], length: int, dtype: str = "uint16") -> None:
        files = files_of(paths, (".npy", ".bin"))
        self._shards = [_shard(file, dtype) for file in files]
        self._length = length
        self._given = (paths, length, dtype)
        super().__init__(files, [-(-len(shard) // length) for shard in self._shards])

    def read(self, indices: Sequence[int]) -> list[Any]:
        rows = []
        for index in indices:
            file, at = self._place(index)
            ids = self._shards[file][at * self._length : (at + 1) * self._length]
            self.bytes_read += ids.nbytes
            rows.append({"input_ids": ids.astype(np.int32)})
        return rows

    def __reduce__(self) -> Any:
        return Tokens, self._given  # else the shards would travel


KINDS: Mapping[str, Callable[..., Source]] = {
    "jsonl": JsonLines,
    "parquet": Parquet,
    "dataset": Dataset,
    "text": Text,
    "tokens": Tokens,
}


def open_source(node: Any) -> Source:
    """The source that a plan's node names. Raises PipelineError."""
    if node.op == "index":
        from deltaserve.pipeline.selected import Selected

        return Selected(node.params["selection"], open_source(node.inputs[0]))
    return KINDS[node.op](**node.params)


def extra(name: str) -> Any:
    """A module that only this room needs. Raises PipelineError saying what to install."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as cause:
        package = name.partition(".")[0]
        if (cause.name or "").partition(".")[0] != package:
            raise
        raise PipelineError(f"this pipeline needs {package}: {EXTRA}") from None


def _load_dataset(path: str) -> Any:
    if not Path(path).is_dir():
        raise PipelineError(f"{path} is not a directory that datasets.save_to_disk wrote")
    try:
        return extra("datasets").load_from_disk(path)
    except (OSError, ValueError) as cause:
        raise PipelineError(f"{path} is not a readable dataset: {cause}") from None


def _shard(file: str, dtype: str) -> np.ndarray:
    try:
        if file.endswith(".npy"):
            ids = np.load(file, mmap_mode="r", allow_pickle=False)
        else:
            ids = np.memmap(file, np.dtype(dtype), mode="r")
    except (OSError, ValueError, TypeError) as cause:
        raise PipelineError(f"{file} is not a readable shard of tokens: {cause}") from None
    if ids.ndim != 1 or ids.dtype.kind not in "ui":
        raise PipelineError(f"{file} holds {ids.dtype} {list(ids.shape)}, not a list of token ids")
    return ids
