"""``raw``: the changed values themselves. Exact; for norms, biases and anything small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from deltaserve.artifact.codecs.base import Encoded, Layout, dense_bytes, require_finite
from deltaserve.artifact.codecs.params import parse_params


@dataclass(frozen=True)
class RawParams:
    """``raw`` has no settings."""


class RawCodec:
    """Parts: values, shape and dtype of the parameter. Accepts any dtype and shape."""

    name = "raw"
    additive = False

    def encode(self, tensor: torch.Tensor, base: torch.Tensor | None, **params: Any) -> Encoded:
        parse_params(RawParams, self.name, params)
        require_finite(tensor)
        return Encoded(
            self.name, {}, tuple(tensor.shape), tensor.dtype, {"values": tensor.contiguous()}
        )

    def decode(self, enc: Encoded, base: torch.Tensor | None) -> torch.Tensor:
        return enc.tensors["values"].clone()

    def resident_bytes(self, enc: Encoded) -> int:
        return dense_bytes(enc.shape, enc.dtype)

    def layout(self, params: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        parse_params(RawParams, self.name, params)
        return {"values": (dtype, shape)}

    def check(self, enc: Encoded) -> None:
        require_finite(enc.tensors["values"])
