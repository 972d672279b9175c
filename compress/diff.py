"""What a fine-tune changed, parameter by parameter; nothing is written."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.artifact.codecs.base import FLOATS, difference, is_finite
from deltaserve.artifact.codecs.rows import changed_rows
from deltaserve.compress.classify import classify
from deltaserve.compress.common import PathLike, Progress, silent
from deltaserve.compress.compat import check_compatible
from deltaserve.errors import CheckpointError

# Larger matrices are looked at through this many random projections of their rows.
SKETCH = 512
# When ``suits`` names another codec than int: few rows changed, few values, or factors in 16 bits
# that hold 90 % of the change take less per value than codes of two bits.
FEW_ROWS, MOSTLY_EQUAL, LOW_RANK_BITS = 0.5, 0.9, 2.0
_LAYER = re.compile(r"\.(?:layers|h|blocks|block)\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class ParameterDiff:
    """unchanged: share of equal values. norm: ||delta||; relative: ||delta|| / ||base||.

    rows: share of rows that changed. effective_rank: exp of the entropy of the normalised
    singular values (Roy and Vetterli, EUSIPCO 2007), 0 for no change and for vectors.
    energy_rank: singular vectors that hold 90 % of the squared norm.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    unchanged: float
    rows: float
    norm: float
    relative: float
    effective_rank: float
    energy_rank: int

    @property
    def full_rank(self) -> int:
        """What ``effective_rank`` is at most; 0 for vectors."""
        return min(SKETCH, math.prod(self.shape[:-1]), self.shape[-1]) if self.shape[1:] else 0

    @property
    def place(self) -> tuple[str, str]:
        """(layer, what it is there): ("layer 3", "q_proj"); ("", its name) outside of layers."""
        match = _LAYER.search(self.name)
        if match is None:
            return "", self.name.removesuffix(".weight").removeprefix("model.")
        module = match[2].removesuffix(".weight").split(".")
        return f"layer {match[1]}", ".".join(module[-2:] if module[-1] == "bias" else module[-1:])

    @property
    def suits(self) -> str:
        """The codec that such a change asks for; "" if nothing changed. A rule of thumb: what
        ``compress`` takes, it has tried."""
        if self.unchanged == 1:
            return ""
        if len(self.shape) < 2:
            return "raw"
        if self.rows < FEW_ROWS:
            return "rows"
        if self.unchanged > MOSTLY_EQUAL:
            return "sparse"
        *outputs, inputs = self.shape
        bits = 16 * self.energy_rank * (1 / inputs + 1 / math.prod(outputs))
        return "lowrank" if bits < LOW_RANK_BITS else "int"


def diff(base: PathLike, model: PathLike, progress: Progress = silent) -> Iterator[ParameterDiff]:
    """Every parameter of the fine-tune, in order of names; one in memory at a time.

    Ranks of matrices above 512 on their shorter side are those of a random sketch of 512
    rows (Halko et al., SIAM Review 2011), so they are at most 512. Raises CheckpointError,
    CompatibilityError, CodecError.
    """
    origin, tuned = Checkpoint.open(base), Checkpoint.open(model)
    done = 0
    for name in check_compatible(origin, tuned):
        tensor, reference = tuned.tensor(name), origin.tensor(name)
        done += tensor.numel() * tensor.element_size()
        progress("diff", min(done, tuned.num_bytes), tuned.num_bytes)
        for checkpoint, values in ((origin, reference), (tuned, tensor)):
            if not is_finite(values):
                raise CheckpointError(f"{checkpoint.file(name)}: {name} holds NaN or infinity")
        if tensor.dtype in FLOATS:
            yield _diff(name, tensor, reference)


def _diff(name: str, tensor: torch.Tensor, reference: torch.Tensor) -> ParameterDiff:
    shape = tuple(tensor.shape)
    delta = difference(tensor, reference)
    norm, size = (float(torch.linalg.vector_norm(x.double())) for x in (delta, reference))
    rows = len(changed_rows(tensor, reference)) / shape[0] if shape and shape[0] else 0.0
    effective, energy = _ranks(delta) if delta.dim() >= 2 and norm else (0.0, 0)
    return ParameterDiff(
        name=name,
        kind=classify(name, shape),
        shape=shape,
        unchanged=float((delta == 0).double().mean()) if delta.numel() else 1.0,
        rows=rows,
        norm=norm,
        relative=norm / size if size else 0.0,
        effective_rank=effective,
        energy_rank=energy,
    )


def _ranks(delta: torch.Tensor) -> tuple[float, int]:
    """Effective rank, and how many singular vectors hold 90 % of the energy."""
    matrix_NK = delta.flatten(0, -2)
    if matrix_NK.shape[0] > matrix_NK.shape[1]:
        matrix_NK = matrix_NK.T
    if matrix_NK.shape[0] > SKETCH:
        generator = torch.Generator().manual_seed(0)
        matrix_NK = torch.randn(SKETCH, matrix_NK.shape[0], generator=generator) @ matrix_NK
    # Scaled to about 1: LAPACK squares values on the way.
    s_N = torch.linalg.svdvals(matrix_NK / matrix_NK.abs().max()).double()
    p_N = s_N / s_N.sum()
    entropy = -torch.special.xlogy(p_N, p_N).sum()
    energy_N = s_N.square().cumsum(0) / s_N.square().sum()
    return float(entropy.exp()), int((energy_N < 0.9).sum()) + 1
