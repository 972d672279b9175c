"""A fine-tune and base + delta side by side, layer by layer: in memory one layer at a time.

From the same pass come divergence and agreement, where two greedy continuations part, and
exact matches: what a model would write greedily follows from what it finds most likely after
each token of the text that is compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from deltaserve.artifact.checkpoint import HEAD, Checkpoint
from deltaserve.compress.calibrate import NORM
from deltaserve.compress.common import Progress
from deltaserve.compress.compare import Tokens, compare_tokens
from deltaserve.compress.layers import LayerWalk
from deltaserve.compress.text import Sample
from deltaserve.compress.weights import Source
from deltaserve.errors import CompatibilityError

# exp() of more than this says nothing that this does not.
LARGEST_NLL = 700.0


@dataclass(frozen=True)
class Read:
    """One sequence, and what was compared at each of its tokens but the last."""

    sample: Sample
    tokens: Tokens


def judge(
    base: Checkpoint,
    mine: Source,
    theirs: Source,
    texts: Sequence[Sequence[Sample]],
    folder: Path,
    device: str,
    report: Progress,
) -> list[list[Read]]:
    """What the fine-tune (mine) and base + delta (theirs) make of each sequence of each text.

    Raises CompatibilityError if the two have different vocabularies.
    """
    assert base.embedding is not None
    tables = [source.table(base.embedding) for source in (mine, theirs)]
    if tables[0].shape != tables[1].shape:
        raise CompatibilityError(
            f"the fine-tune has {len(tables[0])} tokens, base + delta has {len(tables[1])}; "
            "this delta was made from another fine-tune"
        )
    walks = [
        LayerWalk(base, texts, table, folder / name, device)
        for name, table in zip(("mine", "theirs"), tables, strict=True)
    ]
    del tables
    layers = len(walks[0])
    for layer in range(layers):
        names = [name for name in base.names() if name.startswith(LayerWalk.prefix(layer))]
        for walk, source in zip(walks, (mine, theirs), strict=True):
            walk.advance(layer, {name: source(name) for name in names})
            walk.hidden.drop(layer)
        report("compare", layer + 1, layers)
    cap = getattr(base.hf_config.get_text_config(), "final_logit_softcapping", None)
    return _heads(walks, (mine, theirs), texts, cap)


def _heads(
    walks: list[LayerWalk],
    sources: tuple[Source, Source],
    texts: Sequence[Sequence[Sample]],
    cap: float | None,
) -> list[list[Read]]:
    norms, heads = [s(NORM) for s in sources], [s.table(HEAD) for s in sources]
    found: list[list[Read]] = [[] for _ in texts]
    waiting = [iter(sorted(samples, key=lambda s: len(s.tokens))) for samples in texts]
    for number, (text, ids_BT, lengths) in enumerate(walks[0].batches):
        places_BT = torch.arange(ids_BT.shape[1]) < torch.tensor(lengths)[:, None] - 1
        followed_N = places_BT[walks[0].real(number).cpu()]
        targets_N = ids_BT[:, 1:][places_BT[:, :-1]]
        with torch.inference_mode():
            mine_ND, theirs_ND = (
                walk.final(number, norm)[followed_N.to(walk.device)]
                for walk, norm in zip(walks, norms, strict=True)
            )
        tokens = compare_tokens(mine_ND, theirs_ND, heads[0], heads[1], targets_N, cap)
        start = 0
        for length in lengths:
            some = tokens[start : start + length - 1]
            found[text].append(Read(next(waiting[text]), some))
            start += length - 1
    return found


def parting(read: Read) -> int:
    """Where the greedy continuations of the prompt part, -1 if nowhere.

    The text goes on as the fine-tune does greedily, so the first place at which the two find
    different tokens most likely is the first at which their continuations differ.
    """
    differs = (~read.tokens.agrees_N[read.sample.prompt - 1 :]).nonzero()
    return int(differs[0, 0]) if len(differs) else -1


def matches(read: Read) -> tuple[bool, bool]:
    """Whether the fine-tune, and base + delta, answer the prompt with exactly this answer."""
    start = read.sample.prompt
    answer = torch.tensor(read.sample.tokens[start:])
    tops = (read.tokens.top_fine_tune_N, read.tokens.top_delta_N)
    mine, theirs = (bool(torch.equal(top_N[start - 1 :], answer)) for top_N in tops)
    return mine, theirs


def percentile(values_N: torch.Tensor, share: float) -> float:
    """The smallest value that is not below ``share`` of all."""
    place = max(1, math.ceil(share * len(values_N)))
    return float(values_N.float().kthvalue(place).values)


def perplexity(nll_N: torch.Tensor) -> float:
    """exp of the mean, kept finite."""
    return math.exp(min(LARGEST_NLL, float(nll_N.double().mean())))
