"""What residency works with, so that its decisions can be tested without files and layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from deltaserve.artifact.reader import Delta
from deltaserve.engine.loader import Background
from deltaserve.engine.operands import Image, Needs, Operands
from deltaserve.engine.probe import Savings
from deltaserve.engine.versions import DeltaVersion


class Source(Protocol):
    """Where artifacts come from. ``read`` runs in a background thread."""

    def open(self, path: str) -> Delta: ...

    def read(self, version: DeltaVersion) -> Delta: ...


class Maker(Protocol):
    """What becomes of them. All but ``needs`` and ``ready`` runs in a background thread.

    copies: whether host memory keeps what ``copy`` makes of operands, from which ``make`` is
    faster than from the artifact. stage: what host memory keeps of an artifact. ready: operands
    for which nothing is left to be done, or None.
    """

    @property
    def copies(self) -> bool: ...

    def needs(self, delta: Delta) -> Needs: ...

    def stage(self, delta: Delta) -> Image: ...

    def ready(self, image: Image) -> Operands | None: ...

    def make(self, image: Image) -> Operands: ...

    def copy(self, operands: Operands) -> Operands: ...

    def merge(self, delta: Delta) -> Operands: ...


class Gauge(Protocol):
    """What merging would save. Runs in a background thread, after ``make``."""

    def savings(self, operands: Operands) -> Savings: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """base: as requests are bound to it."""

    source: Source
    maker: Maker
    gauge: Gauge
    loader: Background
    base: DeltaVersion
