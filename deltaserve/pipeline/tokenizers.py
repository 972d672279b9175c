"""Tokenizers of directories or hub names, one copy for each thread.

A fast tokenizer holds one state for padding and truncation and refuses concurrent use
("Already borrowed"), so threads must not share one.
"""

from __future__ import annotations

import copy
import os
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

from deltaserve.errors import PipelineError

_copies = threading.local()
_loading = threading.Lock()


def tokenizer_of(name: str) -> Any:
    """This thread's copy. Raises PipelineError: none there, or damaged."""
    mine = _copies.__dict__.setdefault("by_name", {})
    if name not in mine:
        with _loading:
            mine[name] = copy.deepcopy(_load(name))
    return mine[name]


def tokenizer_digest(name: str) -> str:
    """A hash of the files that decide what a tokenizer does."""
    from deltaserve.pipeline.digests import files_digest

    folder = Path(name)
    if not folder.is_dir():
        # A hub name stands for what was loaded.
        with _loading:
            backend = _load(name)
        text = backend.backend_tokenizer.to_str() if backend.is_fast else repr(backend)
        return files_digest({}, text + str(backend.chat_template))
    suffixes = (".json", ".jinja", ".model", ".txt", ".tiktoken")
    files = {p.name: p for p in folder.iterdir() if p.suffix in suffixes and "model" not in p.stem}
    names = ("tokenizer.model", "spiece.model")
    files |= {n: folder / n for n in names if (folder / n).is_file()}
    return files_digest(files, "")


@lru_cache(maxsize=32)
def _load(name: str) -> Any:
    # Parallelism is the plan's business: threads of the tokenizer's own would be counted
    # nowhere and take cores from the trainer. Who set this meant it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if name.startswith((".", "/", "~")) and not Path(name).exists():
        # A hub name looks otherwise: the hub would be asked, and complain of the name.
        raise PipelineError(f"{name}: no usable tokenizer: there is no such folder")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError) as cause:
        first = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise PipelineError(f"{name}: no usable tokenizer: {first}") from None
