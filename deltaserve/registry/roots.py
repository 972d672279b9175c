"""The directories from which deltas may be served; nothing leads out of them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from deltaserve.errors import ConfigError, RequestError


class Roots:
    """Confines paths. What exists outside is not told either: all refusals are alike.

    A link may still be changed between the check and the opening, by whoever may write inside
    a root. What is loaded then has another digest than what was registered, and is refused.
    """

    def __init__(self, directories: Iterable[Path]) -> None:
        """Raises ConfigError for a root that is no directory."""
        self._roots = []
        for directory in directories:
            root = Path(os.path.realpath(Path(directory).expanduser()))
            if not root.is_dir():
                raise ConfigError(f"{directory} is not a directory, so no delta can be there")
            self._roots.append(root)

    def resolve(self, path: str) -> Path:
        """The real directory that ``path`` names; relative ones start at each root in turn.

        Raises RequestError if there is none, or if it holds anything but files and directories
        that are inside a root: its links may lead from one delta to another, not elsewhere.
        """
        for root in self._roots:
            try:
                directory = Path(os.path.realpath(root / path, strict=True))
                if directory.is_dir() and self._holds_all(directory):
                    return directory
            except (OSError, ValueError):  # absent, unreadable, a circle of links, a null byte
                continue
        where = "one of the configured delta_roots" if self._roots else "delta_roots: there is none"
        raise RequestError(f"{path[:512]!r} is no directory inside {where}", param="path")

    def _holds_all(self, directory: Path) -> bool:
        if not self._holds(directory):
            return False
        for folder, _, files in os.walk(directory):
            for name in files:
                file = Path(os.path.realpath(Path(folder, name), strict=True))
                if not (self._holds(file) and file.is_file()):
                    return False
        return True

    def _holds(self, real: Path) -> bool:
        return any(real.is_relative_to(root) for root in self._roots)
