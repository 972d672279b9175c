"""``xor``: lossless difference of bit patterns, zstd compressed, byte planes split where that pays.

Fine-tuning leaves sign and exponent of most weights alone, so the high byte planes are
mostly zero bytes; splitting the planes lets the entropy coder see that (as FM-Delta and
ZipNN do). Where only a few values changed at all, the bytes of one are better left together.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch

from deltaserve.artifact.codecs.base import Encoded, Layout, aligned, dense_bytes
from deltaserve.artifact.codecs.params import at_least, one_of, parse_params
from deltaserve.errors import CodecError

# Share of bytes that changed, below which both orders are tried.
FEW = 0.1


@dataclass(frozen=True)
class XorParams:
    """level: zstd 1 (fast) to 19 (small). size: bytes of the compressed stream. split: whether
    it holds byte planes one after the other; chosen by ``encode``."""

    level: int = 3
    size: int = 0
    split: bool = True

    def __post_init__(self) -> None:
        one_of("xor", "level", self.level, tuple(range(1, 20)))
        at_least("xor", "size", self.size, 0)


class XorCodec:
    """Parts: data uint8 [size]. Keeps every bit, NaN payloads and -0.0 included."""

    name = "xor"
    additive = False

    def encode(self, tensor: torch.Tensor, base: torch.Tensor | None, **params: Any) -> Encoded:
        p = parse_params(XorParams, self.name, params)
        if base is not None and base.dtype != tensor.dtype:
            raise CodecError(
                f"codec xor needs equal dtypes, but the base has {base.dtype} and the "
                f"fine-tune {tensor.dtype}; use codec raw or rows"
            )
        shape = tuple(tensor.shape)
        bits = _bytes(tensor) ^ _bytes(aligned(base, shape, tensor.dtype))
        planes = np.ascontiguousarray(bits.reshape(-1, tensor.element_size()).T)
        compressor = _zstd().ZstdCompressor(level=p.level)
        packed, split = compressor.compress(planes.data), True
        if np.count_nonzero(planes) < FEW * planes.size:
            whole = compressor.compress(bits.data)
            if len(whole) < len(packed):
                packed, split = whole, False
        data = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        stored = {"level": p.level, "size": len(packed), "split": split}
        return Encoded(self.name, stored, shape, tensor.dtype, {"data": data})

    def decode(self, enc: Encoded, base: torch.Tensor | None) -> torch.Tensor:
        if base is not None and base.dtype != enc.dtype:
            raise CodecError(f"codec xor: the base has {base.dtype}, the delta {enc.dtype}")
        expected = dense_bytes(enc.shape, enc.dtype)
        bits = self._decompress(enc.tensors["data"], expected)
        if parse_params(XorParams, self.name, enc.params).split:
            bits = np.ascontiguousarray(bits.reshape(enc.dtype.itemsize, -1).T).reshape(-1)
        bits ^= _bytes(aligned(base, enc.shape, enc.dtype))
        return torch.from_numpy(bits).view(enc.dtype).view(enc.shape)

    def resident_bytes(self, enc: Encoded) -> int:
        return dense_bytes(enc.shape, enc.dtype)

    def layout(self, params: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        return {"data": (torch.uint8, (parse_params(XorParams, self.name, params).size,))}

    def check(self, enc: Encoded) -> None:
        zstd = _zstd()
        try:
            size = zstd.frame_content_size(_bytes(enc.tensors["data"]).tobytes()[:18])
        except zstd.ZstdError as error:
            raise CodecError(f"the compressed stream is damaged: {error}") from None
        if size != dense_bytes(enc.shape, enc.dtype):
            raise CodecError(f"the compressed stream holds {size} bytes, not the parameter's")

    @staticmethod
    def _decompress(data: torch.Tensor, expected: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        zstd = _zstd()
        out = np.empty(expected, dtype=np.uint8)
        filled = 0
        try:
            # Into a buffer of the known size: a hostile stream cannot make it grow.
            with zstd.ZstdDecompressor().stream_reader(_bytes(data).data) as stream:
                while filled < expected:
                    got = stream.readinto(out[filled:].data)
                    if not got:
                        raise CodecError("the compressed stream ends early")
                    filled += got
                if stream.read(1):
                    raise CodecError("the compressed stream is too long")
        except zstd.ZstdError as error:
            raise CodecError(f"the compressed stream is damaged: {error}") from None
        return out


def _bytes(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The tensor's bytes, without a copy if it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _zstd() -> ModuleType:
    # Only this codec needs it; a serving machine without xor deltas runs without.
    try:
        import zstandard
    except ImportError:
        raise CodecError("codec xor needs zstandard: pip install zstandard") from None
    return zstandard
