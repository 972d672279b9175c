"""The class of a parameter, by its name and rank: sizes and codecs are chosen per class."""

from __future__ import annotations

from deltaserve.artifact.checkpoint import EMBEDDINGS

HEADS = ("lm_head.weight", "embed_out.weight", "score.weight")
NORM_MARKS = ("norm", "ln_", "layernorm")


def classify(name: str, shape: tuple[int, ...]) -> str:
    """One of ``manifest.KINDS``: linear, embedding, head, norm, bias or other."""
    if name.endswith(HEADS):
        return "head"
    if name.endswith(EMBEDDINGS):
        return "embedding"
    if name.endswith("bias"):
        return "bias"
    if len(shape) >= 2:
        return "linear"
    owner = name.split(".")[-2:]
    return "norm" if any(mark in part for part in owner for mark in NORM_MARKS) else "other"
