"""What is simulated: a device, a base, its deltas, the engine's knobs, and how many of them.

Read from YAML (``configs/simulate/``). Sizes are GB (1e9 bytes), rates GB/s and TFLOP/s, times
seconds. Everything about time is either a device's figures or what ``calibrate`` has measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from deltaserve.bench.load.schema import build, not_negative, positive, repeated
from deltaserve.config import EngineConfig
from deltaserve.engine.memory import CPU_SHARE, GPU_RESERVE, divide
from deltaserve.errors import ConfigError
from deltaserve.yaml_file import read_yaml

GB = 1e9
BASE = "base"
"""Its name, unless the engine is given another."""


@dataclass(frozen=True)
class Device:
    """One replica's hardware: ``count`` equal devices that share each layer (tensor parallel)."""

    memory_gb: float
    bandwidth_gbs: float
    """Of its memory, as the data sheet says."""
    tflops: float
    """In the type of the base, without sparsity, as the data sheet says."""
    link_gbs: float
    """Host memory to device."""
    disk_gbs: float
    """Files to host memory."""
    host_memory_gb: float = 256.0
    count: int = 1
    bandwidth_share: float = 0.7
    """What steps really reach of the bandwidth ..."""
    flops_share: float = 0.5
    """... and of the arithmetic."""
    step_s: float = 0.003
    """Of a step, whatever is in it: planning, launches, sampling."""
    layer_s: float = 0.0
    """Of a step, for each layer, where ``count`` > 1: two all-reduces."""

    def __post_init__(self) -> None:
        amounts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        not_negative(step_s=amounts.pop("step_s"), layer_s=amounts.pop("layer_s"))
        positive(**amounts)
        for name in ("bandwidth_share", "flops_share"):
            if amounts[name] > 1:
                raise ValueError(f"{name} is {amounts[name]:g}, but is a share: at most 1")


@dataclass(frozen=True)
class Base:
    """The base model. ``billions`` of parameters of which all but the embedding are read by a
    step."""

    billions: float
    layers: int
    hidden: int
    kv_heads: int
    head_dim: int
    embedding_billions: float = 0.0
    """The table that is read by the row; 0 where the head is tied to it."""
    bits: float = 16.0
    kv_bits: float = 16.0
    context: int = 8192

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        not_negative(embedding_billions=values.pop("embedding_billions"))
        positive(**values)

    @property
    def bytes(self) -> int:
        return int(self.billions * 1e9 * self.bits / 8)

    @property
    def step_bytes(self) -> int:
        return int((self.billions - self.embedding_billions) * 1e9 * self.bits / 8)

    @property
    def kv_bytes(self) -> int:
        """Of one token."""
        return int(2 * self.layers * self.kv_heads * self.head_dim * self.kv_bits / 8)


@dataclass(frozen=True)
class Deltas:
    """``count`` equal deltas. Bytes are those of ``deltaserve inspect``."""

    count: int = 0
    names: tuple[str, ...] = ()
    """Of the first ones, for workloads that name their models; the others are delta-0 and so on."""
    device_gb: float = 0.0
    """Resident."""
    step_gb: float | None = None
    """Of them, read by a step with a row of it; None is all."""
    disk_gb: float | None = None
    """Of the artifact; None is as many as resident."""
    prepare_s: float = 0.0
    """Of a load, beside reading and copying: parsing, layout."""

    def __post_init__(self) -> None:
        not_negative(count=self.count, device_gb=self.device_gb, prepare_s=self.prepare_s)
        not_negative(step_gb=self.step_gb, disk_gb=self.disk_gb)
        if twice := repeated(self.names):
            raise ValueError(f"names has {twice!r} twice")

    def bytes_of(self, value: float | None) -> int:
        return int((self.device_gb if value is None else value) * GB)


@dataclass(frozen=True)
class Measured:
    """Seconds of a step, as a straight line: what ``calibrate`` finds. Instead of the figures."""

    step: float = 0.0
    prompt_token: float = 0.0
    drawn_token: float = 0.0
    delta: float = 0.0
    """For each distinct delta."""

    def __post_init__(self) -> None:
        not_negative(**dataclasses.asdict(self))


@dataclass(frozen=True)
class System:
    """A whole installation. Raises ValueError when inconsistent."""

    device: Device
    base: Base
    deltas: Deltas = Deltas()
    name: str = "simulated"
    replicas: int = 1
    """Engines with a whole base each, behind one router."""
    routing: Literal["delta_aware", "least_loaded", "round_robin"] = "delta_aware"
    request_s: float = 0.002
    """Of a request, outside of the engine: HTTP, tokenising, the way there and back."""
    between_s: float = 0.0
    """Between two steps: messages to and from the server."""
    measured: Measured | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Knobs of ``deltaserve serve`` that say how much it takes on."""

    def __post_init__(self) -> None:
        positive(replicas=self.replicas)
        not_negative(request_s=self.request_s, between_s=self.between_s)

    def engine_config(self) -> EngineConfig:
        """Raises ConfigError: an unknown or wrong knob."""
        given = {"base": self.name, "served_model_name": BASE, **self.engine}
        return build(EngineConfig, given, "engine")

    def model_names(self) -> list[str]:
        named = list(self.deltas.names[: self.deltas.count])
        return named + [f"delta-{i}" for i in range(self.deltas.count - len(named))]


@dataclass(frozen=True)
class Room:
    """Bytes of one replica, as the engine divides them when nobody says otherwise."""

    kv: int
    deltas: int
    host: int
    max_model_len: int


def read_system(path: Path) -> System:
    """Raises ConfigError."""
    content = {str(key).replace("-", "_"): value for key, value in read_yaml(path).items()}
    content.setdefault("name", path.stem)
    engine = content.pop("engine", None) or {}
    if not isinstance(engine, dict):
        raise ConfigError(f"{path}: engine must be a mapping of knobs to values")
    knobs = {str(key).replace("-", "_"): value for key, value in engine.items()}
    system = dataclasses.replace(build(System, content, str(path)), engine=knobs)
    plan_room(system)
    return system


def plan_room(system: System) -> Room:
    """Raises ConfigError: the base does not fit, or one sequence or one delta does not."""
    device, base, config = system.device, system.base, system.engine_config()
    free = int(device.memory_gb * GB * device.count) - base.bytes
    if free <= 0:
        raise ConfigError(
            f"{system.name}: the base has {base.bytes / GB:.1f} GB, the device "
            f"{device.memory_gb * device.count:g}: raise device.count, or lower base.bits"
        )
    length = config.max_model_len or base.context
    useful = config.max_num_seqs * -(-length // config.block_size) * config.block_size
    useful *= base.kv_bytes
    need = system.deltas.bytes_of(system.deltas.device_gb)
    unused = int(device.memory_gb * GB * device.count * (1 - config.gpu_memory_utilization))
    budget = max(0, free - unused - GPU_RESERVE)
    kv, deltas = divide(config, budget, useful, need * system.deltas.count, "cuda")
    kv = min(kv, useful)
    length = min(length, kv // (base.kv_bytes * config.block_size) * config.block_size)
    if length < config.block_size:
        raise ConfigError(f"{system.name}: the KV cache has {kv} bytes, too few for a block")
    if system.deltas.count and need > deltas:
        raise ConfigError(
            f"{system.name}: a delta has {need / GB:.2f} GB, but {deltas / GB:.2f} are left for "
            "deltas: set engine.delta_memory_bytes, or make it smaller"
        )
    host = int(device.host_memory_gb * GB * CPU_SHARE)
    if config.host_memory_bytes is not None:
        host = config.host_memory_bytes
    return Room(kv, deltas, host, length)


def changed(system: System, *, replicas: int | None, deltas: int | None) -> System:
    """With other numbers of engines or deltas. Raises ConfigError."""
    try:
        if replicas is not None:
            system = dataclasses.replace(system, replicas=replicas)
        if deltas is not None:
            system = dataclasses.replace(
                system, deltas=dataclasses.replace(system.deltas, count=deltas)
            )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    plan_room(system)
    return system


def as_yaml(system: System) -> str:
    """A file that ``read_system`` reads as this system."""
    content = {k: v for k, v in dataclasses.asdict(system).items() if v not in (None, {})}
    return yaml.safe_dump(content, sort_keys=False)
