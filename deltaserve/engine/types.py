"""The words that the engine and its callers share. No torch here: these cross processes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class FinishReason(StrEnum):
    """Why a request ended; the first two are OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely the model found a token, before anything was asked of its logits.

    logprob: natural logarithm. rank: 1 is the likeliest. top: the likeliest tokens and their
    logprobs, likeliest first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must match: a JSON schema, a regular expression, or a grammar in the
    notation of Lark as llguidance reads it."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to pick the next token. temperature 0 is greedy; the defaults of the rest switch it off.

    ``seed`` makes the draws repeatable whatever shares the batch. Generation ends with
    any of ``stop_token_ids`` (the model's end-of-sequence tokens included by the caller)
    or after ``max_tokens``, which may be 0 where only ``prompt_logprobs`` are wanted.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    """Until so many are generated, no stop token can be drawn."""
    min_p: float = 0.0
    """Tokens must be at least so likely, relative to the likeliest."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit)."""
    logprobs: int | None = None
    """Report each generated token's logprob, and so many of the likeliest tokens."""
    prompt_logprobs: int | None = None
    """The same of each token of the prompt but the first, which then is computed, never reused."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Only these can be drawn, stop tokens included. Not together with a grammar."""
    grammar: Grammar | None = None
    """The answer matches it, unless ``max_tokens`` cuts it; stop tokens only end what matches."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to continue. ``model`` is a delta's name, or the base's.

    Requests share computed prefixes only with those of the same model and ``cache_salt``.
    """

    request_id: str
    model: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """New tokens of one request; the last event carries ``finish_reason``.

    A stop token that ended the request is included in ``token_ids``. ``num_cached``: how many
    tokens of the prompt did not have to be computed. ``logprobs``: one for each of ``token_ids``;
    ``prompt_logprobs``: of the prompt from its second token on, with the first event.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_cached: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A served model. Bytes and digest are those of its delta; the base has none."""

    name: str
    path: str
    parent: str | None
    digest: str | None
    codecs: tuple[str, ...] = ()
    full_bytes: int = 0
    resident_bytes: int = 0
    disk_bytes: int = 0
    vocab_size: int = 0
    merged: bool = False
    """Its projections are kept as base + delta, dense: faster, in the memory of a whole model."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since start, and the present load."""

    running: int
    waiting: int
    kv_blocks_total: int
    kv_blocks_used: int
    steps: int
    mixed_steps: int
    """Steps whose batch held rows of more than one model."""
    max_models_in_step: int
    prompt_tokens: int
    """Of admitted requests; ``cached_tokens`` of them did not have to be computed."""
    cached_tokens: int
    generation_tokens: int
    preemptions: int
