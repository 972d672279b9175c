"""Messages as bytes: the name of the class in one frame, its fields as MessagePack in the next.

Only what messages.py declares can come out of it, checked against its types; nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import msgspec

from deltaserve.engine.messages import Command, Report
from deltaserve.errors import RequestError

_ENCODER = msgspec.msgpack.Encoder()
_DECODERS: dict[bytes, msgspec.msgpack.Decoder[Any]] = {
    kind.__name__.encode(): msgspec.msgpack.Decoder(kind) for kind in get_args(Command | Report)
}


def encode(message: Command | Report) -> list[bytes]:
    """Frames of a message. Raises RequestError for text that is not Unicode."""
    try:
        return [type(message).__name__.encode(), _ENCODER.encode(message)]
    except UnicodeEncodeError as error:  # half a surrogate pair, from JSON or from a file's name
        raise RequestError(f"text that is not valid Unicode: {error.object!a}") from error


def decode(frames: Sequence[bytes]) -> Any:
    """The Command or Report that was encoded.

    Raises msgspec.DecodeError or KeyError for what is no message: only another program sends it.
    """
    kind, payload = frames
    return _DECODERS[kind].decode(payload)
