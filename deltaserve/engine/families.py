"""The architectures that the engine serves, and what it must know of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deltaserve.errors import UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """token_dim of per-head norms: the dimension of their input that counts tokens."""

    head_norm_token_dim: int = 1


FAMILIES = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(),
    "Qwen2ForCausalLM": Family(),
    "Qwen3ForCausalLM": Family(),
    "Gemma2ForCausalLM": Family(),
    "Gemma3ForCausalLM": Family(head_norm_token_dim=2),
    "Phi3ForCausalLM": Family(),
}


def family_of(architecture: str) -> Family:
    """Raises UnsupportedModelError with the list of supported architectures."""
    if architecture not in FAMILIES:
        raise UnsupportedModelError(
            f"architecture {architecture} is not supported; supported are: {', '.join(FAMILIES)}"
        )
    return FAMILIES[architecture]


def context_limit(config: Any) -> int:
    """Longest sequence the base can serve with one set of rotary frequencies.

    ``longrope`` and ``dynamic`` choose their frequencies by the longest position in the
    batch, so past the original context one tenant's long prompt would change the others'
    results. Such models are held to their original context.
    """
    limit = int(config.max_position_embeddings)
    for rope in _rope_settings(config):
        if _looks_at_positions(rope):
            limit = min(limit, int(rope.get("original_max_position_embeddings", limit)))
    return limit


def rotary_waits(config: Any) -> bool:
    """Whether a forward reads positions back from the device to choose rotary frequencies, which
    no captured step can."""
    return any(map(_looks_at_positions, _rope_settings(config)))


def _looks_at_positions(rope: dict[str, Any]) -> bool:
    kind = rope.get("rope_type", "default")
    return kind == "longrope" or "dynamic" in kind


def _rope_settings(config: Any) -> list[dict[str, Any]]:
    """The rotary parameters, which some models hold once per layer type."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict) and "rope_type" in value]
    return nested or [rope]
