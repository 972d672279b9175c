"""Fine-tunes as transformers runs them, to generate text with; tokenizers."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.compress.lora import Adapter
from deltaserve.errors import CheckpointError, CompatibilityError

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def load_fine_tune(base: Checkpoint, source: Checkpoint | Adapter, device: str) -> Any:
    """The fine-tune in eval mode and its own precision, to generate text with.

    Weights are mapped from the files, so that memory holds only what is being computed; on
    another device than the CPU they are copied there. Raises CheckpointError if transformers
    cannot run it.
    """
    with quiet():
        if isinstance(source, Checkpoint):
            return _ready(_mapped(source), device)
        from peft import PeftModel  # slow to import, needed for adapters only

        try:
            wrapped: Any = PeftModel.from_pretrained(_mapped(base), str(source.path))
        except (ValueError, RuntimeError, OSError) as cause:
            raise CheckpointError(f"{source.path} cannot be loaded: {cause}") from None
        # The adapter's layers sit inside the model now; its factors may be of another dtype.
        model = wrapped.get_base_model()
        return _ready(model.to(base.dtype(base.names()[0])), device)


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


def _mapped(checkpoint: Checkpoint) -> Any:
    """The model class over the checkpoint's own tensors, none of them copied."""
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
        state = {name: checkpoint.tensor(name) for name in checkpoint.names()}
        dtype = checkpoint.dtype(checkpoint.embedding or checkpoint.names()[0])
        model.load_state_dict({n: t.to(dtype) for n, t in state.items()}, strict=False, assign=True)
        model.tie_weights()
        _fill_buffers(model, config)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as cause:
        raise CheckpointError(f"{checkpoint.path} cannot be loaded: {cause}") from None
    empty = [name for name, value in model.state_dict().items() if value.is_meta]
    if empty:
        raise CheckpointError(f"{checkpoint.path} lacks {empty[0]}; copy or download it again")
    return model.requires_grad_(False)


def _fill_buffers(model: Any, config: Any) -> None:
    """Buffers that no file holds, from a model of one layer and the same settings."""
    single = copy.deepcopy(config)
    text = single.get_text_config()
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 1, 1, None
    if getattr(text, "layer_types", None):
        text.layer_types = sorted(set(text.layer_types))
        text.num_hidden_layers = len(text.layer_types)
    small = dict(AutoModelForCausalLM.from_config(single).named_buffers())
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta and name in small:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, small[name])


def _ready(model: Any, device: str) -> Any:
    """Settings of our own for generation: the checkpoint's may sample or forbid tokens."""
    ends = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig(
        eos_token_id=[ends] if isinstance(ends, int) else ends,
        pad_token_id=model.generation_config.pad_token_id or 0,
    )
    return model.to(device).eval()
