"""Input pipelines: a plan of operators, run with exact state. See docs/pipeline.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaserve.pipeline.elements import register
    from deltaserve.pipeline.iterator import Pipeline, open_pipeline, prepare
    from deltaserve.pipeline.parallel import Share
    from deltaserve.pipeline.plan import Plan

__all__ = ["Pipeline", "Plan", "Share", "open_pipeline", "prepare", "register"]
_HOMES = {
    "Pipeline": "iterator",
    "Plan": "plan",
    "Share": "parallel",
    "open_pipeline": "iterator",
    "prepare": "iterator",
    "register": "elements",
}


def __getattr__(name: str) -> Any:
    """A plan can be built, printed and fingerprinted where Grain is not installed."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
