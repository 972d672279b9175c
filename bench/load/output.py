"""The files of a result: tried before the run, which may take hours, and written whole or not."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltaserve.errors import ConfigError

PAGE = ".html"
LEAST_ROOM = 4096
"""Bytes; a disk without them is full already."""


def check_result(path: Path) -> None:
    """A result, and its page beside it, can be written there; missing folders are made.

    Raises:
        ConfigError: why not.
    """
    if path.suffix == PAGE:
        raise ConfigError(f"--out {path} names the JSON; its page, beside it, ends in {PAGE}")
    check_file(path)
    check_file(path.with_suffix(PAGE))


def check_file(path: Path) -> None:
    """Raises ConfigError: no file can be written there."""
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} cannot be written: it is not a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Tried, not asked for: permissions are not all that can be wrong.
        partial = _partial(path)
        try:
            partial.write_bytes(b" " * LEAST_ROOM)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise _not_written(path, error) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all. Raises ConfigError: not at all, and why."""
    write_text(path, json.dumps(content, separators=(",", ":"), allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all. Raises ConfigError: not at all, and why."""
    partial = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _not_written(path: Path, error: OSError) -> ConfigError:
    # mkdir says that something exists where a folder should be, open that it is none.
    number = errno.ENOTDIR if isinstance(error, FileExistsError) else error.errno
    reason = os.strerror(number).lower() if number else str(error)
    return ConfigError(f"{path} cannot be written: {reason}")
