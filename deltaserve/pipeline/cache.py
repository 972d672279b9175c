"""Rows kept on the disk for every job that computes the same ones.

An entry is a folder named by a hash of all that decides its rows: the source's contents, the
operators, their code and parameters, tokenizers and templates. It fills shard by shard (``SHARD``
source rows each) as rows are asked for; a shard appears by renaming, whole or not at all, and
whoever makes it holds its lock, which ends with the process. A disk that is full or fails is
told once, and rows are then computed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaserve.errors import PipelineError
from deltaserve.pipeline.code import describe
from deltaserve.pipeline.node import UNIDENTIFIED, Node
from deltaserve.pipeline.operators import OPERATORS
from deltaserve.pipeline.room import USED, make_room
from deltaserve.pipeline.rows import Key, Row
from deltaserve.pipeline.shards import (
    DamagedShardError,
    Shard,
    encode,
    records_of,
    rows_of,
)
from deltaserve.pipeline.sources import Source
from deltaserve.pipeline.tokenizers import tokenizer_digest

# Source rows of one file: small, because a shuffled reader needs many files before its first row.
SHARD = 512
# Rows that are computed twice before an entry is begun.
TRIED = 8

Read = Callable[[list[Key]], tuple[list[Row], list[Key]]]


def default_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "deltaserve" / "pipeline"


@dataclass(frozen=True)
class CacheSettings:
    """directory: shared between jobs. max_bytes: of all entries together; those that were not
    used for the longest time are removed first."""

    directory: Path = field(default_factory=default_directory)
    max_bytes: int = 10 << 30


def cached_reader(
    read: Read,
    source_node: Node,
    source: Source,
    below: Sequence[Node],
    settings: CacheSettings | None,
    note: Callable[[str], None],
) -> Read:
    """``read`` (what the operators ``below`` a cache give for keys), from the cache.

    note: called with what the user should know."""
    settings = settings or CacheSettings()
    name = entry_name(settings.directory, source, below)
    return _Entry(settings, name, read, len(source), source_node.name, note)


def entry_name(directory: Path, source: Source, below: Sequence[Node]) -> str:
    """The hash of all that decides the rows above ``below``."""
    words = [source_digest(directory, source), str(SHARD)]
    for node in flattened(below):
        params = {k: v for k, v in node.params.items() if k not in UNIDENTIFIED}
        words += [node.op, str(OPERATORS[node.op].version), describe(params)]
        if "tokenizer" in node.params:
            words.append(tokenizer_digest(node.params["tokenizer"]))
            words += [importlib.metadata.version(p) for p in ("tokenizers", "transformers")]
    return hashlib.sha256(repr(words).encode()).hexdigest()[:32]


def flattened(nodes: Sequence[Node]) -> Iterator[Node]:
    """Fused operators as their parts, so that rewrites do not change the name of an entry."""
    for node in nodes:
        if node.op == "fused":
            yield from node.params["parts"]
        else:
            yield node


def source_digest(directory: Path, source: Source) -> str:
    """``source.digest()``, which reads everything, remembered as long as its files look the
    same (name, size, time of change, inode)."""
    files = getattr(source, "files", None)
    if not files:
        return source.digest()
    stats = [(os.path.abspath(f), os.stat(f)) for f in files]
    looks = [(name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats]
    known = directory / "digests" / hashlib.sha256(repr(looks).encode()).hexdigest()
    try:
        return known.read_text()
    except OSError:
        digest = source.digest()
    with contextlib.suppress(OSError):  # which is told when rows are written
        _publish(known, digest.encode())
    return digest


class _Entry:
    """The rows of one entry; what is missing is computed and kept."""

    def __init__(
        self,
        settings: CacheSettings,
        name: str,
        read: Read,
        rows: int,
        source: str,
        note: Callable[[str], None],
    ) -> None:
        self._settings, self._read, self._rows, self._source = settings, read, rows, source
        self._folder = settings.directory / name
        self._shards: dict[int, Shard] = {}
        self._writing, self._note = True, note
        self._warned = threading.Lock()
        self._used = -1
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Held, shared, as long as the entry is open: who removes entries asks for it alone.
            self._used = os.open(self._folder / USED, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(self._used, fcntl.LOCK_SH)
            os.utime(self._folder / USED)
        except OSError as cause:
            self._give_up(cause)

    def __call__(self, keys: list[Key]) -> tuple[list[Row], list[Key]]:
        wanted = dict.fromkeys(key[2] // SHARD for key in keys)
        # First those that nobody else is making.
        for wait in (False, True):
            for shard in self._missing(wanted):
                self._make(shard, wait)
        rows: list[Row] = []
        skipped: list[Key] = []
        for key in keys:
            kept = self._shards.get(key[2] // SHARD)
            if kept is None:  # nothing can be kept
                made, broken = self._read([key])
                rows += made
                skipped += broken
                continue
            record = kept.record(key[2] % SHARD)
            rows += rows_of(record, key)
            skipped += [key] if record is None else []
        return rows, skipped

    def __del__(self) -> None:
        if self._used >= 0:
            os.close(self._used)

    def _missing(self, wanted: dict[int, None]) -> list[int]:
        absent = [s for s in wanted if s not in self._shards and not self._opened(s)]
        return absent if self._writing else []

    def _opened(self, shard: int) -> bool:
        path = self._path(shard)
        try:
            self._shards[shard] = Shard(path)
        except FileNotFoundError:
            return False
        except DamagedShardError as cause:
            self._note(f"{cause}: it is made again")
            path.unlink(missing_ok=True)
            return False
        except OSError as cause:
            self._give_up(cause)
            return False
        return True

    def _make(self, shard: int, wait: bool) -> None:
        """Compute a shard and keep it, unless somebody else does; then wait for it, or not."""
        try:
            with self._lock(shard, wait) as mine:
                if not mine or self._opened(shard) or not self._writing:
                    return
                contents = self._compute(shard)
                make_room(self._settings, self._folder, len(contents))
                _publish(self._path(shard), contents)
                self._opened(shard)
        except OSError as cause:
            self._give_up(cause)

    def _compute(self, shard: int) -> bytes:
        start = shard * SHARD
        keys: list[Key] = [(0, 0, row) for row in range(start, min(start + SHARD, self._rows))]
        rows, skipped = self._read(keys)
        contents = encode(records_of(keys, rows, skipped))
        again = keys[:TRIED]
        first, broken = self._read(again)
        alike = [row for row in rows if row.key[:3] in set(again)]
        if encode(records_of(again, first, broken)) != encode(
            records_of(again, alike, [key for key in skipped if key in again])
        ):
            raise PipelineError(
                f"the rows of {self._source} below a cache come out differently when they are "
                "computed again: an operator draws random numbers of its own; declare it with "
                "random=True and put the cache below it"
            )
        return contents

    @contextlib.contextmanager
    def _lock(self, shard: int, wait: bool) -> Iterator[bool]:
        path = self._path(shard).with_suffix(".lock")
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            for left in self._folder.glob(f".{self._path(shard).name}.*"):
                left.unlink(missing_ok=True)  # by a process that was killed
            yield True
            # Whoever waits on the removed file finds the shard.
            path.unlink(missing_ok=True)
        finally:
            os.close(fd)

    def _path(self, shard: int) -> Path:
        return self._folder / f"{shard:08d}.rows"

    def _give_up(self, cause: OSError) -> None:
        with self._warned:
            if self._writing:
                self._writing = False
                why = cause.strerror or str(cause)
                self._note(
                    f"the cache {self._settings.directory} cannot keep more rows ({why}): what "
                    "it lacks is computed each time"
                )


def _publish(path: Path, contents: bytes) -> None:
    """A file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.{threading.get_ident()}"
    try:
        with temporary.open("wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def settings_of(value: Any) -> CacheSettings:
    """A CacheSettings, a directory, or None for the default. Raises PipelineError."""
    if value is None or isinstance(value, CacheSettings):
        return value or CacheSettings()
    if isinstance(value, (str, Path)):
        return CacheSettings(Path(value))
    raise PipelineError(f"a cache is a directory or a CacheSettings, not a {type(value).__name__}")
