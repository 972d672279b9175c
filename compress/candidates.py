"""What each changed matrix would cost in each codec, in bytes and in nats of the model's output.

First the fine-tune reads the text from its first layer to its last, then gradients come back
(``sensitivity``); on the way each matrix is tried in every candidate.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import asdict, replace
from typing import Any

from deltaserve.artifact.checkpoint import HEAD
from deltaserve.artifact.codecs.base import FLOATS
from deltaserve.artifact.codecs.rows import changed_rows
from deltaserve.compress.activations import Activations
from deltaserve.compress.allocate import Candidate
from deltaserve.compress.calibrate import NORM, Pair
from deltaserve.compress.change import same
from deltaserve.compress.hessian import Hessian
from deltaserve.compress.layers import LayerWalk
from deltaserve.compress.plan import TINY, CodecChoice
from deltaserve.compress.price import priced
from deltaserve.compress.sensitivity import (
    Cost,
    LookupCost,
    at_the_embedding,
    at_the_head,
    through_layer,
)
from deltaserve.compress.weights import Table


def _int(bits: int, group_size: int = 0, **rest: Any) -> CodecChoice:
    return CodecChoice("int", {"bits": bits, "group_size": group_size, **rest})


PER_TENSOR = CodecChoice("int", {"bits": 1, "scale_axis": "tensor"})
# With so many columns a scale for each row is less than a fiftieth of its codes: one for all rows
# saves nothing.
WIDE = 800
ONE_BIT = (
    PER_TENSOR,
    CodecChoice("int", {"bits": 1, "scale_axis": "column"}),
    _int(1),
    CodecChoice("int", {"bits": 1, "scale_axis": "row", "planes": 2}),
)
LINEAR = (*ONE_BIT, _int(2), _int(2, 64), _int(3, 64), _int(4, 64), _int(8, 64))
# Bits per value of the whole matrix that low-rank candidates take, by bits of a factor.
LOW_RANK = {2: (0.5, 1.0), 4: (0.125, 0.25, 0.5, 0.75, 1.0, 1.5)}
# Dense factors pay where the change itself is of low rank.
DENSE_RANKS = (1, 2, 4, 8, 16)
# A low-rank part beside one bit per value, as a share of a bit.
BESIDE = (0.25, 0.5)
# Bits per value of mixed-precision singular vectors.
BANDED = (1.0,)
VOCABULARY = (
    *(CodecChoice("int", {"bits": bits, "group_size": 64}) for bits in (1, 2, 3, 4, 8)),
    CodecChoice("int", {"bits": 1, "group_size": 0}),
    CodecChoice("int", {"bits": 2, "group_size": 0}),
)
VOCABULARY_ROWS = tuple(
    CodecChoice("rows", {"bits": bits} if bits else {}) for bits in (0, 2, 4, 8)
)


def measure_candidates(pair: Pair, seed: int) -> Generator[None, None, dict[str, list[Candidate]]]:
    """Candidates of every changed matrix, by name; yields after each layer.

    In memory: a decoder layer and its gradients, the Hessians of its projections.
    """
    work, embedding = pair.work, Table(None, pair.model.tensor(pair.embedding))
    walk = LayerWalk(
        pair.model, [pair.fit.samples], embedding, work.folder("measure/in"), pair.device
    )
    for layer in range(len(walk)):
        if not walk.hidden.has(layer + 1):
            walk.advance(layer, pair.weights(pair.of_layer(layer)))
        pair.report("read", layer + 1, len(walk))
        yield
    shapes = [tuple(ids_BT.shape) for _, ids_BT, _ in walk.batches]
    grads = Activations(work.folder("measure/back"), shapes, embedding.shape[1])  # type: ignore[arg-type]
    table: dict[str, list[Candidate]] = {}
    head: Cost | None = None
    if work.get("measure/head.json") is None or not _below(grads, len(walk)):
        cap = getattr(pair.model.hf_config.get_text_config(), "final_logit_softcapping", None)
        norm, values = pair.model.tensor(NORM).float(), Table(None, pair.model.tensor(HEAD))
        head = at_the_head(walk, grads, norm, values, cap, seed)
        work.put("measure/head.json", _rows(_of_head(pair, head)))
    for layer in reversed(range(len(walk))):
        file = f"measure/layer-{layer:05d}.json"
        if work.get(file) is None or not _below(grads, layer):
            weights = pair.weights(pair.of_layer(layer))
            costs = through_layer(walk, grads, layer, weights)
            found = {name: _tried(pair, name, costs[name]) for name in costs if _worth(pair, name)}
            work.put(file, _rows(found))
        grads.drop(layer + 1)  # only now: a run that is killed while it fits begins here again
        pair.report("measure", len(walk) - layer, len(walk))
        yield
    if _worth(pair, pair.embedding):
        lookup = at_the_embedding(walk, grads, embedding)
        table |= {pair.embedding: _of_embedding(pair, lookup, _head_again(pair, walk, head, seed))}
    for layer in range(len(walk)):
        table |= _table(work.get(f"measure/layer-{layer:05d}.json"))
    table |= _table(work.get("measure/head.json"))
    work.forget("measure/in")
    return table


def _below(grads: Activations, layer: int) -> bool:
    """Whether gradients have come back to what goes into the layer, or further."""
    return any(grads.has(earlier) for earlier in range(layer + 1))


def _worth(pair: Pair, name: str) -> bool:
    tensor, reference = pair.model.tensor(name), pair.base.tensor(name)
    floats = tensor.dtype in FLOATS and tensor.dim() >= 2
    return floats and tensor.numel() >= TINY and not same(tensor, reference)


def _of_head(pair: Pair, cost: Cost) -> dict[str, list[Candidate]]:
    """The head's candidates, where it has weights of its own that changed."""
    if HEAD not in pair.names or pair.model.tied or not _worth(pair, HEAD):
        return {}
    return {HEAD: _candidates(pair, HEAD, _vocabulary(pair, HEAD), cost.hessian, [cost])}


def _head_again(pair: Pair, walk: LayerWalk, head: Cost | None, seed: int) -> Cost | None:
    """What errors of a tied embedding cost as a head."""
    if not pair.model.tied:
        return None
    if head is None:  # a resumed run has gone past it
        again = Activations(pair.work.folder("measure/again"), [
            tuple(ids_BT.shape) for _, ids_BT, _ in walk.batches  # type: ignore[misc]
        ], pair.model.tensor(NORM).shape[0])  # fmt: skip
        cap = getattr(pair.model.hf_config.get_text_config(), "final_logit_softcapping", None)
        norm, values = pair.model.tensor(NORM).float(), Table(None, pair.model.tensor(HEAD))
        head = at_the_head(walk, again, norm, values, cap, seed)
    return head


def _of_embedding(pair: Pair, lookup: LookupCost, head: Cost | None) -> list[Candidate]:
    costs: list[Cost | LookupCost] = [lookup] if head is None else [lookup, head]
    return _candidates(pair, pair.embedding, _vocabulary(pair, pair.embedding), None, costs)


def _tried(pair: Pair, name: str, cost: Cost) -> list[Candidate]:
    tensor = pair.model.tensor(name)
    rows, columns = tensor.numel() // tensor.shape[-1], tensor.shape[-1]
    size, line = rows * columns, rows + columns

    def ranks(share: float, bits: int) -> int:
        return min(rows, columns, int(share * size / (bits * line)))

    choices = [choice for choice in LINEAR if columns < WIDE or choice != PER_TENSOR]
    found = {(bits, ranks(share, bits)) for bits, sizes in LOW_RANK.items() for share in sizes}
    found |= {(0, rank) for rank in DENSE_RANKS if rank * line * 16 <= 2 * size}
    # The largest rank first: its singular vectors serve the others.
    choices += [
        CodecChoice("lowrank", {"rank": rank, **({"bits": bits} if bits else {})})
        for rank, bits in sorted(((rank, bits) for bits, rank in found), reverse=True)
        if rank
    ]
    for share in BESIDE:
        if rank := ranks(share, 4):
            terms = [
                {"codec": "lowrank", "rank": rank, "bits": 4},
                {"codec": "int", "bits": 1, "group_size": 0},
            ]
            choices.append(CodecChoice("sum", {"terms": terms}))
    choices += [CodecChoice("sum", {"share": share}) for share in BANDED]
    return _candidates(pair, name, choices, cost.hessian, [cost])


def _vocabulary(pair: Pair, name: str) -> list[CodecChoice]:
    """Rows only where few enough changed for their numbers to pay."""
    tensor = pair.model.tensor(name)
    changed = len(changed_rows(tensor, pair.base.tensor(name)))
    return [*VOCABULARY, *(VOCABULARY_ROWS if changed < 0.9 * len(tensor) else ())]


def _candidates(
    pair: Pair,
    name: str,
    choices: Sequence[CodecChoice],
    hessian: Hessian | None,
    costs: Sequence[Cost | LookupCost],
) -> list[Candidate]:
    return priced(pair.model.tensor(name), pair.base.tensor(name), choices, hessian, costs)


def _rows(table: dict[str, list[Candidate]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [asdict(c) for c in candidates] for name, candidates in table.items()}


def _table(rows: dict[str, list[dict[str, Any]]]) -> dict[str, list[Candidate]]:
    return {
        name: [replace(Candidate(**row), choice=CodecChoice(**row["choice"])) for row in found]
        for name, found in rows.items()
    }
