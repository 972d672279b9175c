"""The registry of codecs: every way in which one changed parameter can be stored."""

from __future__ import annotations

from deltaserve.artifact.codecs.base import AdditiveCodec, Codec
from deltaserve.artifact.codecs.int import IntCodec
from deltaserve.artifact.codecs.lowrank import LowRankCodec
from deltaserve.artifact.codecs.nf4 import Nf4Codec
from deltaserve.artifact.codecs.nm24 import Nm24Codec
from deltaserve.artifact.codecs.raw import RawCodec
from deltaserve.artifact.codecs.rows import RowsCodec
from deltaserve.artifact.codecs.sparse import SparseCodec
from deltaserve.artifact.codecs.sum import SumCodec
from deltaserve.artifact.codecs.xor import XorCodec
from deltaserve.errors import CodecError

_TERMS: tuple[AdditiveCodec, ...] = (
    IntCodec(),
    Nm24Codec(),
    LowRankCodec(),
    Nf4Codec(),
    SparseCodec(),
)
_ALL: tuple[Codec, ...] = (RawCodec(), RowsCodec(), XorCodec(), *_TERMS, SumCodec(_TERMS))
CODECS: dict[str, Codec] = {codec.name: codec for codec in _ALL}


def get_codec(name: str) -> Codec:
    """The codec of that name; CodecError lists the known ones otherwise."""
    try:
        return CODECS[name]
    except KeyError:
        raise CodecError(f"unknown codec {name!r} (known: {', '.join(CODECS)})") from None
