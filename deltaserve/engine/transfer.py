"""From host memory to the device, beside the computation.

On a CPU both are the same memory and nothing is copied. On CUDA the bytes go through pinned
buffers on a stream of their own. Only this file knows the difference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

from deltaserve.engine.arena import Arena
from deltaserve.kernels.staging import to_device


class Arrival(Protocol):
    """When something is on the device; a CUDA event is one."""

    def query(self) -> bool:
        """Whether it is there."""
        ...

    def wait(self) -> None:
        """Let what is computed from here on wait for it; the caller does not wait."""
        ...


class Transfer:
    """Thread-safe: each thread that transfers gets a stream of its own from torch's pool.

    arena: where operands end up; none on a CPU, where they stay where they are.
    """

    def __init__(self, device: str, arena: Arena | None = None) -> None:
        self._device = torch.device(device)
        self._cuda = self._device.type == "cuda"
        self.arena = arena

    @contextlib.contextmanager
    def stream(self, *, wait: bool = True) -> Iterator[None]:
        """Copies and computations inside run beside the engine's, after what it has begun.

        wait: they are complete when the block is left; otherwise ``arrival`` tells.
        """
        if not self._cuda:
            yield
            return
        stream = torch.cuda.Stream(self._device)
        # Memory of an evicted delta may still be read by the last step.
        stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(stream):
            yield
            done = stream.record_event()
        if wait:
            done.synchronize()

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device; on a CPU the very same one."""
        return to_device(tensor, self._device)

    def settle(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, which is pinned or on the device, where it stays; without an arena there."""
        if self.arena is None:
            return tensor
        target = self.arena.empty_like(tensor)
        target.copy_(tensor, non_blocking=True)
        return target

    def arrival(self) -> Arrival | None:
        """Of all that the current ``stream`` block has put so far."""
        if not self._cuda:
            return None
        arrival: Arrival = torch.cuda.current_stream(self._device).record_event()
        return arrival

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """A pinned copy in host memory, complete when the ``stream`` block is left."""
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._cuda)
        return pinned.copy_(tensor, non_blocking=True)

    def hand_over(self, tensors: Iterable[torch.Tensor]) -> None:
        """Say that the engine's stream will read them, so that their memory is not given to the
        next transfer while a step still uses it."""
        if self._cuda:
            engine = torch.cuda.default_stream(self._device)
            for tensor in tensors:
                tensor.record_stream(engine)
