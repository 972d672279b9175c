"""What the KV cache and the deltas get of a device's memory, and how long a sequence then fits."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltaserve.config import EngineConfig
from deltaserve.engine.families import context_limit
from deltaserve.engine.limits import Limits
from deltaserve.engine.model import KVCache, head_dim, num_kv_heads
from deltaserve.errors import ConfigError

logger = logging.getLogger(__name__)

# Of the memory that is free once the base is loaded. On a CPU the rest belongs to others.
CPU_SHARE = 0.25
# Deltas get what those of the configuration need, but of what KV and deltas share not less and
# not more than this.
DELTA_SHARES = (0.25, 0.5)
# What libraries and fragments take beside what can be counted.
GPU_RESERVE = 1 << 29


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """num_blocks: of the KV cache. max_model_len: longest sequence, in tokens."""

    num_blocks: int
    max_model_len: int
    limits: Limits


def plan_memory(
    config: EngineConfig,
    model_config: Any,
    dtype: torch.dtype,
    device: str,
    delta_sizes: Iterable[int] = (),
) -> MemoryPlan:
    """Divide what is free now, the base being loaded. delta_sizes: bytes of each known delta.

    Raises ConfigError with the numbers where what was asked for does not fit.
    """
    free = free_memory(device)
    budget = free
    if device == "cuda":
        total = int(torch.cuda.mem_get_info()[1])
        unused = int(total * (1 - config.gpu_memory_utilization))
        budget = max(0, free - unused - GPU_RESERVE - step_bytes(config, model_config, dtype))
    sizes = list(delta_sizes)
    block_bytes = config.block_size * KVCache.bytes_per_token(model_config, dtype)
    wanted_len = _wanted_len(config, model_config)
    useful = config.max_num_seqs * -(-wanted_len // config.block_size) * block_bytes
    kv, deltas = divide(config, budget, useful, sum(sizes), device)
    _require_room(kv, deltas, budget, free)
    num_blocks = min(kv, useful) // block_bytes
    length = _fitting_len(config, wanted_len, num_blocks, block_bytes, kv)
    # Merged weights round differently, and when they come depends on what others ask; and with a
    # quantised base they would be the whole of it again.
    packed = config.deterministic or config.quantization != "none"
    chosen = 0 if device == "cuda" else int(free * CPU_SHARE)
    merge = 0 if packed else _given(config.merge_memory_bytes, chosen)
    host = int(free_memory("cpu") * CPU_SHARE / (1 if device == "cuda" else 2))
    limits = Limits(
        deltas,
        _given(config.host_memory_bytes, host),
        merge,
        merge_at_start=config.merge_memory_bytes is not None,
    )
    _tell(num_blocks, block_bytes, config.block_size, free, limits, sizes)
    return MemoryPlan(num_blocks, length, limits)


def step_bytes(config: EngineConfig, model_config: Any, dtype: torch.dtype) -> int:
    """What the largest step takes beside weights and cache: the activations of one layer, one
    dequantised projection, and the logits with what sampling makes of them."""
    hidden, inner = model_config.hidden_size, model_config.intermediate_size
    heads = model_config.num_attention_heads + 2 * num_kv_heads(model_config)
    per_token = 6 * hidden + 3 * heads * head_dim(model_config) + 3 * inner
    tokens = config.max_num_batched_tokens * per_token * dtype.itemsize
    dense = 2 * hidden * inner * dtype.itemsize
    logits = config.max_num_seqs * model_config.vocab_size * (dtype.itemsize + 4 * 4)
    return int(tokens + dense + logits)


def divide(
    config: EngineConfig, budget: int, useful: int, known_deltas: int, device: str
) -> tuple[int, int]:
    """(bytes of the KV cache, bytes of deltas): as given, else chosen. budget: for both; useful:
    the most that the KV cache can use; known_deltas: all that are configured."""
    kv, deltas = config.kv_cache_memory_bytes, config.delta_memory_bytes
    if device != "cuda":
        chosen = int(budget * CPU_SHARE)
        return _given(kv, chosen), _given(deltas, chosen)
    if deltas is None:
        least, most = (int(budget * share) for share in DELTA_SHARES)
        left = max(0, budget - kv) if kv is not None else None
        deltas = min(max(known_deltas, least), most) if left is None else left
        if kv is None:  # what the KV cache could not use anyway
            deltas = max(deltas, budget - useful)
    return _given(kv, max(0, budget - deltas)), deltas


def _require_room(kv: int, deltas: int, budget: int, free: int) -> None:
    if kv + deltas > budget:
        raise ConfigError(
            f"the KV cache ({kv} bytes) and the deltas ({deltas} bytes) do not fit together: of "
            f"{free} bytes that are free beside the base, {budget} may be used; lower "
            "kv_cache_memory_bytes or delta_memory_bytes"
        )


def _wanted_len(config: EngineConfig, model_config: Any) -> int:
    """The length that was asked for, or the model's own."""
    limit = context_limit(model_config)
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(
            f"max_model_len {config.max_model_len} exceeds the {limit} tokens that the base "
            "can serve (its context, or its original one where its rotary scaling is dynamic)"
        )
    if config.max_model_len is None and limit < model_config.max_position_embeddings:
        logger.warning(
            "context limited to the original %d of %d tokens: beyond it the rotary scaling "
            "depends on what shares the batch",
            limit,
            model_config.max_position_embeddings,
        )
    return config.max_model_len or limit


def _fitting_len(
    config: EngineConfig, wanted_len: int, num_blocks: int, block_bytes: int, budget: int
) -> int:
    """A length that was asked for and does not fit is refused; the model's own is reduced."""
    capacity = num_blocks * config.block_size
    if capacity >= wanted_len:
        return wanted_len
    if config.max_model_len is not None or capacity == 0:
        raise ConfigError(
            f"the KV cache has {budget} bytes, enough for {capacity} tokens, but one "
            f"sequence of {wanted_len} tokens must fit: raise kv_cache_memory_bytes to "
            f"{-(-wanted_len // config.block_size) * block_bytes} or lower max_model_len"
        )
    logger.warning(
        "longest sequence reduced from %d to %d tokens, which is what the KV cache holds "
        "(kv_cache_memory_bytes)",
        wanted_len,
        capacity,
    )
    return capacity


def _tell(
    num_blocks: int,
    block_bytes: int,
    block_size: int,
    free: int,
    limits: Limits,
    sizes: list[int],
) -> None:
    """What was chosen, and what one side costs the other."""
    logger.info(
        "memory: %d bytes free beside the base; KV cache %d bytes (%d tokens), deltas %d bytes "
        "on the device, %d in host memory, %d merged",
        free,
        num_blocks * block_bytes,
        num_blocks * block_size,
        limits.device_bytes,
        limits.host_bytes,
        limits.merge_bytes,
    )
    if sizes:
        largest = max(sizes)
        logger.info(
            "memory: the largest of %d deltas takes %d bytes, as much as %d tokens of KV cache; "
            "%d of that size fit at once (delta_memory_bytes, kv_cache_memory_bytes)",
            len(sizes),
            largest,
            math.ceil(largest / block_bytes) * block_size,
            limits.device_bytes // max(1, largest),
        )


def out_of_memory(error: Exception) -> bool:
    """Whether a step failed for lack of memory, on whatever device."""
    # The CPU's allocator raises a plain RuntimeError.
    cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)


def relieve(device: str) -> None:
    """Give back what is cached, so that the next step finds it."""
    if device == "cuda":
        torch.cuda.empty_cache()


def _given(value: int | None, chosen: int) -> int:
    return chosen if value is None else value


def free_memory(device: str) -> int:
    """Bytes free on the device."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    # What the kernel could give, not what lies idle: the page cache holds the model's files.
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("cannot tell how much memory is free: set kv_cache_memory_bytes")
