"""The embedding kernels against the reference: on a GPU, or in Triton's interpreter without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deltaserve.kernels.delta_embedding import GroupedEmbeddings, delta_embedding
from deltaserve.kernels.delta_matmul import dispatch
from deltaserve.kernels.delta_matmul.grouped import TABLE_STEP
from tests.kernels.test_triton_delta import DEVICE, encode

CASES: list[tuple[str, dict[str, Any]]] = [
    ("int", {"bits": 1, "scale_axis": "row", "planes": 2}),
    ("int", {"bits": 2, "group_size": 48}),
    ("int", {"bits": 4, "scale_axis": "tensor"}),
    ("rows", {}),
    ("rows", {"bits": 2, "group_size": 16}),
    ("rows", {"bits": 4, "group_size": 64}),
]
VOCAB, WIDTH, ADDED = 31, 100, 4


@pytest.mark.parametrize("scale", [1.0, 3.5])
def test_each_token_is_looked_up_in_its_own_fine_tune(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All codecs in one call, in slots near and far, with added tokens, and rows of the base and
    of a fine-tune that changes no embedding."""
    monkeypatch.setattr(dispatch, "has_kernels", lambda name, base: True)
    base = torch.randn(VOCAB, WIDTH)
    grouped = GroupedEmbeddings("embed.weight", base.to(DEVICE), False)
    slots = [1, 2, 5, TABLE_STEP - 1, TABLE_STEP, 3 * TABLE_STEP]
    encs = {}
    for slot, (codec, params) in zip(slots, CASES, strict=True):
        encs[slot] = encode(base, codec, params, seed=slot, added=ADDED * (slot % 2))
        assert grouped.attach(slot, encs[slot])
    wanted, ids, slot_of = [], [], []
    for slot in (*slots, 0, 9 * TABLE_STEP):
        own = [0, 3, 4, VOCAB - 1, *([VOCAB + ADDED - 1] if slot in encs and slot % 2 else [])]
        found = base.to(DEVICE)[torch.tensor(own).clamp(max=VOCAB - 1)]
        if slot in encs:
            found = delta_embedding(torch.tensor(own, device=DEVICE), base.to(DEVICE), encs[slot])
        wanted.append(found * scale)
        ids += own
        slot_of += [slot] * len(own)
    ids_T, slot_T = torch.tensor(ids, device=DEVICE), torch.tensor(slot_of, device=DEVICE)
    out_TD = base.to(DEVICE)[ids_T.clamp(max=VOCAB - 1)] * scale
    out_TD *= (ids_T < VOCAB)[:, None]
    grouped.look_up(out_TD, ids_T, slot_T, scale)
    torch.testing.assert_close(out_TD, torch.cat(wanted), atol=1e-4, rtol=1e-5)
