"""What turns text into tokens and back for each served model."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from deltaserve.engine.tokenizer import (
    TOKENIZER_CONFIG,
    Spelling,
    has_own_tokenizer,
    load_tokenizer,
)
from deltaserve.engine.types import ModelInfo
from deltaserve.errors import CheckpointError, RequestError
from deltaserve.server.detokenize import Decoder
from deltaserve.server.messages import ChatPrompt
from deltaserve.server.tools.choose import format_of

CHAT_TEMPLATE = "chat_template.jinja"
# What a template raises when the messages are not what it expects.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class ModelTokenizer:
    """Tokenizer, chat template and end-of-sequence tokens of one model. Safe across threads."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None,
        eos_ids: frozenset[int],
        tool_template: str | None = None,
    ) -> None:
        """tool_template: for conversations with tools, where it is another."""
        self.eos_ids = eos_ids
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._tool_template = tool_template or chat_template
        self.tool_format = format_of(self._tool_template)
        """How the model writes calls of tools, as far as its template tells."""
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._spelling = Spelling(tokenizer)
        self.special_ids = self._spelling.special_ids
        self.byte_ids = self._spelling.byte_ids
        if self._backend is not None:
            # Settings saved with a tokenizer would cut prompts; changing them later is not
            # thread-safe.
            self._backend.no_truncation()
            self._backend.no_padding()

    def about(self) -> dict[str, Any]:
        """What its configuration tells, in the names of tokenizer_config.json."""
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        tokens = {name: getattr(self._tokenizer, name) for name in names}
        kind = type(self._tokenizer).__name__
        return {"tokenizer_class": kind, **tokens, "chat_template": self._chat_template}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt, with the special tokens that the model expects around it."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def encode_chat(self, prompt: ChatPrompt) -> list[int]:
        """Token ids of a conversation.

        Raises:
            RequestError: there is no template, or it refuses this.
        """
        if self._chat_template is None:
            raise RequestError(
                "this model has no chat template: use /v1/completions, or add "
                "chat_template.jinja to the model and compress it again",
                param="model",
            )
        tools: list[Any] | None = [tool.plain() for tool in prompt.shown_tools] or None
        try:
            text = self._tokenizer.apply_chat_template(
                [message.plain() for message in prompt.messages],
                chat_template=self._tool_template if tools else self._chat_template,
                tools=tools,
                add_generation_prompt=prompt.add_generation_prompt is not False,
                continue_final_message=bool(prompt.continue_final_message),
                tokenize=False,
                **prompt.chat_template_kwargs or {},
            )
        except TEMPLATE_ERRORS as error:
            reason = str(error) or type(error).__name__
            raise RequestError(
                f"the model's chat template refuses these messages: {reason}", param="messages"
            ) from error
        return self.encode(str(text), bool(prompt.add_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, alone; of a special token, its name."""
        return self._spelling.of(token_id)

    def showing(self, names: Iterable[str]) -> Decoder:
        """A decoder to whom these special tokens are text like any other."""
        shown = self.special_ids & {self._tokenizer.convert_tokens_to_ids(name) for name in names}
        return Verbatim(self, self.special_ids - shown) if shown else self

    def showing_all(self) -> Decoder:
        return Verbatim(self, frozenset())

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text without special tokens, and without transformers' cleaning of English spaces:
        that rewrites text which a client may already have received."""
        ids, skip = list(token_ids), skip_special_tokens
        if self._backend is not None:
            return str(self._backend.decode(ids, skip_special_tokens=skip))
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )
        )


class Verbatim:
    """Decodes special tokens as text too; but those in ``hidden`` are not to be given to it."""

    def __init__(self, tokenizer: ModelTokenizer, hidden: frozenset[int]) -> None:
        self.special_ids = hidden
        self.byte_ids = tokenizer.byte_ids
        self._tokenizer = tokenizer

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


class Tokenizers:
    """Those of the served versions, each loaded once. Safe across threads.

    Fine-tunes without tokenizer files of their own share the base's vocabulary in memory.
    """

    def __init__(self, models: Sequence[ModelInfo]) -> None:
        """``models``: the base first. Raises CheckpointError: one is missing or damaged."""
        self._lock = threading.Lock()
        self._base_dir = Path(models[0].path)
        self._base = load_tokenizer(models[0].name, [self._base_dir])
        self._loaded: dict[tuple[str, str | None], ModelTokenizer] = {}
        for info in models:
            self.of(info)

    def find(self, info: ModelInfo) -> ModelTokenizer | None:
        """That of a version, if it was loaded."""
        # The path as well: two artifacts of the same weights may differ in their tokenizers.
        return self._loaded.get((info.path, info.digest))

    def of(self, info: ModelInfo) -> ModelTokenizer:
        """That of a version, loaded if need be. Raises CheckpointError."""
        with self._lock:
            found = self.find(info)
            if found is None:
                found = self._loaded[info.path, info.digest] = self._load(info)
            return found

    def prepare(self, name: str, path: str, digest: str | None) -> None:
        """Get ready for a version that is about to be served. Raises CheckpointError."""
        self.of(ModelInfo(name, path, None, digest))

    def keep(self, models: Iterable[ModelInfo]) -> None:
        """Forget all others; requests that still use one hold it themselves."""
        wanted = {(info.path, info.digest) for info in models}
        with self._lock:
            for key in self._loaded.keys() - wanted:
                del self._loaded[key]

    def _load(self, info: ModelInfo) -> ModelTokenizer:
        directory, tokenizer = Path(info.path), self._base
        if directory == self._base_dir:
            return _model_tokenizer(tokenizer, [directory])
        if has_own_tokenizer(directory):
            tokenizer = load_tokenizer(info.name, [directory, self._base_dir])
        return _model_tokenizer(tokenizer, [directory, self._base_dir])


def _model_tokenizer(
    tokenizer: PreTrainedTokenizerBase, directories: Sequence[Path]
) -> ModelTokenizer:
    """``directories``: where to look for the other files, the model's own first."""
    template, tool_template = _template_file(directories), None
    if template is None and isinstance(tokenizer.chat_template, str):
        template = tokenizer.chat_template
    elif template is None and isinstance(tokenizer.chat_template, dict):
        template = tokenizer.chat_template.get("default")
        tool_template = tokenizer.chat_template.get("tool_use")
    return ModelTokenizer(tokenizer, template, _eos_ids(tokenizer, directories), tool_template)


def _template_file(directories: Iterable[Path]) -> str | None:
    for directory in directories:
        if (directory / CHAT_TEMPLATE).is_file():
            return (directory / CHAT_TEMPLATE).read_text(encoding="utf-8")
        # Older checkpoints keep the template here; the base's file must not win over it.
        if _read_json(directory / TOKENIZER_CONFIG).get("chat_template"):
            return None
    return None


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
