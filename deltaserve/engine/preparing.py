"""What background threads do for a version: from files to operands, and to dense projections."""

from __future__ import annotations

from dataclasses import dataclass

from deltaserve.artifact.reader import Delta
from deltaserve.engine.operands import Image, Operands
from deltaserve.engine.parts import Gauge, Maker, Source
from deltaserve.engine.probe import Savings
from deltaserve.engine.versions import DeltaVersion


@dataclass(frozen=True, slots=True)
class Prepared:
    """image: what host memory may keep. operands: what the layers get, unless it was only to be
    staged. savings: what merging would save, where operands were made and could be merged."""

    image: Image
    operands: Operands | None
    savings: Savings | None


class Preparer:
    """The work of each kind of job. Raises ArtifactError for what cannot be read."""

    def __init__(self, source: Source, maker: Maker, gauge: Gauge) -> None:
        self.source, self.maker, self.gauge = source, maker, gauge

    def stage(self, version: DeltaVersion, mergeable: bool) -> Prepared:
        """As far as host memory goes."""
        image = self.maker.stage(self.source.read(version))
        return self._prepared(image, self.maker.ready(image), mergeable)

    def load(self, version: DeltaVersion, mergeable: bool) -> Prepared:
        """All the way to the device."""
        image = version.image or self.maker.stage(self.source.read(version))
        return self._prepared(image, self.maker.make(image), mergeable)

    def merge(self, version: DeltaVersion) -> Operands:
        """Its packed projections with the base's, dense."""
        image = version.image
        return self.maker.merge(image if isinstance(image, Delta) else self.source.read(version))

    def _prepared(self, image: Image, operands: Operands | None, mergeable: bool) -> Prepared:
        measured = self.gauge.savings(operands) if mergeable and operands else None
        return Prepared(image, operands, measured)
