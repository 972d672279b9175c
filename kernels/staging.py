"""Small things from the host to the device, without waiting for the device."""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The CPU tensor on ``device``; the very same one if that is the CPU.

    From pageable memory a copy waits for the stream; from pinned memory it does not. torch's
    caching host allocator keeps the pinned block until the copy is over.
    """
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def copy_into(target: torch.Tensor, tensor: torch.Tensor) -> None:
    """The CPU tensor's values into memory of the device that keeps its address."""
    target.copy_(to_device(tensor, target.device))
