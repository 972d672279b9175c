"""What turns text into tokens and back for each served model.

A delta's directory holds only the tokenizer files that differ from the base's, so a
fine-tune's tokenizer is loaded from both directories laid over each other.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from deltaserve.engine.types import ModelInfo
from deltaserve.errors import CheckpointError, RequestError

CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json",
)  # fmt: skip

SENTENCEPIECE_SPACE = "\u2581"


def _byte_characters() -> dict[str, int]:
    """Character -> byte in the vocabularies of byte-level BPE (GPT-2): printable Latin-1
    characters stand for themselves, the other bytes for characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF_CHARACTER = _byte_characters()

# What a template raises when the messages are not what it expects.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)


class ModelTokenizer:
    """Tokenizer, chat template and end-of-sequence tokens of one model. Safe across threads."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None,
        eos_ids: frozenset[int],
    ) -> None:
        self.eos_ids = eos_ids
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self.special_ids = frozenset(tokenizer.all_special_ids) | {
            number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._bytes_of: dict[int, bytes] = {}
        self._byte_level = self._backend is not None and "ByteLevel" in repr(self._backend.decoder)
        self.byte_ids: frozenset[int] = frozenset()
        if self._backend is None or "ByteFallback" in repr(self._backend.decoder):
            vocabulary = tokenizer.get_vocab()
            names = (f"<0x{byte:02X}>" for byte in range(256))
            self.byte_ids = frozenset(vocabulary[name] for name in names if name in vocabulary)
        if self._backend is not None:
            # Settings saved with a tokenizer would cut prompts; changing them later is not
            # thread-safe.
            self._backend.no_truncation()
            self._backend.no_padding()

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt, with the special tokens that the model expects around it."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant begins to speak.

        Raises:
            RequestError: the template refuses these messages.
        """
        try:
            ids = self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._chat_template,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        except TEMPLATE_ERRORS as error:
            reason = str(error) or type(error).__name__
            raise RequestError(
                f"the model's chat template refuses these messages: {reason}", param="messages"
            ) from error
        return list(ids)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, alone; of a special token, its name."""
        known = self._bytes_of.get(token_id)
        if known is None:
            known = self._bytes_of[token_id] = self._spell(token_id)
        return known

    def _spell(self, token_id: int) -> bytes:
        added = self._tokenizer.added_tokens_decoder.get(token_id)
        if added is not None:
            return added.content.encode()
        # None for rows of the embedding past the vocabulary.
        name: Any = self._tokenizer.convert_ids_to_tokens(token_id) or ""
        if token_id in self.byte_ids:
            return bytes([int(name[3:5], 16)])
        if self._byte_level:
            return bytes(BYTE_OF_CHARACTER[c] for c in name if c in BYTE_OF_CHARACTER)
        return str(name).replace(SENTENCEPIECE_SPACE, " ").encode()

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens, and without transformers' cleaning of English spaces:
        that rewrites text which a client may already have received."""
        if self._backend is not None:
            text = self._backend.decode(token_ids, skip_special_tokens=True)
        else:
            text = self._tokenizer.decode(
                list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        return str(text)


def load_tokenizers(models: Sequence[ModelInfo]) -> dict[str, ModelTokenizer]:
    """One ModelTokenizer for each model, the base first in ``models``.

    Fine-tunes without tokenizer files of their own share the base's vocabulary in memory.

    Raises:
        CheckpointError: a tokenizer is missing or damaged.
    """
    base_dir = Path(models[0].path)
    base = _load_tokenizer(base_dir, models[0].name)
    loaded = {models[0].name: _model_tokenizer(base, [base_dir])}
    for model in models[1:]:
        own_dir = Path(model.path)
        own = base
        if any((own_dir / name).is_file() for name in TOKENIZER_FILES):
            own = _load_overlay(base_dir, own_dir, model.name)
        loaded[model.name] = _model_tokenizer(own, [own_dir, base_dir])
    return loaded


def _model_tokenizer(
    tokenizer: PreTrainedTokenizerBase, directories: Sequence[Path]
) -> ModelTokenizer:
    """``directories``: where to look for the other files, the model's own first."""
    template = _template_file(directories)
    if template is None and isinstance(tokenizer.chat_template, str):
        template = tokenizer.chat_template
    elif template is None and isinstance(tokenizer.chat_template, dict):
        template = tokenizer.chat_template.get("default")
    return ModelTokenizer(tokenizer, template, _eos_ids(tokenizer, directories))


def _template_file(directories: Iterable[Path]) -> str | None:
    for directory in directories:
        if (directory / CHAT_TEMPLATE).is_file():
            return (directory / CHAT_TEMPLATE).read_text(encoding="utf-8")
        # Older checkpoints keep the template here; the base's file must not win over it.
        if _read_json(directory / TOKENIZER_CONFIG).get("chat_template"):
            return None
    return None


def _load_tokenizer(directory: Path, name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{name}: no usable tokenizer in {directory}: {error}") from error


def _load_overlay(base_dir: Path, own_dir: Path, name: str) -> PreTrainedTokenizerBase:
    with tempfile.TemporaryDirectory(prefix="deltaserve-") as overlay:
        for directory in (own_dir, base_dir):
            for file in (*TOKENIZER_FILES, "config.json"):
                link = Path(overlay, file)
                if (directory / file).is_file() and not link.is_symlink():
                    link.symlink_to((directory / file).resolve())
        return _load_tokenizer(Path(overlay), name)


def _eos_ids(tokenizer: PreTrainedTokenizerBase, directories: Sequence[Path]) -> frozenset[int]:
    """Tokens that end an answer: those of the generation settings, and the tokenizer's own.

    Fine-tunes often teach the model to end with a token that only their tokenizer names, so
    both count, as in vLLM.
    """
    ids = {tokenizer.eos_token_id}
    for file in ("generation_config.json", "config.json"):
        found = [_read_json(directory / file).get("eos_token_id") for directory in directories]
        first = next((value for value in found if value is not None), None)
        if first is not None:
            ids.update(first if isinstance(first, list) else [first])
            break
    return frozenset(number for number in ids if isinstance(number, int))


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}
