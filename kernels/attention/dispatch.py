"""Which implementation of attention serves a batch: the kernels on a GPU, else the reference."""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

import torch

from deltaserve.kernels.attention import reference, tiles
from deltaserve.kernels.attention.batch import PagedBatch
from deltaserve.kernels.attention.tiles import TokenTile

logger = logging.getLogger(__name__)

# Heads beyond this do not fit into shared memory beside their keys and values.
MAX_HEAD_DIM = 256


def write_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    slot_mapping_T: torch.Tensor,
) -> None:
    """Store the new tokens' keys and values. See ``reference``."""
    pick(k_cache.device.type, k_cache.dtype, k_cache.shape[-1]).write_kv(
        k_cache, v_cache, k_TGD, v_TGD, slot_mapping_T
    )


def paged_attention(
    q_THD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch | TokenTile,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention of every packed token over its own sequence -> [T, H, D].

    See ``reference``; of a ``TokenTile``, see ``tiles``.
    """
    if isinstance(batch, TokenTile):
        return tiles.paged_attention(
            q_THD, k_cache, v_cache, batch, scale=scale, window=window, softcap=softcap
        )
    implementation = pick(q_THD.device.type, q_THD.dtype, q_THD.shape[-1])
    out_THD: torch.Tensor = implementation.paged_attention(
        q_THD, k_cache, v_cache, batch, scale=scale, window=window, softcap=softcap
    )
    return out_THD


@cache
def pick(device: str, dtype: torch.dtype, head_dim: int) -> ModuleType:
    """The module that serves heads of this size on a device; says so once."""
    if device != "cuda":
        return reference
    if head_dim > MAX_HEAD_DIM or dtype not in (torch.bfloat16, torch.float16):
        logger.warning(
            "attention: no kernel for heads of %d in %s, only up to %d in bfloat16 or float16: "
            "computed by the slow reference",
            head_dim,
            dtype,
            MAX_HEAD_DIM,
        )
        return reference
    # Here, because machines without a GPU need no Triton.
    from deltaserve.kernels.attention import launch

    logger.info("attention with heads of %d: paged Triton kernel", head_dim)
    return launch
