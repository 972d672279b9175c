"""What a codec is: it stores one changed parameter and gives it back.

Additive codecs store ``fine_tuned - base`` and can hand out that difference alone;
the others store the values themselves. Codecs never see a whole model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from deltaserve.errors import CodecError

# Part name -> (dtype, shape), exactly as stored.
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Encoded:
    """One stored parameter.

    codec: name in the registry. params: JSON-able settings that decoding needs.
    shape, dtype: of the fine-tuned parameter. tensors: part name -> tensor, each of
    which becomes ``<parameter>.<part>`` in the safetensors file.
    """

    codec: str
    params: dict[str, Any]
    shape: tuple[int, ...]
    dtype: torch.dtype
    tensors: dict[str, torch.Tensor] = field(repr=False)

    @property
    def num_bytes(self) -> int:
        """Exact size of the parts on disk, without the file's header."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


class Codec(Protocol):
    """Encode and decode one parameter; stateless, one instance per codec name."""

    name: str
    additive: bool

    def encode(self, tensor: torch.Tensor, base: torch.Tensor | None, **params: Any) -> Encoded:
        """Store ``tensor`` given the base's parameter (None: the base has no such parameter).

        Raises CodecError for params the codec does not have and tensors it cannot store.
        """
        ...

    def decode(self, enc: Encoded, base: torch.Tensor | None) -> torch.Tensor:
        """The fine-tuned parameter, in its own shape and dtype."""
        ...

    def resident_bytes(self, enc: Encoded) -> int:
        """Bytes that the engine keeps in memory to apply this parameter."""
        ...

    def layout(self, params: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """The parts that these params require, so that a reader can refuse anything else.

        Raises CodecError when the params make no sense for the shape.
        """
        ...

    def check(self, enc: Encoded) -> None:
        """Raises CodecError when parts of the right layout hold values that cannot be decoded."""
        ...


class AdditiveCodec(Codec, Protocol):
    """A codec of ``fine_tuned - base``; those that are inherit from it."""

    additive: bool = True

    def delta(self, enc: Encoded) -> torch.Tensor:
        """The stored difference, float32, in the fine-tuned parameter's shape."""
        ...

    def decode(self, enc: Encoded, base: torch.Tensor | None) -> torch.Tensor:
        return apply_delta(base, self.delta(enc), enc.dtype)

    def resident_bytes(self, enc: Encoded) -> int:
        """It is applied as it is stored."""
        return enc.num_bytes


def align_rows(base: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
    """The base's parameter cut or zero-padded along dim 0 to ``shape``, in float32.

    Added tokens grow an embedding; their rows have no base, so it counts as zero.
    Raises CodecError when any other dimension differs.
    """
    return aligned(base, shape, torch.float32)


def aligned(base: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """``align_rows`` in any dtype; may share memory with ``base``, so never write to it."""
    if base is None:
        return torch.zeros(shape, dtype=dtype)
    _require_alignable(base, shape)
    if not shape or base.shape[0] >= shape[0]:
        return base[: shape[0]].to(dtype) if shape else base.to(dtype)
    grown = torch.zeros(shape, dtype=dtype)
    grown[: base.shape[0]] = base
    return grown


def _require_alignable(base: torch.Tensor, shape: tuple[int, ...]) -> None:
    if base.dim() != len(shape) or base.shape[1:] != tuple(shape[1:]):
        raise CodecError(f"cannot align a base of shape {list(base.shape)} to {list(shape)}")


def apply_delta(base: torch.Tensor | None, delta: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """base + delta, added in float32 and rounded once to ``dtype``."""
    return (align_rows(base, tuple(delta.shape)) + delta).to(dtype)


def difference(tensor: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
    """``tensor - base`` in float32, a fresh tensor; added rows count against zero.

    Raises CodecError for dtypes other than float32, float16 and bfloat16, and when the
    result is not finite.
    """
    for given in (tensor, base):
        if given is not None and given.dtype not in FLOATS:
            raise CodecError(f"cannot store a difference of {dtype_name(given.dtype)} values")
    delta = tensor.to(torch.float32, copy=True)
    if base is not None:
        _require_alignable(base, tuple(tensor.shape))
        # Mixed dtypes in place: no float32 copy of the base.
        if tensor.dim() == 0:
            delta.sub_(base)
        else:
            delta[: base.shape[0]].sub_(base[: tensor.shape[0]])
    require_finite(delta)
    return delta


def require_finite(tensor: torch.Tensor) -> None:
    """Raises CodecError if a value is NaN or infinite."""
    if not is_finite(tensor):
        raise CodecError("the tensor holds NaN or infinite values")


def is_finite(tensor: torch.Tensor) -> bool:
    """No NaN or infinity anywhere; needs no temporary of the tensor's size."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Any tensor as a matrix ``[prod(shape[:-1]), shape[-1]]``.

    Raises CodecError for scalars and empty tensors.
    """
    if not shape or 0 in shape:
        raise CodecError(f"cannot quantise a tensor of shape {list(shape)}; store it with raw")
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows, shape[-1]


def dense_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of the parameter stored plainly."""
    count = 1
    for size in shape:
        count *= size
    return count * dtype.itemsize
