"""What the smaller routes take: embeddings, /tokenize and /detokenize."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from deltaserve.server.messages import ChatPrompt
from deltaserve.server.protocol import (
    INT64_MAX,
    Body,
    GenerationRequest,
    Priority,
    Prompts,
    Salt,
    TokenId,
)
from deltaserve.server.strict import Items, Neutral


class PooledRequest(GenerationRequest):
    """An EmbeddingRequest as the engine's work; no client sends it."""

    pooling: Literal["mean", "last"]

    @property
    def num_logprobs(self) -> int | None:
        return None


class EmbeddingRequest(Body):
    neutral: ClassVar[Neutral] = {"dimensions": (), "softmax": (), "normalize": (True,)}
    instead: ClassVar[Mapping[str, str]] = {"dimensions": "vectors have the model's size"}

    model: str
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    pooling: Literal["last", "mean"] | None = None
    """Of which tokens' states the vector is made: the last one's, or all."""
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=INT64_MAX)] | None = None
    priority: Priority | None = None
    cache_salt: Salt | None = None
    user: str | None = None

    @property
    def pooled(self) -> PooledRequest:
        return PooledRequest(
            model=self.model,
            pooling=self.pooling or "last",
            add_special_tokens=self.add_special_tokens,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            priority=self.priority,
            cache_salt=self.cache_salt,
            user=self.user,
        )

    def check(self) -> None:
        self.pooled.check()


class TokenizeText(Body):
    """vLLM's /tokenize of a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChat(Body, ChatPrompt):
    """vLLM's /tokenize of a conversation."""

    neutral: ClassVar[Neutral] = {"chat_template": (), "mm_processor_kwargs": ()}

    model: str | None = None
    return_token_strs: bool | None = None

    def check(self) -> None:
        self.check_prompt()


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Items[TokenId]
