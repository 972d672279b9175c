"""Libraries that only this room needs, imported when used."""

from __future__ import annotations

import importlib
from typing import Any

from deltaserve.errors import SelectionError

# What `pip install 'deltaserve[select]'` brings; datasets is left to those who use it.
HINTS = {"datasets": "pip install datasets", "ray": "pip install 'deltaserve[select,ray]'"}
EXTRA = "pip install 'deltaserve[select]'"


def load_extra(name: str) -> Any:
    """The module ``name``. Raises SelectionError saying what to install."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as cause:
        package = name.partition(".")[0]
        if (cause.name or "").partition(".")[0] != package:
            raise
        hint = HINTS.get(package, EXTRA)
        raise SelectionError(f"data selection needs {package}: {hint}") from None


def require_extra() -> None:
    """Raises SelectionError unless everything that the extra brings can be imported."""
    for name in ("numba", "faiss", "pyarrow"):
        load_extra(name)
