"""A model's tokenizer: the base's files, overlaid by those of the delta; and what its tokens spell.

A delta's directory holds only the tokenizer files that differ from the base's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from deltaserve.errors import CheckpointError

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json",
)  # fmt: skip
SENTENCEPIECE_SPACE = "\u2581"


def has_own_tokenizer(directory: Path) -> bool:
    """Whether a delta's directory changes the base's tokenizer."""
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(name: str, directories: Iterable[Path]) -> PreTrainedTokenizerBase:
    """The tokenizer of model ``name`` from directories laid over each other, the first on top.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    directories = list(directories)
    if len(directories) == 1:
        return _load(name, directories[0])
    with tempfile.TemporaryDirectory(prefix="deltaserve-") as overlay:
        for directory in directories:
            for file in (*TOKENIZER_FILES, "config.json"):
                link = Path(overlay, file)
                if (directory / file).is_file() and not link.is_symlink():
                    link.symlink_to((directory / file).resolve())
        return _load(name, Path(overlay))


def _load(name: str, directory: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{name}: no usable tokenizer in {directory}: {error}") from error


class Spelling:
    """The bytes behind the tokens of a vocabulary.

    byte_ids: tokens such as ``<0xE2>`` that stand for one byte (SentencePiece's byte fallback).
    special_ids: tokens that are no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = repr(backend.decoder) if backend is not None else ""
        self._byte_level = "ByteLevel" in decoder
        self._bytes_of: dict[int, bytes] = {}
        self.special_ids = frozenset(tokenizer.all_special_ids) | {
            number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self.byte_ids: frozenset[int] = frozenset()
        if backend is None or "ByteFallback" in decoder:
            vocabulary = tokenizer.get_vocab()
            names = (f"<0x{byte:02X}>" for byte in range(256))
            self.byte_ids = frozenset(vocabulary[name] for name in names if name in vocabulary)

    def of(self, token_id: int) -> bytes:
        """What one token stands for, alone; of a special token, its name; of none, nothing."""
        known = self._bytes_of.get(token_id)
        if known is None:
            known = self._bytes_of[token_id] = self._spell(token_id)
        return known

    def _spell(self, token_id: int) -> bytes:
        added = self._tokenizer.added_tokens_decoder.get(token_id)
        if added is not None:
            return str(added.content).encode()
        # None for rows of the embedding past the vocabulary.
        name: Any = self._tokenizer.convert_ids_to_tokens(token_id) or ""
        if token_id in self.byte_ids:
            return bytes([int(name[3:5], 16)])
        if self._byte_level:
            return bytes(BYTE_OF_CHARACTER[c] for c in name if c in BYTE_OF_CHARACTER)
        return str(name).replace(SENTENCEPIECE_SPACE, " ").encode()


def _byte_characters() -> dict[str, int]:
    """Character -> byte in the vocabularies of byte-level BPE (GPT-2): printable Latin-1
    characters stand for themselves, the other bytes for characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF_CHARACTER = _byte_characters()
