"""A projection of many rows of one delta: base + difference in one matmul, the same outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltaserve.artifact.codecs import get_codec
from deltaserve.artifact.codecs.base import Encoded
from deltaserve.engine.layers import DeltaHead, DeltaLinear
from deltaserve.engine.pieces import Piece
from deltaserve.engine.routing import Routing, StepContext, segments
from deltaserve.kernels.delta_matmul import int4

OUTPUTS, INPUTS = 192, 128
DTYPE = torch.float32
MANY = int4.dense_rows(DTYPE)
SLOTS = [0] * 5 + [1] * MANY + [2] * (MANY - 1) + [3] * (MANY + 30)


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The outputs of what was unpacked."""
    seen: list[int] = []
    real = int4.add_to

    def add_to(weight_NK: torch.Tensor, enc: Encoded) -> None:
        seen.append(len(weight_NK))
        real(weight_NK, enc)

    monkeypatch.setattr(int4, "add_to", add_to)
    return seen


def encode(rows: int, bits: int, **params: object) -> Encoded:
    """As of a fine-tune in bfloat16, which may be multiplied in it."""
    enc = get_codec("int").encode(0.1 * torch.randn(rows, INPUTS), None, bits=bits, **params)
    return Encoded(enc.codec, enc.params, enc.shape, torch.bfloat16, enc.tensors)


def make(kind: type[DeltaLinear], bias: bool) -> tuple[DeltaLinear, nn.Linear]:
    step = StepContext()
    routing = segments(SLOTS)
    step.routing = Routing(routing, routing, torch.tensor(SLOTS))
    plain = nn.Linear(INPUTS, OUTPUTS, bias=bias, dtype=DTYPE)
    layer = kind(nn.Linear(INPUTS, OUTPUTS, bias=bias, dtype=DTYPE), step, "layer")
    layer.inner.load_state_dict(plain.state_dict())
    layer.pack()
    return layer, plain


def attach(layer: DeltaLinear, slot: int, *pieces: Piece) -> torch.Tensor:
    """-> what the delta adds to the base's weight, as it is multiplied."""
    delta_NK = torch.zeros(OUTPUTS, INPUTS)
    for piece in pieces:
        enc = piece.enc
        delta_NK[piece.outputs] += get_codec(enc.codec).delta(enc)
    layer.attach(slot, "weight", layer.prepare("weight", pieces))
    return delta_NK


@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_rows_of_each_delta_get_its_outputs(bias: bool, added: list[int]) -> None:
    torch.manual_seed(0)
    layer, plain = make(DeltaLinear, bias)
    if not int4.unpacks(int4.pack([encode(64, 2)])[0]):
        pytest.skip("this processor's operator has another order")
    deltas = {0: torch.zeros(OUTPUTS, INPUTS)}
    low = get_codec("lowrank").encode(0.1 * torch.randn(64, INPUTS), None, rank=4)
    # Two planes; a part alone; a part in 4 bits beside another codec.
    deltas[1] = attach(layer, 1, Piece(0, encode(OUTPUTS, 1, planes=2)))
    deltas[2] = attach(layer, 2, Piece(64, encode(128, 4)))
    deltas[3] = attach(layer, 3, Piece(0, encode(64, 4)), Piece(128, low))
    biases = dict.fromkeys(deltas, plain.bias)
    if bias:
        values = torch.randn(OUTPUTS)
        biases[3] = values
        enc = Encoded("raw", {}, (OUTPUTS,), DTYPE, {"values": values})
        layer.attach(3, "bias", layer.prepare("bias", (Piece(0, enc),)))
    x_TK = torch.randn(len(SLOTS), INPUTS)
    y_TN = layer(x_TK)
    pairs = zip(x_TK, SLOTS, strict=True)
    expected = torch.stack(
        [nn.functional.linear(x, plain.weight + deltas[slot], biases[slot]) for x, slot in pairs]
    )
    torch.testing.assert_close(y_TN, expected, rtol=0.02, atol=0.02)
    assert added == [OUTPUTS, OUTPUTS, 64]  # slot 1's planes, slot 3's part; slot 2 has few rows


@torch.inference_mode()
def test_a_head_is_not_copied(added: list[int]) -> None:
    layer, _ = make(DeltaHead, bias=False)
    attach(layer, 1, Piece(0, encode(OUTPUTS, 2)))
    layer(torch.randn(len(SLOTS), INPUTS))
    assert not added


@torch.inference_mode()
def test_what_left_is_not_added(added: list[int]) -> None:
    layer, plain = make(DeltaLinear, bias=False)
    attach(layer, 1, Piece(0, encode(OUTPUTS, 2)))
    layer.detach(1)
    x_TK = torch.randn(len(SLOTS), INPUTS)
    torch.testing.assert_close(layer(x_TK), plain(x_TK))
    assert not added
