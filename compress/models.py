"""Whole models in memory, as transformers runs them: a fine-tune, and base + delta.

Both in float32 on every device: what differs between them is the delta, not rounding.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from deltaserve.artifact.checkpoint import HEAD, Checkpoint
from deltaserve.artifact.codecs import get_codec
from deltaserve.artifact.codecs.base import Encoded, aligned
from deltaserve.artifact.reader import Delta
from deltaserve.compress.lora import Adapter
from deltaserve.errors import CheckpointError, CompatibilityError

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def load_fine_tune(base: Checkpoint, source: Checkpoint | Adapter, device: str) -> Any:
    """The fine-tune in eval mode. Raises CheckpointError if transformers cannot load it."""
    with quiet():
        if isinstance(source, Checkpoint):
            return _ready(_load(source), device)
        from peft import PeftModel  # slow to import, needed for adapters only

        try:
            wrapped: Any = PeftModel.from_pretrained(_load(base), str(source.path))
        except (ValueError, RuntimeError, OSError) as cause:
            raise CheckpointError(f"{source.path} cannot be loaded: {cause}") from None
        return _ready(wrapped.merge_and_unload(), device)


def load_with_delta(base: Checkpoint, delta: Delta, device: str) -> Any:
    """Base + delta in eval mode, the sum not rounded: that is how an engine applies it."""
    with quiet():
        model = _load(base)
        entry = delta.manifest.tensors.get(base.embedding or "")
        if entry is not None and entry.shape[0] != model.config.get_text_config().vocab_size:
            model.resize_token_embeddings(entry.shape[0], mean_resizing=False)
    if HEAD in delta.manifest.tensors and base.tied:
        # The fine-tune has a head of its own; all of it is written below.
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    parameters = dict(model.named_parameters())
    for name in delta.names():
        if name not in parameters:
            raise CheckpointError(f"{delta.path}: the base has no parameter {name}")
        with torch.no_grad():
            parameters[name].copy_(
                reconstruct(delta.encoded(name), base.tensor(name) if base.has(name) else None)
            )
    return _ready(model, device)


def reconstruct(enc: Encoded, base: torch.Tensor | None) -> torch.Tensor:
    """The fine-tuned parameter in float32, additive codecs not rounded to its own dtype."""
    codec: Any = get_codec(enc.codec)
    if codec.additive:
        summed: torch.Tensor = codec.delta(enc).add_(aligned(base, enc.shape, torch.float32))
        return summed
    decoded: torch.Tensor = codec.decode(enc, base)
    return decoded.float()


def load_tokenizer(*places: Path) -> Any:
    """The tokenizer of the first directory that has one; None if none has."""
    for place in places:
        if any((place / name).is_file() for name in TOKENIZERS):
            try:
                with quiet():
                    return AutoTokenizer.from_pretrained(place, local_files_only=True)
            except (ValueError, OSError, KeyError, TypeError, AttributeError) as cause:
                raise CheckpointError(f"the tokenizer in {place} cannot be read: {cause}") from None
    return None


def check_tokenizers(base: Path, model: Path) -> None:
    """Raises CompatibilityError if the two number a token differently; added tokens are fine."""
    mine, theirs = load_tokenizer(base), load_tokenizer(model)
    if mine is None or theirs is None:
        return
    numbers = theirs.get_vocab()
    for token, number in mine.get_vocab().items():
        if numbers.get(token) != number:
            raise CompatibilityError(
                f"token {token!r} is number {number} in {base.name} but "
                f"{numbers.get(token, 'absent')} in {model.name}; a delta needs a fine-tune that "
                "keeps its base's tokenizer (added tokens are fine)"
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the notes and progress bars that libraries write for their developers."""
    shown = transformers_logging.is_progress_bar_enabled()
    level = transformers_logging.get_verbosity()
    bitsandbytes = logging.getLogger("bitsandbytes")
    before = bitsandbytes.level
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    bitsandbytes.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        bitsandbytes.setLevel(before)
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()


def _load(checkpoint: Checkpoint) -> Any:
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
        return AutoModelForCausalLM.from_pretrained(
            checkpoint.path, config=config, dtype=torch.float32, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as cause:
        raise CheckpointError(f"{checkpoint.path} cannot be loaded: {cause}") from None


def _ready(model: Any, device: str) -> Any:
    """Settings of our own for generation: the checkpoint's may sample or forbid tokens."""
    ends = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig(
        eos_token_id=[ends] if isinstance(ends, int) else ends,
        pad_token_id=model.generation_config.pad_token_id or 0,
    )
    return model.to(device).eval()
