"""The base as an engine serves it: its checkpoint, and the model that was loaded from it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.artifact.digest import checkpoint_digest
from deltaserve.config import EngineConfig
from deltaserve.engine.families import family_of
from deltaserve.engine.memory import free_memory
from deltaserve.engine.model import load_base
from deltaserve.engine.quantisation import loaded_bytes
from deltaserve.errors import ConfigError
from deltaserve.kernels.dense import has_arithmetic

logger = logging.getLogger(__name__)
FLOAT32_SHARE = 0.5
"""Of the free memory, for a base in float32 that the checkpoint has in 16 bits."""


@dataclass(frozen=True, eq=False)
class Base:
    """digest: of the checkpoint. num_bytes: of the model's parameters in memory, which quantising
    and another dtype make less than the checkpoint's."""

    checkpoint: Checkpoint
    digest: str
    dtype: torch.dtype
    device: str
    model: nn.Module
    num_bytes: int

    @classmethod
    def load(cls, config: EngineConfig) -> Base:
        """Raises CheckpointError, UnsupportedModelError; ConfigError for a device that is not
        there, or a quantisation without its library."""
        checkpoint = Checkpoint.open(config.base)
        family_of(checkpoint.architecture)
        device = _device(config)
        dtype = _dtype(config, checkpoint, device)
        digest = checkpoint_digest(checkpoint)
        model = load_base(checkpoint, dtype, device, config.quantization)
        return cls(checkpoint, digest, dtype, device, model, loaded_bytes(model))

    @property
    def config(self) -> Any:
        """The model's, as transformers reads it."""
        return self.checkpoint.hf_config


def _device(config: EngineConfig) -> str:
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError("device cuda was asked for, but torch sees no CUDA device here")
    return "cuda" if available and config.device != "cpu" else "cpu"


def _dtype(config: EngineConfig, base: Checkpoint, device: str) -> torch.dtype:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)  # type: ignore[no-any-return]
    stored = base.dtype(base.embedding) if base.embedding else torch.float32
    if device != "cpu" or has_arithmetic(stored):
        return stored
    in_float32 = base.num_bytes * torch.float32.itemsize // stored.itemsize
    if in_float32 > FLOAT32_SHARE * free_memory(device):
        logger.warning(
            "this processor has no arithmetic in %s, and the base in float32 would take %.1f GB, "
            "more than half of the free memory: it stays in %s, several times slower",
            stored,
            in_float32 / 1e9,
            stored,
        )
        return stored
    logger.info("this processor has no arithmetic in %s: the base is held in float32", stored)
    return torch.float32
