"""One parameter on its way into a delta: did it change, and what stores it?"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltaserve.artifact.checkpoint import HEAD, Checkpoint
from deltaserve.artifact.codecs import get_codec
from deltaserve.artifact.codecs.base import Encoded, aligned, is_finite
from deltaserve.artifact.codecs.int import IntParams
from deltaserve.artifact.codecs.nm24 import Nm24Params
from deltaserve.artifact.codecs.rows import RowsCodec
from deltaserve.compress.classify import classify
from deltaserve.compress.errors import relative_error
from deltaserve.compress.gptq import encode_int, encode_nm24
from deltaserve.compress.hessian import Hessian
from deltaserve.compress.plan import CodecChoice, Plan
from deltaserve.errors import CheckpointError, CodecError


@dataclass(frozen=True)
class Change:
    """One parameter on its way into the delta; enc None: it did not change."""

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
        if name == HEAD and base.tied:
            return Change(name, kind, base_head(reference), 0.0, full)
        return Change(name, kind, None, 0.0, full)
    choice = plan.choose(name, kind, tensor, reference)
    try:
        enc = encode(choice, tensor, reference, hessian)
    except CodecError as cause:
        raise CodecError(f"{name}: {cause}") from None
    return Change(name, kind, enc, relative_error(enc, tensor, reference), full)


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


def encode(
    choice: CodecChoice, tensor: torch.Tensor, base: torch.Tensor | None, hessian: Hessian | None
) -> Encoded:
    """``tensor`` in the chosen codec, its codes chosen under the Hessian where they can be."""
    if hessian is not None and calibratable(choice, tuple(tensor.shape)):
        if choice.codec == "nm24":
            return encode_nm24(tensor, base, Nm24Params(**choice.params), hessian)
        return encode_int(tensor, base, IntParams(**choice.params), hessian)
    return get_codec(choice.codec).encode(tensor, base, **choice.params)


def calibratable(choice: CodecChoice, shape: tuple[int, ...]) -> bool:
    """Can error feedback choose the codes? One symmetric plane, one scale per group or row."""
    if choice.codec == "nm24":
        return shape[-1] % 4 == 0
    if choice.codec != "int":
        return False
    p = IntParams(**choice.params)
    return p.symmetric and p.planes == 1 and p.scale_axis in ("group", "row")


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
