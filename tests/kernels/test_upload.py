"""A delta that comes back from host memory: copied layer by layer while its request is computed.

Without a GPU: an arena in host memory, and events that are as late as they can be.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaserve.artifact.reader import Delta
from deltaserve.compress.export import export
from deltaserve.compress.plan import make_plan
from deltaserve.compress.run import compress
from deltaserve.engine import core, transfer
from deltaserve.engine.arena import Arena
from deltaserve.engine.operands import Operands
from deltaserve.kernels.attention import dispatch as attention_dispatch
from deltaserve.kernels.attention import launch
from deltaserve.kernels.delta_matmul import dispatch
from tests.engine_helpers import greedy, make_engine, reference, run
from tests.families import FAMILIES, make_base, make_fine_tune

ARENA_BYTES = 1 << 20


class Late:
    """The values are only copied when somebody waits for them."""

    def __init__(self, copies: list[tuple[torch.Tensor, torch.Tensor]], waited: list[int]) -> None:
        self.copies = copies
        self.waited = waited
        self.there = False

    def query(self) -> bool:
        return self.there

    def wait(self) -> None:
        if not self.there:
            self.waited.append(len(self.copies))
            for target, tensor in self.copies:
                target.copy_(tensor)
            self.there = True


class SlowTransfer(transfer.Transfer):
    """As to another device. waited: how much each wait was for, in their order."""

    waited: list[int]

    def __init__(self, device: str, arena: Arena | None = None) -> None:
        super().__init__(device, arena)
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._late = False

    @contextmanager
    def stream(self, *, wait: bool = True) -> Iterator[None]:
        self._late = not wait
        yield
        self._late = False

    def settle(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self._late:
            return super().settle(tensor)
        assert self.arena is not None
        target = self.arena.empty_like(tensor)
        target.view(torch.uint8).fill_(0x55)
        self._copies.append((target, tensor))
        return target

    def arrival(self) -> Late:
        copies, self._copies = self._copies, []
        return Late(copies, SlowTransfer.waited)


@pytest.fixture
def engine_with_arena(monkeypatch: pytest.MonkeyPatch) -> Arena:
    monkeypatch.setattr(dispatch, "has_kernels", lambda name, base: True)
    monkeypatch.setattr(attention_dispatch, "pick", lambda *_: launch)
    monkeypatch.setattr("deltaserve.engine.operands.Transfer", SlowTransfer)
    arena = Arena(ARENA_BYTES, "cpu")
    monkeypatch.setattr(core, "reserve", lambda *_: arena)
    monkeypatch.setattr(SlowTransfer, "waited", [], raising=False)
    monkeypatch.setitem(FAMILIES["llama-tied"][1], "num_hidden_layers", 1)
    return arena


def test_it_serves_while_it_arrives(
    tmp_path: Path, engine_with_arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied embedding, biases, norms, shared projections; two fine-tunes and room for one."""
    arena = engine_with_arena
    base = make_base("llama-tied", tmp_path / "base")
    deltas = {}
    for i, name in enumerate(("one", "two")):
        tune = make_fine_tune(base, tmp_path / f"{name}.full", seed=i)
        params: Any = {"bits": 2, "group_size": 32}
        plan = make_plan(params=params, vocabulary_codec="int", vocabulary_params=params)
        compress(base, tune, tmp_path / f"{name}.delta", plan)
        export(base, tmp_path / f"{name}.delta", tmp_path / name)
        deltas[name] = tmp_path / f"{name}.delta"
    whole = make_engine(base, deltas, merge_memory_bytes=0)
    room = max(v.needs.device_bytes for v in whole.residency.catalogue.versions())
    for version in list(whole.residency.catalogue.versions()):
        whole.residency.device.leave(version)
    whole.close()
    assert arena.num_free == ARENA_BYTES, "extents were lost"

    engine = make_engine(
        base, deltas, merge_memory_bytes=0, delta_memory_bytes=int(1.3 * room), max_num_seqs=2
    )
    residency = engine.residency
    limits = residency.device.limits
    monkeypatch.setattr(residency.device, "limits", _impatient(limits))
    versions = {v.name: v for v in residency.catalogue.versions()}
    read = []
    monkeypatch.setattr(residency.source, "read", lambda v: read.append(v.name) or _read(v))
    for round_, name in enumerate(("one", "two", "one", "two")):
        SlowTransfer.waited.clear()
        prompt = [5 + round_, 6, 7]
        tokens = run(engine, [greedy("a", name, prompt, 2)]).tokens["a"]
        assert tokens == reference(tmp_path / name, prompt, 2)[0]
        _settle(engine)
        assert isinstance(versions[name].image, Operands)
        if round_ < 2:
            assert not SlowTransfer.waited
    assert read == ["two"], "the host's copy was not used"
    assert len(SlowTransfer.waited) > 6, "it was not copied layer by layer"
    assert sum(v.attached for v in versions.values()) == 1
    held = sum(v.operands.num_bytes for v in versions.values() if v.operands is not None)
    assert 0 <= ARENA_BYTES - arena.num_free - held < 256 * len(SlowTransfer.waited) * 3
    engine.close()


def _impatient(limits: Any) -> Any:
    return replace(limits, min_residency_s=0.0)


def _read(version: Any) -> Any:
    return Delta.read(version.path)


def _settle(engine: core.Engine) -> None:
    """Let the copies to the host end."""
    while not engine.residency.idle:
        engine.step()
