"""From host memory to the device, beside the computation.

On a CPU both are the same memory and nothing is copied. On CUDA the bytes go through pinned
buffers on a stream of their own; the loading thread waits for that stream, the engine never does.
Only this file knows the difference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch


class Transfer:
    """Thread-safe: each thread that transfers gets a stream of its own from torch's pool."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._cuda = self._device.type == "cuda"

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """What is put or computed inside is complete on the device when the block is left."""
        if not self._cuda:
            yield
            return
        stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(stream):
            yield
            done = stream.record_event()
        done.synchronize()

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device; on a CPU the very same one."""
        if not self._cuda:
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def hand_over(self, tensors: Iterable[torch.Tensor]) -> None:
        """Say that the engine's stream will read them, so that their memory is not given to the
        next transfer while a step still uses it."""
        if self._cuda:
            engine = torch.cuda.default_stream(self._device)
            for tensor in tensors:
                tensor.record_stream(engine)
