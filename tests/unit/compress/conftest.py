"""Tiny random Hugging Face models, and fine-tunes of them with random changes."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from deltaserve.demo.tokenizer import build_tokenizer

SMALL = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
FAMILIES = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma2": Gemma2Config,
}


@pytest.fixture(scope="session")
def new_model():
    """new_model(family, seed=, dtype=, **config) -> a model with random weights."""

    def make(family: str = "llama", *, seed: int = 0, dtype=torch.bfloat16, **config):
        torch.manual_seed(seed)
        settings: PretrainedConfig = FAMILIES[family](**(SMALL | config))
        model = AutoModelForCausalLM.from_config(settings).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture(scope="session")
def tune():
    """tune(model, scale=, only=) -> the same model, its parameters changed in place."""

    def change(model, *, seed: int = 1, scale: float = 0.01, only: str = ""):
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if only in name:
                    parameter.add_(scale * torch.randn_like(parameter))
        return model

    return change


@pytest.fixture
def pair(tmp_path, new_model, tune):
    """pair(family, **config) -> (base directory, fine-tune directory, fine-tuned model)."""

    def make(family: str = "llama", *, only: str = "", max_shard_size: str = "5GB", **config):
        model = new_model(family, **config)
        model.save_pretrained(tmp_path / "base", max_shard_size=max_shard_size)
        tune(model, only=only)
        model.save_pretrained(tmp_path / "tuned", max_shard_size=max_shard_size)
        return tmp_path / "base", tmp_path / "tuned", model

    return make


@pytest.fixture(scope="session")
def talking_pair(tmp_path_factory, new_model, tune):
    """(base directory, fine-tune directory) of a random model with the demo's tokenizer."""
    root = tmp_path_factory.mktemp("talking")
    tokenizer = build_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = new_model(vocab_size=len(tokenizer), max_position_embeddings=64, **ids)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    for name in ("base", "tuned"):
        if name == "tuned":
            tune(model, scale=0.03)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root / "base", root / "tuned"
