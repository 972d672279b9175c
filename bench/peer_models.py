"""The models of the comparison with other servers: one base and its fine-tunes.

Random weights: only time is measured. About 30 M parameters in bf16, and no end-of-sequence
token, so that every answer has the length that was asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deltaserve.compress.plan import make_plan
from deltaserve.compress.run import compress

VOCAB = 8192
LORA_RANK = 16
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@dataclass(frozen=True)
class PeerModels:
    """base and full checkpoints of the fine-tunes, and the same fine-tunes as deltas; wholes: as
    artifacts that hold every weight as it is. adapters: LoRA of the same base; loras: as deltas."""

    base: Path
    tunes: tuple[Path, ...]
    deltas: tuple[Path, ...]
    wholes: tuple[Path, ...]
    adapters: tuple[Path, ...]
    loras: tuple[Path, ...]


def build(root: Path, count: int, *, hidden: int = 512, layers: int = 8) -> PeerModels:
    """Make what is missing below ``root``. hidden, layers: of the model, see the module."""
    base = build_base(root / "base", hidden, layers)
    tunes = tuple(root / f"tune{i}" for i in range(count))
    deltas = tuple(root / f"tune{i}.delta" for i in range(count))
    wholes = tuple(root / f"tune{i}.whole" for i in range(count))
    for seed, (tune, delta, whole) in enumerate(zip(tunes, deltas, wholes, strict=True)):
        if not (tune / "tokenizer.json").is_file():
            _save_tune(base, tune, seed)
        if not delta.is_dir():
            compress(base, tune, delta)
        if not whole.is_dir():
            compress(base, tune, whole, make_plan("raw"))
    adapters = tuple(root / f"lora{i}" for i in range(count))
    loras = tuple(build_lora(base, adapter, seed) for seed, adapter in enumerate(adapters))
    return PeerModels(base, tunes, deltas, wholes, adapters, loras)


def build_base(
    path: Path, hidden: int, layers: int, tokenizer: PreTrainedTokenizerFast | None = None
) -> Path:
    """The base, made if it is missing."""
    if not (path / "tokenizer.json").is_file():
        _save_base(path, hidden, layers, tokenizer or _tokenizer())
    return path


def build_lora(base: Path, adapter: Path, seed: int, rank: int = LORA_RANK) -> Path:
    """An adapter, made if it is missing: returns it as a delta, which lies beside it."""
    lora = adapter.with_name(f"{adapter.name}.delta")
    if not (adapter / "adapter_config.json").is_file():
        _save_adapter(base, adapter, seed, rank)
    if not lora.is_dir():
        compress(base, adapter, lora)
    return lora


def prompt(index: int, num_words: int = 64) -> str:
    """A text of ``num_words`` tokens, different for each index."""
    return " ".join(f"w{(index * 997 + i * 31) % VOCAB}" for i in range(num_words))


def _save_base(path: Path, hidden: int, layers: int, tokenizer: PreTrainedTokenizerFast) -> None:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)


def _save_tune(base: Path, path: Path, seed: int) -> None:
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.002)
    model.save_pretrained(path)
    _tokenizer().save_pretrained(path)


def _save_adapter(base: Path, path: Path, seed: int, rank: int) -> None:
    """All projections; both factors random, so that each adapter says something else."""
    from peft import LoraConfig, get_peft_model  # slow to import

    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero when new
            torch.nn.init.normal_(parameter, std=0.01)
    adapted.save_pretrained(str(path))


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w0")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
