"""Tiny random models of every served family, and fine-tunes of them. No training, real files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 96
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": 12, "head_dim": 16}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16, "num_attention_heads": 2}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": 10,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "layer_types": LAYER_TYPES,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": 10,
            "query_pre_attn_scalar": 16,
            "layer_types": LAYER_TYPES,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": ("phi3", {"sliding_window": 14}),
}


def make_base(family: str, path: Path, *, seed: int = 0) -> Path:
    """A random float32 checkpoint whose greedy continuations vary (large weights)."""
    kind, extra = FAMILIES[family]
    config = AutoConfig.for_model(kind, **{**COMMON, **extra})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomise(model, seed, scale=0.12)
    model.save_pretrained(path)
    return path


def make_fine_tune(base: Path, path: Path, *, seed: int, added_tokens: int = 0) -> Path:
    """A full fine-tune: every parameter moves, norms and biases too; the vocabulary may grow."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if added_tokens:
        model.resize_token_embeddings(VOCAB + added_tokens, mean_resizing=False)
    _randomise(model, seed, scale=0.05)
    model.save_pretrained(path)
    return path


def make_lora(base: Path, adapter: Path, merged: Path) -> tuple[Path, Path]:
    """A PEFT adapter with trained-looking factors, and the checkpoint that PEFT merges it to."""
    from peft import LoraConfig, get_peft_model  # slow to import, and not where a GPU is tried

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "o_proj", "down_proj"], use_rslora=True
    )
    tuned = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    tuned.save_pretrained(adapter)
    tuned.merge_and_unload().save_pretrained(merged)
    return adapter, merged


def _randomise(model: PreTrainedModel, seed: int, *, scale: float) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
