"""What a load test asks for, and from whom: frozen, read from YAML, the same for every server.

The keys of a tenant may stand at the top level, as defaults for all tenants. Times are seconds.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from deltaserve.bench.load.arrivals import Arrivals, AtOnce, Closed, Poisson, Trace
from deltaserve.bench.load.lengths import Fixed, Lengths, Prompts, ShareGpt
from deltaserve.bench.load.popularity import OnOffModels, Popularity, TraceModels, Uniform
from deltaserve.bench.load.schema import build, did_you_mean, not_negative, positive, repeated
from deltaserve.errors import ConfigError
from deltaserve.yaml_file import read_yaml

DEFAULT_DURATION = 30.0


@dataclass(frozen=True)
class Prefix:
    """Every prompt begins with one of ``groups`` texts of ``tokens`` tokens, of the tenant's own;
    they come before the prompt's own tokens."""

    tokens: int
    groups: int = 1

    def __post_init__(self) -> None:
        positive(tokens=self.tokens, groups=self.groups)


@dataclass(frozen=True)
class Turns:
    """Every arrival is a conversation of ``count`` questions; each is asked ``think`` seconds
    after the answer before it, and repeats what was said."""

    count: int
    think: float = 0.0

    def __post_init__(self) -> None:
        positive(count=self.count)
        not_negative(think=self.think)


@dataclass(frozen=True)
class Cancel:
    """A share ``fraction`` of the requests is abandoned ``after`` seconds."""

    fraction: float
    after: float

    def __post_init__(self) -> None:
        positive(after=self.after)
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction is {self.fraction:g}, but must be from 0 to 1")


@dataclass(frozen=True)
class Tenant:
    """One stream of requests, under one key. Raises ValueError when inconsistent."""

    name: str = "default"
    api_key_env: str = ""
    """Environment variable with its API key; "{i}" stands for the tenant's number."""
    weight: float = 1.0
    """Its share of service, relative to others: only for the fairness numbers."""
    models: Literal["all", "deltas"] | int | tuple[str, ...] = "all"
    """"deltas" are those with a parent; a number, so many of them (of all, if there are none)."""
    popularity: Popularity = field(default=Uniform())
    arrivals: Arrivals = field(default=Poisson(1.0))
    prompt: Prompts | None = None
    """Tokens; None is the trace's, or 64."""
    output: Lengths | None = None
    """Tokens; None is the trace's, or the data's, or 32."""
    prefix: Prefix | None = None
    turns: Turns = Turns(1)
    cancel: Cancel | None = None
    requests: int | None = None
    duration: float | None = None
    start: float = 0.0

    def __post_init__(self) -> None:
        positive(weight=self.weight, requests=self.requests, duration=self.duration)
        not_negative(start=self.start)
        if isinstance(self.models, int):
            positive(models=self.models)
        if self.models == ():
            raise ValueError("models is empty: name at least one")
        if isinstance(self.arrivals, AtOnce) and self.requests is None:
            raise ValueError("arrivals at_once need a number of requests")
        if isinstance(self.popularity, TraceModels) and not isinstance(self.arrivals, Trace):
            raise ValueError("popularity trace needs arrivals trace")
        if isinstance(self.popularity, OnOffModels) and isinstance(self.arrivals, Closed):
            raise ValueError("popularity on_off changes with time, which a closed loop leaves open")
        endless = self.requests is None and self.duration is None
        if endless and not isinstance(self.arrivals, Trace):
            object.__setattr__(self, "duration", DEFAULT_DURATION)


@dataclass(frozen=True)
class Slo:
    """What a request must keep to be good; None is not asked."""

    ttft: float | None = None
    tpot: float | None = None
    itl: float | None = None
    """The longest gap of the answer."""
    e2e: float | None = None

    def __post_init__(self) -> None:
        positive(**self.limits())

    def limits(self) -> dict[str, float]:
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


@dataclass(frozen=True)
class Probes:
    """Small requests beside the load, whose times show stalls. Not part of any other number."""

    rate: float = 1.0
    prompt: int = 8
    output: int = 1
    model: str = ""
    """The first of the first tenant, unless named."""

    def __post_init__(self) -> None:
        positive(rate=self.rate, prompt=self.prompt, output=self.output)


@dataclass(frozen=True)
class Threshold:
    """A limit for one number of the result, named by its path: ``tenants.polite.ttft.p99``."""

    metric: str
    max: float | None = None
    min: float | None = None

    def __post_init__(self) -> None:
        if self.max is None and self.min is None:
            raise ValueError(f"{self.metric}: give max or min")


@dataclass(frozen=True)
class Workload:
    """A whole load test. Raises ValueError when inconsistent."""

    name: str = "load"
    tenants: tuple[Tenant, ...] = (Tenant(),)
    seed: int = 0
    endpoint: Literal["completions", "chat"] = "completions"
    temperature: float = 0.0
    ignore_eos: bool = True
    """Answers of exactly the length asked for; not every server knows it."""
    token_ids: tuple[int, int] | None = None
    """Prompts as token ids from this range, of exact length, instead of text."""
    warmup: int = 1
    """Requests for each model before anything is measured."""
    max_time: float | None = None
    """Seconds after which the measured run is cut."""
    max_requests: int | None = None
    max_concurrency: int | None = None
    """Requests in flight, at most; others wait, and their waiting counts."""
    request_timeout: float = 600.0
    give_up: float = 3.0
    """Seconds without a listening server after which the run ends."""
    scrape: float = 1.0
    """Seconds between looks at the server's metrics."""
    settle: float = 0.0
    """Seconds at the beginning that the ``growth`` of these leaves out: processes start then, and
    caches fill."""
    slo: Slo = Slo()
    probes: Probes | None = None
    service_weights: tuple[float, float] = (1.0, 2.0)
    """What a prompt's token and a generated token count as service; VTC's are 1 and 2."""
    alone: bool = False
    """Run each tenant alone first, for its slowdown."""
    thresholds: tuple[Threshold, ...] = ()

    def __post_init__(self) -> None:
        positive(max_time=self.max_time, max_requests=self.max_requests, give_up=self.give_up)
        positive(max_concurrency=self.max_concurrency, request_timeout=self.request_timeout)
        positive(scrape=self.scrape, service_weights=sum(self.service_weights))
        for price in self.service_weights:
            not_negative(service_weights=price)
        not_negative(
            warmup=self.warmup, settle=self.settle, temperature=self.temperature, seed=self.seed
        )
        if twice := repeated(tenant.name for tenant in self.tenants):
            raise ValueError(f"two tenants are called {twice!r}")
        if self.token_ids is not None:
            self._check_token_ids(self.token_ids)

    def _check_token_ids(self, ids: tuple[int, int]) -> None:
        if not 0 <= ids[0] < ids[1]:
            raise ValueError(f"token_ids is {list(ids)}, but must be [first, last + 1]")
        if self.endpoint == "chat":
            raise ValueError("token_ids need the endpoint completions: chat takes only text")
        for tenant in self.tenants:
            if tenant.turns.count > 1 or isinstance(tenant.prompt, ShareGpt):
                raise ValueError("token_ids do not go with turns or sharegpt, which are text")

    def api_keys(self, default: str) -> dict[str, str]:
        """Of each tenant, by its name. Raises ConfigError: its variable is not set."""
        keys = {}
        for number, tenant in enumerate(self.tenants):
            variable = tenant.api_key_env.replace("{i}", str(number))
            if variable and variable not in os.environ:
                raise ConfigError(f"tenant {tenant.name!r}: the variable {variable} is not set")
            keys[tenant.name] = os.environ[variable] if variable else default
        return keys

    def as_dict(self) -> dict[str, Any]:
        """For the record; kinds included, keys never held."""
        return _plain(self)

    def digest(self) -> str:
        """Equal for equal workloads."""
        text = json.dumps(self.as_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_workload(file: Path) -> dict[str, Any]:
    """A workload file as it is written, relative paths made absolute. Raises ConfigError."""
    content = {str(key).replace("-", "_"): value for key, value in read_yaml(file).items()}
    content.setdefault("name", file.stem)
    return _absolute(content, file.resolve().parent)


def make_workload(content: Mapping[str, Any], where: str = "workload") -> Workload:
    """The workload of a mapping; keys of tenants at its top are defaults for all of them.

    Raises:
        ConfigError: unknown key, wrong type or value; the message names it.
    """
    shared_names = {f.name for f in dataclasses.fields(Tenant)} - {"name"}
    own_names = {f.name for f in dataclasses.fields(Workload)}
    if unknown := content.keys() - shared_names - own_names:
        name = sorted(unknown)[0]
        hint = did_you_mean(name, shared_names | own_names)
        raise ConfigError(f"{where}: unknown key {name!r}{hint}")
    shared = {name: content[name] for name in shared_names & content.keys()}
    own = {name: content[name] for name in own_names & content.keys()}
    own["tenants"] = [{**shared, **each} for each in _tenants(own.get("tenants"), where)]
    return build(Workload, own, where)


def set_key(content: dict[str, Any], key: str, value: Any) -> None:
    """Set ``arrivals.rate`` or ``tenants.0.models`` in a mapping. Raises ConfigError."""
    place: Any = content
    *parents, last = key.split(".")
    for part in parents:
        try:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        except (ValueError, IndexError):
            raise ConfigError(f"{key}: the workload has no {part!r} there") from None
        if not isinstance(place, dict | list):
            raise ConfigError(f"{key}: {part} is {place!r}, which has no {last!r}")
    if isinstance(place, list):
        raise ConfigError(f"{key}: {last} is inside a list: name the item's key")
    place[last] = value


def with_settings(content: Mapping[str, Any], settings: Iterable[tuple[str, Any]]) -> dict:
    """A copy with keys set."""
    changed = copy.deepcopy(dict(content))
    for key, value in settings:
        set_key(changed, key, value)
    return changed


def default_lengths(tenant: Tenant) -> tuple[Prompts, Lengths]:
    """What None stands for where neither a trace nor data says it."""
    return tenant.prompt or Fixed(64), tenant.output or Fixed(32)


def _tenants(value: Any, where: str) -> list[Mapping[str, Any]]:
    if value is None:
        return [{}]
    if type(value) is int and value > 0:
        return [{"name": f"tenant-{i}"} for i in range(value)]
    if not isinstance(value, list) or not value or not all(isinstance(v, dict) for v in value):
        raise ConfigError(f"{where}.tenants must be a list of mappings, or a number of tenants")
    return value


def _absolute(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_absolute(each, folder) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        k: str(folder / v) if k == "path" and isinstance(v, str) else _absolute(v, folder)
        for k, v in value.items()
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        kind = {"kind": value.kind} if hasattr(value, "kind") else {}
        return kind | {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [_plain(each) for each in value] if isinstance(value, tuple) else value
