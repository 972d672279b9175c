"""The base as an engine serves it: its checkpoint, and the model that was loaded from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.artifact.digest import checkpoint_digest
from deltaserve.config import EngineConfig
from deltaserve.engine.families import family_of
from deltaserve.engine.model import load_base
from deltaserve.engine.quantisation import loaded_bytes
from deltaserve.errors import ConfigError


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
        device, dtype = _device(config), _dtype(config, checkpoint)
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


def _dtype(config: EngineConfig, base: Checkpoint) -> torch.dtype:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)  # type: ignore[no-any-return]
    return base.dtype(base.embedding) if base.embedding else torch.float32
