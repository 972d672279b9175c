"""Which text a command works on: its options, and the text that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaserve.compress.jsonl import read_text
from deltaserve.compress.sampling import sample_text
from deltaserve.compress.text import Sample, Text
from deltaserve.errors import CompatibilityError, ConfigError

SAMPLED_LENGTH = 256


@dataclass(frozen=True)
class TextOptions:
    """Which text: a JSONL file, or ``samples`` sequences sampled from the fine-tune.

    seq_len: longest sequence in tokens; None: the file's own, 256 when sampling.
    """

    data: Path | None = None
    samples: int = 64
    seq_len: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"--samples must be at least 1, not {self.samples}")
        if self.seq_len is not None and self.seq_len < 2:
            raise ConfigError(f"--seq-len must be at least 2, not {self.seq_len}")
        if self.seed < 0:
            raise ConfigError(f"--seed must be 0 or more, not {self.seed}")


def gather_text(
    options: TextOptions, tokenizer: Any, context: int, fine_tune: Callable[[], Any]
) -> Text:
    """The file's text, or what the fine-tune says itself; only then is it called for.

    context: longest sequence that the model reads. Raises ConfigError.
    """
    if options.seq_len is not None and options.seq_len > context:
        raise ConfigError(f"--seq-len {options.seq_len} is beyond the model's {context} tokens")
    if options.data is None:
        seq_len = min(options.seq_len or SAMPLED_LENGTH, context)
        return sample_text(
            fine_tune(), tokenizer, samples=options.samples, seq_len=seq_len, seed=options.seed
        )
    return read_text(
        options.data,
        tokenizer,
        samples=options.samples,
        seq_len=options.seq_len,
        context=context,
        seed=options.seed,
    )


def check_tokens(samples: Sequence[Sample], vocabulary: int) -> None:
    """Raises CompatibilityError if the text has tokens that the model does not."""
    highest = max((max(sample.tokens) for sample in samples), default=0)
    if highest >= vocabulary:
        raise CompatibilityError(
            f"the tokenizer knows token {highest}, the model only {vocabulary} tokens; "
            "use the tokenizer that the model was trained with"
        )
