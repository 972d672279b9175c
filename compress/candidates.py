"""What each projection would cost in each codec, in bytes and in error at its layer's output.

The error of a weight is tr(e H e.T) under the Hessian of its inputs. To compare projections
with each other, it is multiplied by how far such an error travels: one candidate is put into
the layer, and the change of the layer's output is measured against the output itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.artifact.codecs import get_codec
from deltaserve.artifact.codecs.base import FLOATS
from deltaserve.compress.allocate import Candidate
from deltaserve.compress.calibrate import adder
from deltaserve.compress.change import encode, same
from deltaserve.compress.hessian import Hessian, output_error
from deltaserve.compress.layers import LayerWalk, Weights
from deltaserve.compress.models import reconstruct
from deltaserve.compress.plan import TINY, CodecChoice
from deltaserve.compress.text import Text

INTS = tuple(
    CodecChoice("int", {"bits": bits, "group_size": group})
    for bits, group in ((1, 0), (2, 0), (2, 64), (3, 64), (4, 64), (8, 64))
)
# Rank as a share of the shorter side: below a bit per value, and as much as 2 bits.
RANKS = (0.01, 0.03, 0.06)
# The candidate whose error is sent through the layer.
PROBE = 1


def measure_candidates(
    names: Sequence[str], base: Checkpoint, model: Checkpoint, text: Text, device: str
) -> dict[str, list[Candidate]]:
    """Candidates of every changed projection inside the decoder layers, by name."""
    assert model.embedding is not None
    walk = LayerWalk(model, text.samples, model.tensor(model.embedding).float(), device)
    table: dict[str, list[Candidate]] = {}
    for layer in range(len(walk)):
        mine = [name for name in names if name.startswith(walk.prefix(layer))]
        weights = {name: model.tensor(name).float() for name in mine}
        hessians: dict[str, Hessian] = {}
        walk.observe(layer, weights, adder(hessians))
        for name in hessians:
            if _worth_choosing(name, base, model):
                found = _candidates(name, base, model, hessians[name])
                table[name] = list(_weighted(found, name, walk, layer, weights))
        walk.advance(layer, weights)
    return table


def _worth_choosing(name: str, base: Checkpoint, model: Checkpoint) -> bool:
    tensor, reference = model.tensor(name), base.tensor(name)
    return tensor.numel() >= TINY and tensor.dtype in FLOATS and not same(tensor, reference)


def _candidates(
    name: str, base: Checkpoint, model: Checkpoint, hessian: Hessian
) -> list[tuple[Candidate, torch.Tensor]]:
    """Each with the weight that it stands for; its error is that of the projection alone."""
    tensor, reference = model.tensor(name), base.tensor(name)
    ranks = {max(1, round(share * min(tensor.shape))) for share in RANKS}
    choices = (*INTS, *(CodecChoice("lowrank", {"rank": rank}) for rank in sorted(ranks)))
    h_KK, found = hessian.mean_KK, []
    for choice in choices:
        enc = encode(choice, tensor, reference, hessian)
        weight_NK = reconstruct(enc, reference).to(h_KK.device)
        error_N = output_error(weight_NK - tensor.float().to(h_KK.device), h_KK)
        size = get_codec(choice.codec).resident_bytes(enc)
        found.append((Candidate(choice, size, float(error_N.double().sum())), weight_NK))
    return found


def _weighted(
    found: list[tuple[Candidate, torch.Tensor]],
    name: str,
    walk: LayerWalk,
    layer: int,
    weights: Weights,
) -> Iterator[Candidate]:
    probe, weight_NK = found[PROBE]
    changed: Mapping[str, torch.Tensor] = {**weights, name: weight_NK}
    factor = walk.disturbance(layer, weights, changed) / probe.error if probe.error else 0.0
    for candidate, _ in found:
        yield Candidate(candidate.choice, candidate.bytes, candidate.error * factor)
