"""``sum``: several codecs of one difference, each storing what the ones before it left over.

A low-bit plane and a low-rank residual, or bands of singular vectors at bits of their own
(Delta-CoMe, Ping et al., NeurIPS 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from deltaserve.artifact.codecs.base import (
    AdditiveCodec,
    Encoded,
    Layout,
    difference,
    matrix_shape,
)
from deltaserve.artifact.codecs.params import parse_params
from deltaserve.errors import CodecError

MAX_TERMS = 8


@dataclass(frozen=True)
class SumParams:
    """terms: of each {"codec": its name, and its settings}."""

    terms: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 1 <= len(self.terms) <= MAX_TERMS:
            raise CodecError(f"codec sum needs 1 to {MAX_TERMS} terms, not {len(self.terms)}")
        for term in self.terms:
            if not isinstance(term, dict) or not isinstance(term.get("codec"), str):
                raise CodecError(f"codec sum: a term is {str(term)[:60]}, not a codec and settings")


class SumCodec(AdditiveCodec):
    """Parts: those of term i under the name ``i.<part>``. codecs: what may be a term."""

    name = "sum"

    def __init__(self, codecs: Sequence[AdditiveCodec]) -> None:
        self._codecs = {codec.name: codec for codec in codecs}

    def encode(self, tensor: torch.Tensor, base: torch.Tensor | None, **params: Any) -> Encoded:
        """Each term is the codec's own choice for what is left."""
        p = parse_params(SumParams, self.name, params)
        left_NK = difference(tensor, base).view(matrix_shape(tuple(tensor.shape)))
        encs = []
        for term in p.terms:
            codec, settings = self._term(term)
            enc = self.as_term(codec.encode(left_NK, None, **settings), tensor.dtype)
            left_NK = left_NK - codec.delta(enc)
            encs.append(enc)
        return self.from_terms(encs, tuple(tensor.shape), tensor.dtype)

    def as_term(self, enc: Encoded, dtype: torch.dtype) -> Encoded:
        """What was encoded from a float32 difference, its parts as a parameter of ``dtype`` has
        them."""
        params = {key: value for key, value in enc.params.items() if key != "factors"}
        layout = self._codecs[enc.codec].layout(params, enc.shape, dtype)
        tensors = {part: tensor.to(layout[part][0]) for part, tensor in enc.tensors.items()}
        return Encoded(enc.codec, params, enc.shape, dtype, tensors)

    def from_terms(
        self, encs: Sequence[Encoded], shape: tuple[int, ...], dtype: torch.dtype
    ) -> Encoded:
        """Terms that somebody else encoded, of the parameter seen as [N, K]."""
        terms = [{"codec": enc.codec, **enc.params} for enc in encs]
        tensors = {
            f"{number}.{part}": tensor
            for number, enc in enumerate(encs)
            for part, tensor in enc.tensors.items()
        }
        return Encoded(self.name, {"terms": terms}, shape, dtype, tensors)

    def terms(self, enc: Encoded) -> list[Encoded]:
        """What is added up, each over the parameter seen as [N, K]."""
        p, shape = parse_params(SumParams, self.name, enc.params), matrix_shape(enc.shape)
        found = []
        for number, term in enumerate(p.terms):
            codec, settings = self._term(term)
            parts = {
                part: enc.tensors[f"{number}.{part}"]
                for part in codec.layout(settings, shape, enc.dtype)
            }
            found.append(Encoded(codec.name, settings, shape, enc.dtype, parts))
        return found

    def delta(self, enc: Encoded) -> torch.Tensor:
        parts = [self._codecs[term.codec].delta(term) for term in self.terms(enc)]
        return torch.stack(parts).sum(0).view(enc.shape)

    def layout(self, params: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        p, matrix = parse_params(SumParams, self.name, params), matrix_shape(shape)
        parts: Layout = {}
        for number, term in enumerate(p.terms):
            codec, settings = self._term(term)
            for part, spec in codec.layout(settings, matrix, dtype).items():
                parts[f"{number}.{part}"] = spec
        return parts

    def check(self, enc: Encoded) -> None:
        for term in self.terms(enc):
            self._codecs[term.codec].check(term)

    def _term(self, term: dict[str, Any]) -> tuple[AdditiveCodec, dict[str, Any]]:
        settings = {key: value for key, value in term.items() if key != "codec"}
        codec = self._codecs.get(term["codec"])
        if codec is None:
            known = ", ".join(self._codecs)
            raise CodecError(f"codec sum: {term['codec']!r} cannot be a term (can: {known})")
        return codec, settings
