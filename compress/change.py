"""One parameter on its way into a delta: did it change, and what stores it?"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltaserve.artifact.checkpoint import HEAD, Checkpoint
from deltaserve.artifact.codecs.base import Encoded, aligned, is_finite
from deltaserve.artifact.codecs.rows import RowsCodec
from deltaserve.compress.classify import classify
from deltaserve.compress.encode import encode_measured
from deltaserve.compress.hessian import Hessian
from deltaserve.compress.plan import SKIP, Plan
from deltaserve.errors import CheckpointError, CodecError


@dataclass(frozen=True)
class Change:
    """One parameter on its way into the delta; enc None: the base's values serve, because it
    did not change or because its change is left out (error 1)."""

    name: str
    kind: str
    enc: Encoded | None
    error: float
    full_bytes: int


def compare(
    name: str,
    base: Checkpoint,
    model: Checkpoint,
    plan: Plan,
    hessian: Hessian | None = None,
) -> Change:
    """What became of a parameter; with a Hessian of its inputs, quantised under it.

    Raises CheckpointError for values that are not finite, CodecError for a codec that
    cannot store the parameter.
    """
    tensor, reference = model.tensor(name), base.tensor(name)
    for checkpoint, values in ((base, reference), (model, tensor)):
        _require_finite(checkpoint, name, values)
    kind = classify(name, tuple(tensor.shape))
    # A head tied to the embedding is not stored by the fine-tune itself.
    full = 0 if name == HEAD and model.tied else tensor.numel() * tensor.element_size()
    if same(tensor, reference):
        if _untied(name, base):
            return Change(name, kind, base_head(reference), 0.0, full)
        return Change(name, kind, None, 0.0, full)
    choice = plan.choose(name, kind, tensor, reference)
    if choice == SKIP and tensor.shape == reference.shape:
        return Change(name, kind, base_head(reference) if _untied(name, base) else None, 1.0, full)
    try:
        enc, error = encode_measured(choice, tensor, reference, hessian, plan.solver)
    except CodecError as cause:
        raise CodecError(f"{name}: {cause}") from None
    return Change(name, kind, enc, error, full)


def _untied(name: str, base: Checkpoint) -> bool:
    """A head of its own, over a base that has none: it must be said that it is the base's."""
    return name == HEAD and base.tied


def check_finite(*checkpoints: Checkpoint) -> None:
    """Raises CheckpointError for the first parameter that holds NaN or infinite values."""
    for checkpoint in checkpoints:
        for name in checkpoint.names():
            _require_finite(checkpoint, name, checkpoint.tensor(name))


def _require_finite(checkpoint: Checkpoint, name: str, values: torch.Tensor) -> None:
    if not is_finite(values):
        raise CheckpointError(
            f"{checkpoint.file(name)}: {name} holds NaN or infinite values; "
            "the model is damaged, use a sound checkpoint"
        )


def base_head(head: torch.Tensor) -> Encoded:
    """An entry without rows: says that the head is the base's although the embedding changed."""
    return RowsCodec().encode(head, head)


def same(tensor: torch.Tensor, base: torch.Tensor) -> bool:
    """Equal shape and bits; across dtypes, equal bits once both are converted exactly."""
    if tensor.shape != base.shape:
        return False
    if tensor.dtype != base.dtype:
        common = torch.promote_types(tensor.dtype, base.dtype)
        tensor, base = tensor.to(common), aligned(base, tuple(base.shape), common)
    if tensor.numel() == 0:
        return True
    bits = (t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, base))
    return torch.equal(*bits)
