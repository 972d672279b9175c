"""What all delta-aware layers share: the step, and operands that are still on their way."""

from __future__ import annotations

from torch import nn

from deltaserve.engine.routing import StepContext
from deltaserve.engine.transfer import Arrival


class DeltaLayer(nn.Module):
    """A delta may serve before all of it is on the device: the forward of each layer waits for
    that layer's own operands, on the device, while those of later layers are being copied."""

    def __init__(self, step: StepContext) -> None:
        super().__init__()
        self.step = step
        self._arriving: dict[int, Arrival] = {}

    def expect(self, slot: int, parameter: str, arrival: Arrival | None) -> None:
        """What is attached next arrives then; None: it is there."""
        if arrival is None:
            return
        if self.reads_at_attach(parameter):
            arrival.wait()
        else:
            self._arriving[slot] = arrival
            self.step.arriving[slot] = arrival  # of the layers, the last one to come

    def reads_at_attach(self, parameter: str) -> bool:
        """Whether ``attach`` computes with the values."""
        return False

    def await_operands(self) -> None:
        """Let this step wait for what it needs here. Costs nothing once all is there."""
        routing = self.step.routing
        if not self._arriving or routing.captured:  # of what arrives, no captured step has rows
            return
        for slot, arrival in list(self._arriving.items()):
            if arrival.query():
                del self._arriving[slot]
            elif routing.has_any({slot}):
                arrival.wait()

    def forget_arrival(self, slot: int) -> None:
        self._arriving.pop(slot, None)
        self.step.arriving.pop(slot, None)
