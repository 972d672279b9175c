"""The words that the engine and its callers share. No torch here: these cross processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal


class FinishReason(StrEnum):
    """Why a request ended; the first two are OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    REFUSED = "refused"
    """What the request asks for cannot be done, as it turned out; not the engine's fault."""


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
    or after ``max_tokens``, which may be 0 where only ``prompt_logprobs`` or ``pooling`` are
    wanted.
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
    pooling: Literal["mean", "last"] | None = None
    """Report one vector of the prompt: the last layer's states, of all its tokens or the last."""
    grammar: Grammar | None = None
    """The answer matches it, unless ``max_tokens`` cuts it; stop tokens only end what matches."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to continue. ``model`` is a delta's name, or the base's.

    Requests share computed prefixes only with those of the same model and ``cache_salt``, and of
    the same tenant unless the engine is configured otherwise.
    """

    request_id: str
    model: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    cache_salt: str = ""
    tenant: str = ""
    """Whose service is counted; "" is everybody without a name."""
    weight: float = 1.0
    """The tenant's share, relative to others."""
    priority: int = 0
    """Lower runs first."""
    fork_of: str | None = None
    """Id of a sibling with the same prompt, model, tenant and salt, which came before: its
    blocks of the prompt are shared. Of a request that is gone, or unlike, nothing is."""


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """Seconds that a request waited for its turn, waited for its delta to be loaded, computed
    its prompt, and generated; what is computed again after a preemption counts as prefill."""

    queued: float = 0.0
    load: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """New tokens of one request; the last event carries ``finish_reason``.

    A stop token that ended the request is included in ``token_ids``. ``num_cached``: how many
    tokens of the prompt did not have to be computed. ``logprobs``: one for each of ``token_ids``;
    ``prompt_logprobs``: of the prompt from its second token on, with the first event, as
    ``embedding``: the prompt's pooled states.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_cached: int = 0
    timing: RequestTiming | None = None
    """With the last event."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    embedding: tuple[float, ...] | None = None


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
    state: str = "ready"
    """registered (loaded when it is asked for), loading, ready, draining (leaves when its
    requests have ended) or error."""
    tier: str = "device"
    """device, host or disk: where its nearest copy is."""
    version: int = 1
    pinned: bool = False
    """Never evicted."""
    error: str | None = None
    """Why it, or the newer version that should have replaced it, could not be loaded."""


@dataclass(slots=True)
class Usage:
    """Counters of a tenant's or a model's requests since start. prompt_tokens: of those that
    were admitted; cached_tokens of them did not have to be computed. Seconds: of those that
    ended, summed."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    queued_s: float = 0.0
    load_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ResidencyStats:
    """Deltas by tier, and what has moved since the start."""

    device_deltas: int = 0
    device_bytes: int = 0
    """Reserved: loading deltas included."""
    device_limit: int = 0
    merged_deltas: int = 0
    merged_bytes: int = 0
    merged_limit: int = 0
    host_deltas: int = 0
    host_bytes: int = 0
    host_limit: int = 0
    registered: int = 0
    """Versions of all names, wherever they are."""
    loads: int = 0
    load_seconds: float = 0.0
    evictions: int = 0
    failures: int = 0
    hits: int = 0
    """Requests that found their delta on the device; ``misses`` had to wait for it."""
    misses: int = 0


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
    queued_requests: int = 0
    """Those that wait and never ran; the limits are compared with these two."""
    queued_tokens: int = 0
    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None
    plan_s: float = 0.0
    """Seconds in all steps: planning, ..."""
    execute_s: float = 0.0
    """... computing, ..."""
    commit_s: float = 0.0
    """... and taking the results."""
    delta_segments: int = 0
    """Distinct deltas of each step, summed over the steps: how often a delta was read."""
    bytes_per_s: float | None = None
    """Measured on steps that only decode, where ``slo_tpot_ms`` is set."""
    tenants: dict[str, Usage] = field(default_factory=dict)
    models: dict[str, Usage] = field(default_factory=dict)
    residency: ResidencyStats = ResidencyStats()
