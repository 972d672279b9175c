"""Which implementation of the delta matmul serves an operand, and saying so."""

from __future__ import annotations

import logging
from functools import cache

import torch

from deltaserve.artifact.codecs.base import Encoded
from deltaserve.kernels.delta_matmul import cpu, int4, layout, reference

logger = logging.getLogger(__name__)


def delta_matmul(
    y_TN: torch.Tensor, x_TK: torch.Tensor, enc: Encoded, bias_N: torch.Tensor | None = None
) -> None:
    """Turn y, the base's output for x, into the fine-tune's, in place. See ``reference``."""
    if enc.codec == int4.CODEC:
        int4.delta_matmul(y_TN, x_TK, enc)
    elif x_TK.device.type == "cpu" and cpu.supports(enc):
        cpu.delta_matmul(y_TN, x_TK, enc)
    else:
        reference.delta_matmul(y_TN, x_TK, enc, bias_N)


def has_kernels(name: str, base_NK: torch.Tensor) -> bool:
    """Whether the grouped kernels serve a layer: on a GPU, in the dtypes of its tensor cores.

    Warns once, naming the first layer's parameter, where they do not.
    """
    if base_NK.is_cuda and base_NK.dtype not in (torch.bfloat16, torch.float16):
        _warn(name, "all codecs", (), f"activations in {base_NK.dtype} (use bfloat16)")
        return False
    return base_NK.is_cuda


def takes_kernel(name: str, enc: Encoded, dtype: torch.dtype, *, bias: bool) -> bool:
    """Whether a kernel serves this operand of the layer's parameter ``name``.

    Logs the choice once per kind of operand, and one warning for each reason and shape that
    makes a packed operand fall back to the reference.
    """
    if enc.codec not in ("int", "nm24", "lowrank", "rows"):
        return False
    reason = layout.refusal(enc, dtype)
    if reason is None and bias and enc.codec == "rows":
        reason = "rows of a layer with a bias"
    if reason is not None:
        _warn(name, enc.codec, enc.shape, reason)
        return False
    _say(enc.codec, enc.params.get("bits"))
    return True


@cache
def _say(codec: str, bits: int | None) -> None:
    label = f"{codec}, {bits} bits" if bits else codec
    logger.info("delta matmul of %s: grouped Triton kernel", label)


def _warn(name: str, codec: str, shape: tuple[int, ...], reason: str) -> None:
    if (codec, shape, reason) not in _warned():
        _warned().add((codec, shape, reason))
        logger.warning(
            "delta matmul of %s %s (%s): no kernel for %s; it and others like it are computed "
            "by the slow reference",
            name,
            list(shape) or "and all others",
            codec,
            reason,
        )


@cache
def _warned() -> set[tuple[str, tuple[int, ...], str]]:
    """What has been warned about in this process."""
    return set()
