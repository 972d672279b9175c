"""Models of given shapes with random weights, and deltas for them: only time is measured."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.artifact.codecs.base import Encoded
from deltaserve.artifact.digest import checkpoint_digest
from deltaserve.artifact.manifest import BaseRef, ClassBytes, SourceRef
from deltaserve.artifact.writer import DeltaWriter
from deltaserve.bench.gpu.part import DEVICE
from deltaserve.compress.classify import classify
from deltaserve.kernels.delta_matmul.synthetic import random_operand

FORMAT: tuple[str, dict[str, Any]] = ("int", {"bits": 2, "group_size": 128})
DTYPE = torch.bfloat16


def llama(size: str) -> LlamaConfig:
    """Llama 3.1 8B; a model of its proportions with 1.1 B parameters; a tiny one."""
    hidden, inner, layers, heads, kv_heads, vocab = {
        "8b": (4096, 14336, 32, 32, 8, 128256),
        "1b": (2048, 8192, 16, 32, 8, 32000),
        "tiny": (64, 128, 1, 4, 2, 160),
    }[size]
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=None,  # every answer has the length that was asked for
        pad_token_id=0,
    )


def random_model(size: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """On the device from the start: a CPU would take minutes to draw the weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            model = LlamaForCausalLM(llama(size))
    finally:
        torch.set_default_dtype(before)
    return model.eval()


@dataclass(frozen=True)
class Models:
    """base: a checkpoint. deltas, wholes: fine-tunes of it as 2-bit deltas, and as artifacts that
    hold every weight. Names of fine-tunes go round these few: what matters is that each name has
    memory of its own."""

    base: Path
    deltas: tuple[Path, ...]
    wholes: tuple[Path, ...]


def build(root: Path, size: str, num_deltas: int, num_wholes: int) -> Models:
    """Make what is missing below ``root``. Raises OSError, before anything is written, if it would
    not fit there."""
    base = root / size
    if not (base / "config.json").is_file():
        model = random_model(size, DTYPE)
        _require_room(root, model, num_deltas, num_wholes)
        model.save_pretrained(base)
    deltas = tuple(root / f"{size}-{i}.delta" for i in range(num_deltas))
    wholes = tuple(root / f"{size}-{i}.whole" for i in range(num_wholes))
    missing = [path for path in (*deltas, *wholes) if not path.is_dir()]
    if missing:
        checkpoint = Checkpoint.open(base)
        digest = checkpoint_digest(checkpoint)
        for path in missing:
            entries = _packed(checkpoint) if path in deltas else _whole(checkpoint)
            _write(path, checkpoint, digest, entries)
    return Models(base, deltas, wholes)


def _require_room(root: Path, model: LlamaForCausalLM, num_deltas: int, num_wholes: int) -> None:
    """A 2-bit delta of these projections is at most a sixth of its model."""
    whole = sum(parameter.nbytes for parameter in model.parameters())
    needed = int(whole * (1 + num_wholes + num_deltas / 6))
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if needed > free:
        raise OSError(
            f"models of {needed} bytes do not fit into {root} ({free} are free): set TMPDIR"
        )


def _packed(base: Checkpoint) -> Iterator[tuple[str, Encoded]]:
    """Projections at 2 bits and norms; embeddings and head are the base's."""
    for name in base.names():
        shape = base.shape(name)
        kind = classify(name, shape)
        if kind == "linear":
            (codec, params), (outputs, inputs) = FORMAT, shape
            operand = random_operand(codec, params, outputs, inputs, DTYPE, DEVICE)
            yield name, _on_host(operand)
        elif kind == "norm":
            yield name, _raw(base.tensor(name))


def _whole(base: Checkpoint) -> Iterator[tuple[str, Encoded]]:
    for name in base.names():
        yield name, _raw(base.tensor(name))


def _raw(values: torch.Tensor) -> Encoded:
    return Encoded("raw", {}, tuple(values.shape), values.dtype, {"values": values})


def _on_host(enc: Encoded) -> Encoded:
    parts = {name: part.cpu() for name, part in enc.tensors.items()}
    return Encoded(enc.codec, enc.params, enc.shape, enc.dtype, parts)


def _write(
    path: Path, base: Checkpoint, digest: str, entries: Iterator[tuple[str, Encoded]]
) -> None:
    sizes = [(classify(n, base.shape(n)), base.tensor(n).nbytes) for n in base.names()]
    with DeltaWriter(path) as writer:
        for name, enc in entries:
            writer.add(name, enc, kind=classify(name, enc.shape), error=0.0)
        writer.finish(
            base=BaseRef(base.name, None, digest),
            source=SourceRef(path.name, digest, "full"),
            architecture=base.architecture,
            full=ClassBytes.of(sizes),
        )
        writer.commit()
