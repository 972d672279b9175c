"""Every public knob, once: what it is called, its type, its default, and what values it takes.

Names are those of vLLM where it has one. ``config_sources`` reads them from flags and files.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from deltaserve.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
Quantization = Literal["none", "bitsandbytes", "bitsandbytes-int8"]
SchedulingPolicy = Literal["fcfs", "priority", "vtc"]
ToolCallParser = Literal["auto", "hermes", "llama3_json", "mistral"]
LogFormat = Literal["text", "json"]


@dataclass(frozen=True, slots=True)
class DeltaSource:
    """A fine-tune to serve: its name in the API, and the directory of its delta.

    required: without it nothing is served; otherwise it is left out when it cannot be.
    """

    name: str
    path: str
    pinned: bool = False
    required: bool = True


@dataclass(frozen=True)
class EngineConfig:
    """What the engine loads and how much it takes on. Raises ConfigError when inconsistent."""

    base: str
    """Directory or hub id of the base model."""
    deltas: tuple[DeltaSource, ...] = ()
    served_model_name: str = ""
    """Name of the base in the API; the last part of ``base`` unless given."""
    dtype: Dtype = "auto"
    """"auto" is the checkpoint's own; float32 on processors that cannot compute in it."""
    device: Device = "auto"
    """"auto" takes the GPU if there is one."""
    quantization: Quantization = "none"
    """The base's projections at 4 bits (NF4) or 8: less memory, and an error that deltas do not
    correct. Deltas themselves are as they were compressed."""
    max_model_len: int | None = None
    """Longest sequence, prompt and answer together; None is what the model was made for."""
    max_num_seqs: int = 64
    """Requests in one batch, at most."""
    max_num_batched_tokens: int = 2048
    """Tokens in one step, at most; longer prompts are computed in pieces."""
    block_size: int = 16
    """Tokens in a KV block."""
    kv_cache_memory_bytes: int | None = None
    """Memory of the KV cache; None lets the engine choose."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory that may be used; what is left of it beside the base and the largest
    step goes to the KV cache and to deltas."""
    enable_prefix_caching: bool = True
    """Requests of one model share what they have in common at the beginning."""
    delta_memory_bytes: int | None = None
    """Memory of the device for deltas; None lets the engine choose."""
    host_memory_bytes: int | None = None
    """Memory for deltas that are not on the device but shall need no disk; None: chosen."""
    load_timeout_s: float = 300.0
    """What reading and preparing a delta may take; then its requests end with an error."""
    merge_memory_bytes: int | None = None
    """Memory for deltas whose projections are kept dense (base + delta) as well: faster on a CPU
    where many rows use one. None takes a quarter of what is free on a CPU, nothing on a GPU."""
    enforce_eager: bool = False
    """On a GPU, launch the kernels of each decode step one by one instead of replaying captured
    steps (CUDA graphs). Slower; starts sooner and takes less memory."""
    deterministic: bool = False
    """A request's logits and tokens are the same to the bit, whatever shares the batch. Slow."""

    scheduling_policy: SchedulingPolicy = "vtc"
    """"vtc": bands of priority, then the least served tenant, then age. "priority": without
    tenants. "fcfs": age alone."""
    max_queued_requests: int = 8192
    """Requests that may wait; further ones are refused at once."""
    max_queued_tokens: int | None = None
    """Prompt tokens that may wait; None is no limit."""
    slo_tpot_ms: float | None = None
    """Milliseconds per output token: no more requests run together than keep it, by the bytes
    that their step reads. None lets as many run as fit."""
    max_wait_s: float = 300.0
    """Seconds after which the oldest request of a tenant for a model goes before all others."""
    share_prefixes_between_tenants: bool = False
    """Tenants may use what was computed for others of the same model; hits can then be timed."""

    def __post_init__(self) -> None:
        if not self.base:
            raise ConfigError("no base model was given: name its directory or hub id")
        if not self.served_model_name:
            object.__setattr__(self, "served_model_name", Path(self.base).resolve().name)
        for name in (
            "max_model_len",
            "max_num_seqs",
            "block_size",
            "kv_cache_memory_bytes",
            "max_queued_requests",
            "max_queued_tokens",
            "delta_memory_bytes",
        ):
            _require_positive(name, getattr(self, name))
        for name in ("slo_tpot_ms", "max_wait_s", "load_timeout_s"):
            _require_duration(name, getattr(self, name))
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}, but must be above 0 "
                "and at most 1"
            )
        for name in ("host_memory_bytes", "merge_memory_bytes"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} is {value}, but must be 0 or more")
        if self.quantization != "none" and self.merge_memory_bytes:
            raise ConfigError(
                f"merge_memory_bytes and quantization {self.quantization} exclude each other: a "
                "merged delta would hold the whole base in full precision; leave one of them out"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, but must be at least "
                f"max_num_seqs ({self.max_num_seqs}): each running request needs one token a step"
            )
        check_names(self.served_model_name, [delta.name for delta in self.deltas])


@dataclass(frozen=True)
class ServerConfig:
    """Where the endpoint listens, who may use it, and the engine behind it."""

    engine: EngineConfig
    host: str = "127.0.0.1"
    port: int = 8000
    """0 picks a free one."""
    engine_process: bool = True
    """Run the engine in a process of its own, which is started again if it crashes; otherwise in
    a thread of the server."""
    engine_hang_s: float = 300.0
    """An engine process that gives no sign of life for so long, with work to do, is replaced. A
    step is one sign of life: make it longer than the longest step."""
    drain_timeout_s: float = 10.0
    """What requests in flight may still take when the server is told to stop."""
    tool_call_parser: ToolCallParser = "auto"
    """How the models write calls of tools; "auto" is as each one's chat template shows."""
    request_timeout_s: float = 600.0
    """What a request may take from its first byte to the end of its answer."""
    max_body_bytes: int = 8 * 2**20
    """Larger requests are refused."""
    log_format: LogFormat = "text"
    """"json": each line of the log is an object, with the id of the request it is about."""
    otlp_traces_endpoint: str | None = None
    """Where traces of requests are sent by OTLP over HTTP, such as
    http://127.0.0.1:4318/v1/traces. Needs the extra "otel"."""
    api_key_sha256: bytes | None = field(default=None, repr=False)
    """Digest of the key that /v1 asks for (the knob ``api_key``); the key itself is not kept.
    For a single user: where there are tenants, each has its own."""
    admin_key_sha256: bytes | None = field(default=None, repr=False)
    """Digest of the key for tenants, deltas and metrics (the knob ``admin_key``). Without it
    there are no management routes."""
    tenants: str | None = None
    """YAML file of tenants, their keys and limits."""
    state_dir: str | None = None
    """Directory for the registry, the tenants and the usage; needed by the two above."""
    delta_roots: tuple[str, ...] = ()
    """Directories from which deltas may be loaded at run time."""
    delta_urls: tuple[str, ...] = ()
    """Beginnings of the addresses (s3://, gs://, az://, https://, http://) from which deltas may be
    fetched at run time. Needs the extra "objects"."""
    max_delta_bytes: int = 64 * 2**30
    """Larger deltas are not fetched."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}, but must be between 0 and 65535")
        if not self.host:
            raise ConfigError("host is empty: name an address, such as 127.0.0.1")
        for name in ("engine_hang_s", "drain_timeout_s", "request_timeout_s"):
            _require_duration(name, getattr(self, name))
        _require_positive("max_body_bytes", self.max_body_bytes)
        if self.managed and self.state_dir is None:
            raise ConfigError("tenants and admin_key need state_dir: name a directory to keep")
        if self.state_dir is not None and not self.managed:
            raise ConfigError("state_dir has no use without admin_key or tenants")
        _require_positive("max_delta_bytes", self.max_delta_bytes)
        for name in ("delta_roots", "delta_urls"):
            if getattr(self, name) and self.admin_key_sha256 is None:
                raise ConfigError(f"{name} has no use without admin_key: nobody could load a delta")
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ConfigError("otlp_traces_endpoint must begin with http:// or https://")
        if self.managed and self.api_key_sha256 is not None:
            raise ConfigError("api_key is for a single user: make a tenant for it instead")

    @property
    def managed(self) -> bool:
        """There are tenants, or somebody who may make them."""
        return self.tenants is not None or self.admin_key_sha256 is not None

    @property
    def locked(self) -> bool:
        """Nobody may generate without a key."""
        return self.managed or self.api_key_sha256 is not None


def hash_key(key: str) -> bytes:
    """SHA-256 of an API key. Raises ConfigError for one that no header could carry."""
    if not re.fullmatch(r"[!-~]+", key):
        raise ConfigError("the API key must be visible ASCII characters, without spaces")
    return hashlib.sha256(key.encode()).digest()


def _require_positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ConfigError(f"{name} is {value}, but must be at least 1")


def _require_duration(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < math.inf:
        raise ConfigError(f"{name} is {value}, but must be a number above 0")


def check_unique(names: list[str]) -> None:
    """Raises ConfigError for a delta's name that is used twice."""
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two deltas are called {name!r}: give each its own name")


def check_names(base: str, deltas: list[str]) -> None:
    """Raises ConfigError for names that the API cannot use, and for one that is used twice."""
    for name in (base, *deltas):
        if not NAME.fullmatch(name):
            remedy = " (choose another with --served-model-name)" if name is base else ""
            raise ConfigError(
                f"{name!r} cannot be a model's name: use up to 128 letters, digits and . _ / -, "
                f"beginning with a letter or digit{remedy}"
            )
    if base in deltas:
        raise ConfigError(
            f"{base!r} names both the base and a delta: rename the delta, or the base "
            "with --served-model-name"
        )
    check_unique(deltas)
