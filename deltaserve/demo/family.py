"""What was built: paths, scores, the record on disk, and loading with transformers."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from deltaserve.artifact.staging import replacing
from deltaserve.demo.recipe import Kind

RECORD = "family.json"
BASE = "base"


@dataclass(frozen=True)
class FineTune:
    """One trained member; scores are exact match on held-out prompts, 0 to 1.

    `path` is a transformers checkpoint for kind "full", a PEFT adapter for "lora".
    """

    name: str
    path: Path
    task: str
    kind: Kind
    base_score: float
    score: float


@dataclass(frozen=True)
class Family:
    """A base and its fine-tunes on disk, all bfloat16."""

    root: Path
    base: Path
    members: tuple[FineTune, ...]

    def member(self, name: str) -> FineTune:
        """The member called `name`.

        Raises:
            ValueError: there is none.
        """
        for member in self.members:
            if member.name == name:
                return member
        names = ", ".join(member.name for member in self.members)
        raise ValueError(f"the family at {self.root} has no member {name!r}; it has {names}")


@dataclass
class Record:
    """The content of family.json, updated after every phase.

    Scores and seconds are keyed by member (or "base"); `base_scores` by member.
    """

    fingerprint: str
    seed: int
    version: int
    score_prompts: int
    tasks: dict[str, str]
    base_scores: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, root: Path) -> Record | None:
        """The record in `root`; None when absent or not readable as one."""
        try:
            return cls(**json.loads((root / RECORD).read_text()))
        except (FileNotFoundError, TypeError, json.JSONDecodeError):
            return None

    def write(self, root: Path) -> None:
        """Replace the record in `root` atomically."""
        with replacing(root / RECORD) as partial:
            partial.write_text(json.dumps(asdict(self), indent=2) + "\n")


def default_dir() -> Path:
    """Where the family lives unless told: the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "deltaserve" / "demo"


@contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries tell their developers, and without their progress bars.

    Callers draw bars of their own.  PEFT warns of a coming rename in transformers, and
    bitsandbytes, which it imports, of kernels that nothing here uses.
    """
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    bitsandbytes = logging.getLogger("bitsandbytes")
    level = bitsandbytes.level
    bitsandbytes.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(category=FutureWarning, action="ignore"):
            yield
    finally:
        bitsandbytes.setLevel(level)
        if shown:
            transformers_logging.enable_progress_bar()


def load_base(
    base: Path, dtype: torch.dtype = torch.float32
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A full checkpoint (the base or a full fine-tune) with its tokenizer."""
    with quiet():
        model = LlamaForCausalLM.from_pretrained(base, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(base)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return model, tokenizer


def load_adapter(
    base: Path, adapter: Path, dtype: torch.dtype = torch.float32
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The base with a PEFT adapter's layers inside, and the base's tokenizer."""
    with quiet():
        from peft import PeftModel  # slow to import, needed for adapters only

    model, tokenizer = load_base(base, dtype)
    with quiet():
        # Both calls change `model` in place; the wrapper itself is not needed.
        PeftModel.from_pretrained(model, str(adapter)).to(dtype=dtype)
    return model, tokenizer


def load_member(
    family: Family, name: str, dtype: torch.dtype = torch.float32
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A member's reference model and tokenizer, as transformers serves them.

    Raises:
        ValueError: the family has no such member.
    """
    member = family.member(name)
    if member.kind == "lora":
        return load_adapter(family.base, member.path, dtype)
    return load_base(member.path, dtype)
