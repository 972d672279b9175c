"""Hashes of files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path


def files_digest(files: Mapping[str, Path], text: str) -> str:
    """A hash of files under their names, and of a text."""
    hashed = hashlib.sha256(text.encode())
    for name in sorted(files):
        with files[name].open("rb") as opened:
            hashed.update(name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return hashed.hexdigest()
