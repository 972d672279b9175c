"""The base: an unmodified Hugging Face model whose layers and attention are made delta-aware."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.utils import logging

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.config import Quantization
from deltaserve.engine.embedding_layer import DeltaEmbedding
from deltaserve.engine.families import family_of
from deltaserve.engine.layers import DeltaHead, DeltaLinear
from deltaserve.engine.norm_layer import DeltaNorm
from deltaserve.engine.projections import DeltaModule, ProjectionPart, Wrapper, part_of, share
from deltaserve.engine.quantisation import quantise
from deltaserve.engine.routing import StepContext
from deltaserve.errors import CheckpointError
from deltaserve.kernels.attention import PagedBatch, paged_attention, write_kv

ATTENTION = "deltaserve_paged"
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Projections that read the same input, in every family that has them apart."""


class KVCache:
    """Keys and values of all layers; token slots are block * block_size + offset."""

    def __init__(self, config: Any, num_slots: int, dtype: torch.dtype, device: str) -> None:
        shape = (config.num_hidden_layers, num_slots, num_kv_heads(config), head_dim(config))
        # Zeros, not empty: masked positions have weight 0, and 0 * NaN would still be NaN.
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    @staticmethod
    def bytes_per_token(config: Any, dtype: torch.dtype) -> int:
        per_layer = 2 * num_kv_heads(config) * head_dim(config) * dtype.itemsize
        return int(config.num_hidden_layers * per_layer)


def num_kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def head_dim(config: Any) -> int:
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def load_base(
    checkpoint: Checkpoint, dtype: torch.dtype, device: str, quantization: Quantization = "none"
) -> nn.Module:
    """The checkpoint as a Hugging Face model in eval mode with our attention plugged in.

    Raises UnsupportedModelError for other architectures, CheckpointError if it cannot load,
    ConfigError if it cannot be quantised.
    """
    family_of(checkpoint.architecture)
    logging.disable_progress_bar()  # a bar on stderr would stand before an error's one line
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.path} cannot be loaded: {error}") from error
    if quantization != "none":
        quantise(model, quantization, dtype, device)
    return plug_in(model, device)


def plug_in(model: Any, device: str) -> nn.Module:
    """The model on the device in eval mode, with attention over our cache."""
    AttentionInterface.register(ATTENTION, _attention)
    model.set_attn_implementation(ATTENTION)
    ready: nn.Module = model.to(device).eval()
    return ready


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    kv: KVCache,
    batch: PagedBatch,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls instead of its own attention; q, k, v are [1, heads, T, D].

    ``kv`` and ``batch`` are passed through the model's forward as extra arguments.
    """
    layer: int = module.layer_idx  # type: ignore[assignment]
    k_cache, v_cache = kv.k[layer], kv.v[layer]
    write_kv(
        k_cache, v_cache, key[0].transpose(0, 1), value[0].transpose(0, 1), batch.slot_mapping_T
    )
    out_THD = paged_attention(
        query[0].transpose(0, 1),
        k_cache,
        v_cache,
        batch,
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return out_THD[None], None


def make_delta_aware(model: nn.Module, architecture: str, step: StepContext) -> dict[str, Wrapper]:
    """Wrap embeddings, projections, norms and head in place -> wrapper by module path."""
    family = family_of(architecture)
    found = list(model.named_modules())
    wrapped: dict[str, Wrapper] = {}
    for path, module in found:
        wrapper = _wrap(path, module, step, family.head_norm_token_dim)
        if wrapper is not None:
            wrapped[path] = wrapper
    wrapped |= _share_inputs(wrapped, step)
    for path, stand_in in wrapped.items():
        model.set_submodule(path, stand_in)
    _pack(wrapped)
    return wrapped


def _pack(wrapped: dict[str, Wrapper]) -> None:
    """Weights as this processor multiplies by them, but those that are looked up by the row too:
    a tied head would be in memory twice."""
    layers = {part_of(module)[0] for module in wrapped.values()}
    looked_up = [x.inner.weight for x in layers if isinstance(x, DeltaEmbedding)]
    for layer in layers:
        if isinstance(layer, DeltaLinear) and not any(layer.inner.weight is w for w in looked_up):
            layer.pack()


def widest_projection(modules: dict[str, Wrapper]) -> torch.Tensor:
    """[N, K] of the layer with most weights, the head apart."""
    layers = {part_of(module)[0] for module in modules.values()}
    weights = [x.grouped.base_NK for x in layers if type(x) is DeltaLinear]
    return max(weights, key=torch.Tensor.numel)


def _wrap(
    path: str, module: nn.Module, step: StepContext, head_norm_token_dim: int
) -> DeltaModule | None:
    if isinstance(module, nn.Embedding):
        return DeltaEmbedding(module, step)
    if isinstance(module, nn.Linear):
        return (DeltaHead if path == "lm_head" else DeltaLinear)(module, step, path)
    if type(module).__name__.endswith("RMSNorm"):
        per_head = path.endswith(("q_norm", "k_norm"))
        return DeltaNorm(module, step, head_norm_token_dim if per_head else 1)
    return None


def _share_inputs(wrapped: dict[str, Wrapper], step: StepContext) -> dict[str, ProjectionPart]:
    """Parts in place of the projections that read the same input.

    On a CPU a call costs about as much as a few rows of it; on a GPU one launch fills it better
    than three. Quantised weights stay apart: their packed forms cannot be joined.
    """
    parts: dict[str, ProjectionPart] = {}
    for path in wrapped:
        parent, _, name = path.rpartition(".")
        for names in SHARED_INPUTS:
            if name == names[0]:
                paths = [f"{parent}.{other}" for other in names]
                found = [wrapped.get(other) for other in paths]
                layers = [layer for layer in found if isinstance(layer, DeltaLinear)]
                biased = {layer.inner.bias is not None for layer in layers}
                quantised = any(layer.quantised for layer in layers)
                if len(layers) == len(paths) and len(biased) == 1 and not quantised:
                    shared = share([layer.inner for layer in layers], step, path)
                    parts |= zip(paths, shared, strict=True)
    return parts
