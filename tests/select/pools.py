"""Small pools and models for the tests of data selection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = ["the", "a", "red", "blue", "green", "fox", "dog", "cat", "runs", "sleeps", "jumps", "over"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def sentence(rng: np.random.Generator, low: int = 3, high: int = 12) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(low, high)))


def sentences(count: int, seed: int = 0, **lengths: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [sentence(rng, **lengths) for _ in range(count)]


def clustered(count: int, dims: int, centres: int, seed: int = 0) -> np.ndarray:
    """Unit vectors around random centres, float32 [count, dims]."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(centres, dims))
    x = means[rng.integers(0, centres, count)] + 0.5 * rng.normal(size=(count, dims))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def word_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    names = ["<pad>", "<unk>", "user", "assistant", *WORDS]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>"
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_causal(path: Path, seed: int = 0) -> Path:
    """A random causal model whose predictions are far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(word_tokenizer()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


def make_encoder(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(word_tokenizer()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(path)
    word_tokenizer(chat=False).save_pretrained(path)
    return path
