"""The small files beside the weights, which travel with a fine-tune."""

from __future__ import annotations

import shutil
from pathlib import Path

# Everything that changes how text becomes tokens or how generation starts, and the
# configuration, whose vocabulary size may differ from the base's.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def copy_changed(source: Path, base: Path, target: Path) -> list[str]:
    """Copy the source's companions that the base lacks or has otherwise; returns their names."""
    copied = []
    for name in COMPANIONS:
        mine, theirs = source / name, base / name
        if not mine.is_file():
            continue
        if theirs.is_file() and theirs.read_bytes() == mine.read_bytes():
            continue
        shutil.copyfile(mine, target / name)
        copied.append(name)
    return copied
