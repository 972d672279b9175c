"""What a user wants of a delta: a preset, a size, a quality."""

from __future__ import annotations

from dataclasses import dataclass

from deltaserve.errors import ConfigError

LOSSLESS = "lossless"


@dataclass(frozen=True)
class Preset:
    """ratio: fine-tune / delta in memory, everything included, to begin with. max_kl: mean
    divergence on held-out text, nats per token, above which more bytes are spent."""

    ratio: float
    max_kl: float


PRESETS = {
    "quality": Preset(5.0, 0.005),
    "balanced": Preset(8.0, 0.02),
    "small": Preset(16.0, 0.1),
}


@dataclass(frozen=True)
class Goal:
    """preset: a name of PRESETS or "lossless"; target_ratio: fine-tune / delta in memory.

    max_kl replaces the preset's. A ratio fixes the size, so that nothing is escalated.
    """

    preset: str | None = None
    target_ratio: float | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        known = (LOSSLESS, *PRESETS)
        if self.preset is not None and self.preset not in known:
            raise ConfigError(f"--preset must be one of {', '.join(known)}, not {self.preset}")
        if self.preset is not None and self.target_ratio is not None:
            raise ConfigError("--preset and --target-ratio both choose the size; give one of them")
        if self.preset == LOSSLESS and self.max_kl is not None:
            raise ConfigError("--preset lossless has no divergence; drop --max-kl")
        if self.target_ratio is not None and not self.target_ratio > 1:
            raise ConfigError(f"--target-ratio must be above 1, not {self.target_ratio}")
        if self.max_kl is not None and not self.max_kl > 0:
            raise ConfigError(f"--max-kl must be above 0, not {self.max_kl}; or --preset lossless")

    @property
    def lossless(self) -> bool:
        return self.preset == LOSSLESS

    @property
    def start(self) -> Preset:
        """Where to begin."""
        return PRESETS[self.preset or "balanced"]

    @property
    def smallest(self) -> bool:
        """Whether only a divergence is asked for: the least bytes that hold it."""
        return self.preset is None and self.target_ratio is None and self.max_kl is not None

    @property
    def limit(self) -> float | None:
        """The divergence to hold; a ratio alone sets none."""
        if self.max_kl is not None or self.target_ratio is not None:
            return self.max_kl
        return self.start.max_kl
