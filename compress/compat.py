"""Do base and fine-tune belong together? Same class, same parameters, same computation."""

from __future__ import annotations

from typing import Any

from deltaserve.artifact.checkpoint import HEAD, Checkpoint
from deltaserve.compress.classify import classify
from deltaserve.errors import CompatibilityError

# Fields that do not change what a forward pass computes for the positions it is given.
# Anything not listed is compared: a forgotten field should refuse, not corrupt.
IGNORED = {
    "_name_or_path",
    "_attn_implementation",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "vocab_size",
    "max_position_embeddings",
    "use_cache",
    "tie_word_embeddings",
    "initializer_range",
    "pretraining_tp",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "id2label",
    "label2id",
    "problem_type",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
}
IGNORED_ENDINGS = ("_token_id", "_token_ids", "dropout", "_pdrop")


def check_compatible(base: Checkpoint, model: Checkpoint) -> list[str]:
    """The parameters to compare, sorted; raises CompatibilityError at the first difference.

    If one of the two shares head and embedding and the other does not, both are seen
    with an explicit ``lm_head.weight``.
    """
    if base.architecture != model.architecture:
        raise CompatibilityError(
            f"{base.name} is a {base.architecture}, {model.name} a {model.architecture}; "
            "a delta needs the base that the model was tuned from"
        )
    names = _common_parameters(base, model)
    for name in names:
        _check_shape(name, base, model)
    check_config(base, model)
    return names


def check_config(base: Checkpoint, model: Checkpoint) -> None:
    """Raises CompatibilityError unless both configurations compute the same."""
    mine, theirs = (c.hf_config.get_text_config() for c in (base, model))
    # Only fields that the class knows: trainers leave notes of their own in config.json.
    known = type(mine)().to_dict()
    ours, other = mine.to_dict(), theirs.to_dict()
    for field in sorted(known):
        if field in IGNORED or field.endswith(IGNORED_ENDINGS):
            continue
        a, b = ours.get(field), other.get(field)
        if a != b:
            raise CompatibilityError(
                f"config.json: {field} is {_brief(a)} in {base.name} but {_brief(b)} in "
                f"{model.name}; the two compute differently and cannot share a base"
            )


def _common_parameters(base: Checkpoint, model: Checkpoint) -> list[str]:
    mine, theirs = set(base.names()), set(model.names())
    for checkpoint, names in ((base, mine), (model, theirs)):
        if checkpoint.tied:
            names.discard(HEAD)  # a stored copy of the embedding
    if HEAD in mine | theirs:
        for checkpoint, names in ((base, mine), (model, theirs)):
            if checkpoint.has(HEAD):
                names.add(HEAD)
    for name in sorted(mine ^ theirs):
        has, lacks = (base, model) if name in mine else (model, base)
        raise CompatibilityError(
            f"parameter {name} is in {has.name} but not in {lacks.name}; "
            "a delta needs the base that the model was tuned from"
        )
    return sorted(mine)


def _check_shape(name: str, base: Checkpoint, model: Checkpoint) -> None:
    ours, other = base.shape(name), model.shape(name)
    vocabulary = classify(name, other) in ("embedding", "head")
    if ours == other or (vocabulary and len(ours) == len(other) and ours[1:] == other[1:]):
        return
    raise CompatibilityError(
        f"parameter {name} is {list(ours)} in {base.name} but {list(other)} in {model.name}; "
        "a delta needs the base that the model was tuned from"
    )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
