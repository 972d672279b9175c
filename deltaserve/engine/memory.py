"""How much the KV cache gets, and how long a sequence it can then hold."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from deltaserve.config import EngineConfig
from deltaserve.engine.families import context_limit
from deltaserve.engine.limits import Limits
from deltaserve.engine.model import KVCache
from deltaserve.errors import ConfigError

logger = logging.getLogger(__name__)

# Of the memory that is free once the base is loaded. On a CPU the rest belongs to others.
CPU_SHARE = 0.25
GPU_SHARE = 0.8


def plan_kv(
    config: EngineConfig, model_config: Any, dtype: torch.dtype, device: str
) -> tuple[int, int]:
    """(number of KV blocks, longest sequence).

    The cache is given at most what ``max_num_seqs`` sequences of full length can use. A
    length that was asked for and does not fit is refused; the model's own is reduced.
    Raises ConfigError with the numbers.
    """
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
    wanted_len = config.max_model_len or limit
    block_bytes = config.block_size * KVCache.bytes_per_token(model_config, dtype)
    budget = config.kv_cache_memory_bytes or int(free_memory(device) * _share(device))
    useful = config.max_num_seqs * -(-wanted_len // config.block_size)
    num_blocks = min(budget // block_bytes, useful)
    capacity = num_blocks * config.block_size
    if capacity < wanted_len:
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
    return num_blocks, min(wanted_len, capacity)


def plan_deltas(config: EngineConfig, device: str, free_before: int) -> Limits:
    """Memory for deltas: on the device, in host memory beside it, and merged.

    free_before: what was free on a CPU before the KV cache took its share, which it takes
    little by little. On a GPU the KV cache is there already, and half of the rest is taken.
    """
    cuda = device == "cuda"
    free = int(free_memory(device) * 2 * CPU_SHARE) if cuda else int(free_before * CPU_SHARE)
    host = int(free_memory("cpu") * CPU_SHARE / (1 if cuda else 2))
    merge = 0 if cuda else int(free_before * CPU_SHARE)
    # Merged weights round differently, and when they come depends on what others ask.
    merge = 0 if config.deterministic else _given(config.merge_memory_bytes, merge)
    limits = Limits(
        _given(config.delta_memory_bytes, free),
        _given(config.host_memory_bytes, host),
        merge,
        merge_at_start=config.merge_memory_bytes is not None,
    )
    logger.info(
        "memory for deltas: %d bytes on the device, %d in host memory, %d merged",
        limits.device_bytes,
        limits.host_bytes,
        limits.merge_bytes,
    )
    return limits


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


def _share(device: str) -> float:
    return GPU_SHARE if device == "cuda" else CPU_SHARE
