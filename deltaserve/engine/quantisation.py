"""A base whose projections are held at 4 or 8 bits, by bitsandbytes.

Every step reads the base once, so a base of fewer bits is read sooner and leaves room for the KV
cache and deltas. Embeddings, norms and head stay as they are, and what deltas add is computed as
ever: a delta is the difference to the base as it was published, so the base's error stays.
"""

from __future__ import annotations

import importlib
import logging
from types import ModuleType
from typing import Any

import torch
from torch import nn

from deltaserve.config import Quantization
from deltaserve.errors import ConfigError

logger = logging.getLogger(__name__)

# What NF4 kernels read at once. Models of use have such shapes.
NF4_OUTPUTS, NF4_INPUTS = 32, 64


def quantise(model: Any, quantization: Quantization, dtype: torch.dtype, device: str) -> None:
    """Put quantised projections on the device in place of the model's own, one after the other.

    dtype: of what goes in and comes out. Raises ConfigError without bitsandbytes.
    """
    library = _library(quantization)
    head, left = model.get_output_embeddings(), []
    for path, module in list(model.named_modules()):
        if type(module) is not nn.Linear or module is head:
            continue
        if quantization == "bitsandbytes" and not _fits_nf4(module):
            left.append(path)
            continue
        make = _nf4 if quantization == "bitsandbytes" else _int8
        model.set_submodule(path, _settled(make(library, module, dtype), dtype, device))
    if left:
        logger.warning(
            "%s and %d others stay unquantised: NF4 takes outputs in %ds and inputs in %ds",
            left[0],
            len(left) - 1,
            NF4_OUTPUTS,
            NF4_INPUTS,
        )


def loaded_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters as they lie in memory; what is tied counts once."""
    tensors = [t for m in model.modules() for t in (*m.parameters(False), *_statistics(m))]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def _library(quantization: Quantization) -> ModuleType:
    # It warns of kernels from the network that are never asked for, and with each product of a
    # cast to float16 that is what int8 means here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ConfigError(
            f"quantization {quantization} needs the package bitsandbytes ({error}): install it "
            "with 'pip install bitsandbytes', or leave quantization out"
        ) from error


def _fits_nf4(layer: nn.Linear) -> bool:
    return layer.out_features % NF4_OUTPUTS == 0 and layer.in_features % NF4_INPUTS == 0


def _nf4(library: ModuleType, dense: nn.Linear, dtype: torch.dtype) -> Any:
    """4-bit NormalFloat in blocks of 64, whose scales are quantised too (QLoRA)."""
    layer = library.nn.Linear4bit(
        *(dense.in_features, dense.out_features, dense.bias is not None),
        compute_dtype=dtype,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = library.nn.Params4bit(
        dense.weight.data, requires_grad=False, quant_type="nf4", module=layer
    )
    layer.bias = dense.bias
    return layer


def _int8(library: ModuleType, dense: nn.Linear, dtype: torch.dtype) -> Any:
    """8 bits, a scale per output and per row of the input.

    Threshold 0: with one, which inputs are computed apart depends on all rows of the batch, so that
    one tenant's answer would depend on what another asks.
    """
    layer = library.nn.Linear8bitLt(
        *(dense.in_features, dense.out_features, dense.bias is not None),
        has_fp16_weights=False,
        threshold=0.0,
        device="meta",
    )
    layer.weight = library.nn.Int8Params(
        dense.weight.data, requires_grad=False, has_fp16_weights=False
    )
    layer.bias = dense.bias
    layer.compute_dtype = dtype  # as Linear4bit has it, for who asks what comes out
    return layer


def _settled(layer: Any, dtype: torch.dtype, device: str) -> nn.Module:
    """On the device and laid out as it computes there, which is otherwise done at first use."""
    ready: nn.Module = layer.to(device).eval()
    with torch.no_grad():
        ready(torch.zeros(1, layer.in_features, dtype=dtype, device=device))
    return ready


def _statistics(module: nn.Module) -> list[torch.Tensor]:
    """A quantised layer's scales, which are no parameters of it."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if state is not None:
        return [state.absmax, *([state.state2.absmax] if state.nested else [])]
    scales = getattr(getattr(module, "state", None), "SCB", None)
    return [] if scales is None else [scales]
