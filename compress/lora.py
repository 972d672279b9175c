"""A PEFT LoRA adapter as the fine-tune: its factors are kept exactly, as ``lowrank``.

The product that PEFT adds to a weight is ``scaling * B @ A`` with scaling = alpha / r, or
alpha / sqrt(r) with rsLoRA (peft/tuners/lora/layer.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltaserve.artifact.checkpoint import HEAD, Checkpoint, read_json
from deltaserve.artifact.codecs.base import Encoded, dense_bytes, is_finite
from deltaserve.artifact.codecs.lowrank import LowRankCodec
from deltaserve.artifact.codecs.raw import RawCodec
from deltaserve.artifact.codecs.rows import RowsCodec
from deltaserve.artifact.shards import ShardSet
from deltaserve.errors import CheckpointError, CodecError, CompatibilityError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Suffix of a stored tensor -> its role for the parameter "<module>.weight".
ROLES = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
}
PAIRS = ({"a", "b"}, {"embedding_a", "embedding_b"})
# Initialisations that subtract from the base weights: the adapter fits a changed base.
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Settings that change the formula, with the value that leaves it alone.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}


@dataclass(frozen=True)
class Target:
    """What an adapter does to one parameter: tensors maps a role to the stored name.

    Roles: a, b (or embedding_a, embedding_b), or full for a replaced weight.
    """

    parameter: str
    tensors: dict[str, str]
    scale: float


class Adapter:
    """An adapter directory. ``names, tensor, num_bytes`` make it hashable like a checkpoint."""

    def __init__(self, path: Path, name: str, config: dict[str, Any], shards: ShardSet) -> None:
        self.path = path
        self.name = name
        self.config = config
        self._shards = shards

    @staticmethod
    def is_adapter(path: Path) -> bool:
        return (path / CONFIG).is_file() and not (path / "config.json").is_file()

    @classmethod
    def open(cls, path: Path, name: str) -> Adapter:
        """Raises CheckpointError for damaged files, CompatibilityError for what is not LoRA."""
        config = read_json(path / CONFIG, "it is not a PEFT adapter")
        _require_plain_lora(path, config)
        if not (path / WEIGHTS).is_file() and (path / "adapter_model.bin").is_file():
            raise CheckpointError(
                f"{path} holds only pickle weights, which can run code when loaded; convert it "
                "once with peft: model.save_pretrained(DIR, safe_serialization=True)"
            )
        return cls(path, name, config, ShardSet([path / WEIGHTS], CheckpointError))

    def names(self) -> Sequence[str]:
        return self._shards.names()

    def tensor(self, name: str) -> torch.Tensor:
        return self._shards.tensor(name)

    @property
    def num_bytes(self) -> int:
        return sum(self._shards.size(name) for name in self.names())

    def targets(self, base: Checkpoint) -> list[Target]:
        """All adapted parameters, sorted; raises CompatibilityError if the base lacks one."""
        grouped: dict[str, dict[str, str]] = {}
        for name in self.names():
            parameter, role = _role(name)
            grouped.setdefault(parameter, {})[role] = name
        targets = []
        for parameter, tensors in sorted(grouped.items()):
            if not base.has(parameter):
                raise CompatibilityError(
                    f"{self.name} adapts {parameter}, which {base.name} does not have; "
                    "use the base named in the adapter's adapter_config.json"
                )
            tensors = self._without_base_copy(parameter, tensors, base)
            if tensors:
                targets.append(Target(parameter, tensors, self._scale(parameter, tensors)))
        return targets

    def keeps_base_head(self, base: Checkpoint, targets: list[Target]) -> bool:
        """The adapter changes a tied embedding, but the head goes on with the base's.

        That is what PEFT computes unless ensure_weight_tying is set.
        """
        changed = {target.parameter for target in targets}
        tying = bool(self.config.get("ensure_weight_tying"))
        return base.tied and base.embedding in changed and HEAD not in changed and not tying

    def encode(self, target: Target, base: Checkpoint) -> Encoded:
        """The parameter's exact change: factors as they are, replaced weights raw or as rows."""
        for name in target.tensors.values():
            if not is_finite(self.tensor(name)):
                raise CheckpointError(f"{self.path}: {name} holds NaN or infinite values")
        try:
            if "full" in target.tensors:
                return _encode_full(
                    self.tensor(target.tensors["full"]), base.tensor(target.parameter)
                )
            return self._encode_factors(target, base)
        except CodecError as cause:
            raise CompatibilityError(
                f"{self.name}: {target.parameter} does not fit {base.name}: {cause}"
            ) from None

    def _encode_factors(self, target: Target, base: Checkpoint) -> Encoded:
        part = {role: self.tensor(name) for role, name in target.tensors.items()}
        if "b" in part:
            u, v = part["b"], part["a"]
        else:
            # Stored [r, V] and [D, r]; the weight is [V, D].
            u, v = part["embedding_a"].T, part["embedding_b"].T
        shape, dtype = base.shape(target.parameter), base.dtype(target.parameter)
        return LowRankCodec().from_factors(u, v, target.scale, shape, dtype)

    def _scale(self, parameter: str, tensors: dict[str, str]) -> float:
        if "full" in tensors:
            return 1.0
        if set(tensors) not in PAIRS:
            raise CheckpointError(f"{self.path}: {parameter} has only one of its two factors")
        first = tensors.get("a") or tensors["embedding_a"]
        rank = self._shards.shape(first)[0]
        module = parameter.removesuffix(".weight")
        alpha = _by_pattern(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))

    def _without_base_copy(
        self, parameter: str, tensors: dict[str, str], base: Checkpoint
    ) -> dict[str, str]:
        """PEFT stores a copy of an adapted embedding's base weight; it says nothing new."""
        full = tensors.get("full")
        if full is None:
            return tensors
        mine, theirs = self.tensor(full), base.tensor(parameter)
        if mine.shape == theirs.shape and torch.equal(mine.float(), theirs.float()):
            return {role: name for role, name in tensors.items() if role != "full"}
        if len(tensors) > 1:
            raise CompatibilityError(
                f"{self.name} both replaces and adapts {parameter}; merge the adapter with "
                "peft's merge_and_unload and compress the merged model"
            )
        return tensors


def _role(name: str) -> tuple[str, str]:
    bare = name.removeprefix(PREFIX)
    for suffix, role in ROLES.items():
        if bare.endswith(suffix):
            return f"{bare.removesuffix(suffix)}.weight", role
    if "lora_" in bare or "token_adapter" in bare:
        raise CompatibilityError(
            f"{name} is not a plain LoRA tensor; merge the adapter with peft's merge_and_unload "
            "and compress the merged model"
        )
    return bare.replace(".modules_to_save", "").replace(".base_layer", ""), "full"


def _require_plain_lora(path: Path, config: dict[str, Any]) -> None:
    for key, neutral in NEUTRAL.items():
        value = config.get(key, neutral[0])
        if value not in neutral:
            raise CompatibilityError(
                f"{path / CONFIG}: {key} is {value!r}, which is more than plain LoRA; merge the "
                "adapter with peft's merge_and_unload and compress the merged model"
            )
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(BASE_CHANGING):
        raise CompatibilityError(
            f"{path / CONFIG}: init_lora_weights is {start!r}, which changes the base; save the "
            "adapter with path_initial_model_for_weight_conversion, or merge it first"
        )
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        raise CheckpointError(f"{path / CONFIG}: lora_alpha is missing or not a number")


def _by_pattern(patterns: object, module: str, default: float) -> float:
    """PEFT's rule: a pattern matches the end of a module's name."""
    for pattern, value in (patterns if isinstance(patterns, dict) else {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(default)


def _encode_full(tensor: torch.Tensor, base: torch.Tensor) -> Encoded:
    if tensor.dim() < 2:
        if tensor.shape != base.shape:
            raise CodecError(f"shape {list(tensor.shape)} instead of {list(base.shape)}")
        return RawCodec().encode(tensor, base)
    rows = RowsCodec().encode(tensor, base)
    dense = dense_bytes(tuple(tensor.shape), tensor.dtype)
    return rows if rows.num_bytes < dense else RawCodec().encode(tensor, base)
