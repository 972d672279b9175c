"""Compressing layer by layer, each quantised for the inputs that it will really see.

The fine-tune's layer reads activations that the layers before it, already reconstructed,
have made (DeltaZip, Yao et al., EuroSys 2025): later layers mend what earlier ones lost.
In memory: one decoder layer of each model, and the activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from deltaserve.artifact.checkpoint import HEAD, Checkpoint
from deltaserve.compress.change import Change, check_finite, compare
from deltaserve.compress.hessian import Hessian
from deltaserve.compress.layers import LayerWalk, Watch
from deltaserve.compress.models import (
    check_tokenizers,
    load_fine_tune,
    load_tokenizer,
    reconstruct,
)
from deltaserve.compress.plan import Plan
from deltaserve.compress.text import Text
from deltaserve.compress.textsource import TextOptions, check_tokens, gather_text
from deltaserve.errors import CheckpointError

NORM = "model.norm.weight"


def calibration_text(
    base: Checkpoint, model: Checkpoint, options: TextOptions, device: str
) -> Text:
    """The text of the options; the fine-tune is loaded whole only to sample from it.

    Raises ConfigError for a bad file, CompatibilityError for tokenizers that disagree.
    """
    check_tokenizers(base.path, model.path)
    check_finite(base, model)
    config = model.hf_config.get_text_config()
    text = gather_text(
        options,
        load_tokenizer(model.path, base.path),
        int(config.max_position_embeddings),
        lambda: load_fine_tune(base, model, device),
    )
    check_tokens(text, int(config.vocab_size))
    return text


def calibrated_changes(
    names: Sequence[str], base: Checkpoint, model: Checkpoint, plan: Plan, text: Text, device: str
) -> Iterator[Change]:
    """Every parameter of ``names``: embedding, then layers in order, then the rest."""
    if model.embedding is None:
        raise CheckpointError(f"{model.name} has no embedding of a known name to calibrate with")
    change = compare(model.embedding, base, model, plan)
    yield change
    walk = LayerWalk(model, text.samples, rebuilt(change, base, model), device)
    left = [name for name in names if name != model.embedding]
    for layer in range(len(walk)):
        mine = [name for name in left if name.startswith(walk.prefix(layer))]
        left = [name for name in left if not name.startswith(walk.prefix(layer))]
        hessians: dict[str, Hessian] = {}
        walk.observe(layer, {n: model.tensor(n).float() for n in mine}, adder(hessians))
        changes = [compare(n, base, model, plan, hessians.get(n)) for n in mine]
        yield from changes
        walk.advance(layer, {c.name: rebuilt(c, base, model) for c in changes})
    yield from _the_rest(left, base, model, plan, walk)


def _the_rest(
    left: list[str], base: Checkpoint, model: Checkpoint, plan: Plan, walk: LayerWalk
) -> Iterator[Change]:
    """Final norm, then the head, whose inputs come out of it, and whatever else there is."""
    hessians: dict[str, Hessian] = {}
    for name in sorted(left, key=lambda name: name != NORM):
        if name == HEAD and NORM in left and not base.tied and not model.tied:
            norm = rebuilt(compare(NORM, base, model, plan), base, model)
            walk.observe_head(norm, adder(hessians))
        yield compare(name, base, model, plan, hessians.get(name))


def adder(hessians: dict[str, Hessian]) -> Watch:
    """A watcher that sums up the inputs of every projection under its parameter's name."""

    def watch(module: str, x_TK: torch.Tensor) -> None:
        name = f"{module}.weight"
        if name not in hessians:
            hessians[name] = Hessian(x_TK.shape[-1], x_TK.device)
        hessians[name].add(x_TK)

    return watch


def rebuilt(change: Change, base: Checkpoint, model: Checkpoint) -> torch.Tensor:
    """The parameter as base + delta has it, float32."""
    if change.enc is None:
        return model.tensor(change.name).float()
    return reconstruct(change.enc, base.tensor(change.name))
