"""Output files and directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deltaserve.errors import ConfigError, OutputExistsError


def require_free(out: Path) -> None:
    """Raises OutputExistsError unless ``out`` is absent or an empty directory."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise OutputExistsError(
            f"{out} exists and is not empty; remove it or choose another output directory"
        )


class StagedDirectory:
    """A sibling temporary directory that ``commit`` renames to ``out``.

    Leaving the ``with`` block without ``commit`` (an error, Ctrl-C) removes it, together
    with the parent directories that were made for it.
    """

    def __init__(self, out: str | os.PathLike[str]) -> None:
        self.out = Path(os.path.abspath(out))
        self.path = self.out
        self._made: list[Path] = []

    def __enter__(self) -> StagedDirectory:
        require_free(self.out)
        try:
            self._make_parents()
            # The same file system as the target: the final rename is atomic.
            self.path = Path(
                tempfile.mkdtemp(
                    prefix=f".{self.out.name}.", suffix=".partial", dir=self.out.parent
                )
            )
        except (FileExistsError, NotADirectoryError):
            raise ConfigError(
                f"cannot create {self.out}: a file is in the way; choose another directory"
            ) from None
        return self

    def commit(self) -> None:
        """Make the directory visible under its final name."""
        umask = os.umask(0)
        os.umask(umask)
        self.path.chmod(0o777 & ~umask)  # mkdtemp is private; an artifact is meant to be shared
        sync(self.path)
        require_free(self.out)
        self.path.rename(self.out)
        sync(self.out.parent)
        self._made = []

    def __exit__(self, *exc: object) -> None:
        if self.path != self.out and self.path.exists():
            shutil.rmtree(self.path)
        for parent in self._made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()

    def _make_parents(self) -> None:
        missing = [p for p in self.out.parents if not p.exists()]
        self._made = missing
        self.out.parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """``with replacing(path) as partial``: write to ``partial``, a hidden name beside ``path``
    that takes its place at the end. An error leaves what was at ``path``, and nothing else.

    durable: it survives a power cut.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        if durable:
            sync(partial)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def sync(path: Path) -> None:
    """Make a file's contents, or a directory's entries, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a small file and flush it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
