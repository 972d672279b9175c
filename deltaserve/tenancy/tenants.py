"""What may be said of a tenant and of a key: the same fields in the YAML file and in the API.

The names are LiteLLM's where it has one for the thing.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, date, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from deltaserve.errors import ConfigError, RequestError
from deltaserve.yaml_file import read_yaml

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

Count = Annotated[int, Field(ge=1, le=2**53)]
Pattern = Annotated[str, Field(min_length=1, max_length=128)]
TenantId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


def parse_duration(text: str) -> float:
    """Seconds of ``30s``, ``15m``, ``12h`` or ``90d``. Raises ValueError."""
    match = re.fullmatch(r"([1-9][0-9]{0,8})([smhd])", text)
    if match is None:
        raise ValueError("must be a number and a unit, such as 30s, 15m, 12h or 90d")
    return int(match[1]) * float(UNITS[match[2]])


def _parse_time(value: Any) -> float:
    """Unix time of a date, or of a time with its zone; YAML has parsed unquoted ones already."""
    if isinstance(value, str):
        kind = date if len(value) == len("2030-01-31") else datetime
        value = kind.fromisoformat(value)
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day, tzinfo=UTC)
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise ValueError("must be a date, or a time with its zone: 2030-01-31T12:00:00Z")
    return value.timestamp()


def _parse_digest(value: Any) -> str:
    digest = value.removeprefix("sha256:").lower() if isinstance(value, str) else ""
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError("must be the key's SHA-256 in 64 hexadecimal digits, not the key")
    return digest


def _check_duration(text: str) -> str:
    parse_duration(text)
    return text


class _Fields(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Limits(_Fields):
    """What a tenant or a key may do; None is no limit of its own. Days and months are UTC's."""

    models: Annotated[list[Pattern], Field(min_length=1, max_length=1000)] = ["*"]
    """Names of models; ``*`` stands for anything, ``?`` for one character."""
    rpm_limit: Annotated[Count | None, Field(le=10**6)] = None
    """Requests in any 60 seconds."""
    tpm_limit: Count | None = None
    """Tokens, of prompts and answers, of the requests that came in any 60 seconds."""
    max_parallel_requests: Count | None = None
    daily_token_budget: Count | None = None
    monthly_token_budget: Count | None = None
    priority: Annotated[int | None, Field(ge=-(2**31), le=2**31 - 1)] = None
    """Lower runs first, as in vLLM; a key's wins over its tenant's, 0 without either."""
    cache_salt: Annotated[str | None, Field(min_length=1, max_length=128)] = None
    """Whose computed prompts may be shared; by default each tenant shares with itself only."""
    blocked: bool = False

    def allows(self, model: str) -> bool:
        return any(fnmatchcase(model, pattern) for pattern in self.models)


class Tenant(Limits):
    """A customer."""

    id: TenantId
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Share of the engine when it is busy: 2 gets twice the tokens of 1."""


class KeySettings(Limits):
    """A key's own limits, below those of its tenant."""

    key_alias: Annotated[str | None, Field(min_length=1, max_length=128)] = None

    def settings(self) -> KeySettings:
        """Without the fields of a subclass."""
        return KeySettings(**self.model_dump(include=set(KeySettings.model_fields)))


class NewKey(KeySettings):
    """What is asked for when a key is made."""

    duration: Annotated[str, AfterValidator(_check_duration)] | None = None
    """How long it is valid; for ever unless given."""


class FileKey(KeySettings):
    """A key of the YAML file, known by its digest."""

    sha256: Annotated[str, BeforeValidator(_parse_digest)]
    expires: Annotated[float, BeforeValidator(_parse_time)] = math.inf


class FileTenant(Tenant):
    keys: list[FileKey] = []

    def plain(self) -> Tenant:
        return Tenant(**self.model_dump(exclude={"keys"}))


class _File(_Fields):
    tenants: list[FileTenant]


ModelT = TypeVar("ModelT", bound=BaseModel)


def validate(kind: type[ModelT], values: Any) -> ModelT:
    """Check fields; raises RequestError naming the first wrong one, without showing its value."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:200]
        reason = {"extra_forbidden": "unknown field", "missing": "is missing"}.get(
            first["type"], first["msg"].removeprefix("Value error, ")
        )
        raise RequestError(f"{place or 'the settings'}: {reason}", param=place or None) from None


def read_tenants(file: Path) -> list[FileTenant]:
    """The tenants of a YAML file. Raises ConfigError."""
    try:
        tenants = validate(_File, read_yaml(file)).tenants
    except RequestError as error:
        raise ConfigError(f"{file}: {error}") from None
    _check_unique(file, "tenant", [tenant.id for tenant in tenants])
    _check_unique(file, "key", [key.sha256 for tenant in tenants for key in tenant.keys])
    return tenants


def _check_unique(file: Path, what: str, names: Sequence[str]) -> None:
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise ConfigError(f"{file}: {what} {twice} is there twice")
