"""What dtype ``auto`` is: the checkpoint's, or float32 where the processor cannot compute in it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deltaserve.config import EngineConfig
from deltaserve.engine import base as module
from deltaserve.engine.base import Base


def load(folder: Path, stored: torch.dtype, **options: str) -> Base:
    shape = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(shape).to(stored).save_pretrained(folder)
    return Base.load(EngineConfig(base=str(folder), device="cpu", **options))


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that has float32 only."""
    monkeypatch.setattr(module, "has_arithmetic", lambda dtype: dtype == torch.float32)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_auto_is_float32_where_16_bits_are_emulated(tmp_path, emulated, stored) -> None:
    base = load(tmp_path, stored)
    assert base.dtype == torch.float32
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}


def test_auto_is_the_checkpoints_where_the_processor_has_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "has_arithmetic", lambda _dtype: True)
    assert load(tmp_path, torch.bfloat16).dtype == torch.bfloat16


def test_what_is_asked_for_is_taken(tmp_path, emulated) -> None:
    assert load(tmp_path, torch.bfloat16, dtype="bfloat16").dtype == torch.bfloat16


def test_a_base_too_large_for_float32_stays_and_says_so(
    tmp_path, emulated, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(module, "free_memory", lambda _device: 4096)
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path, torch.bfloat16).dtype == torch.bfloat16
    assert "more than half of the free memory" in caplog.text
