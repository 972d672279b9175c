"""What a server with tenants keeps: accounts, limits, usage and the registry, opened together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deltaserve.artifact.files import COMPANIONS
from deltaserve.artifact.reader import Delta as Artifact
from deltaserve.config import ServerConfig
from deltaserve.registry.catalogue import Registry
from deltaserve.registry.objects import Objects
from deltaserve.registry.roots import Roots
from deltaserve.registry.sources import Sources
from deltaserve.tenancy.accounts import Accounts
from deltaserve.tenancy.limits import Limiter
from deltaserve.tenancy.tenants import read_tenants
from deltaserve.tenancy.usage import UsageLog, used_now

ACCOUNTS = "accounts.sqlite"
REGISTRY = "registry.sqlite"
HUB_CACHE, OBJECT_CACHE = "hub", "objects"


@dataclass(frozen=True)
class Office:
    """Closed by whoever opened it, after the last request."""

    accounts: Accounts
    limiter: Limiter
    usage: UsageLog
    registry: Registry
    sources: Sources

    @classmethod
    def open(cls, config: ServerConfig) -> Office:
        """Raises ConfigError: the tenants file, the state directory or a root is unusable."""
        assert config.state_dir is not None
        state = Path(config.state_dir).expanduser()
        from_file = read_tenants(Path(config.tenants)) if config.tenants else []
        sources = Sources(
            Roots(map(Path, config.delta_roots)),
            state / HUB_CACHE,
            objects=_objects(config, state / OBJECT_CACHE),
        )
        accounts = Accounts(state / ACCOUNTS, from_file)
        usage = UsageLog(state / ACCOUNTS)
        limiter = Limiter()
        limiter.load(used_now(usage.path, limiter.wall()))
        return cls(accounts, limiter, usage, Registry(state / REGISTRY), sources)

    def close(self) -> None:
        self.usage.close()
        self.accounts.close()
        self.registry.close()


def _objects(config: ServerConfig, folder: Path) -> Objects | None:
    if not config.delta_urls:
        return None
    return Objects(
        config.delta_urls,
        folder,
        max_bytes=config.max_delta_bytes,
        companions=COMPANIONS,
        verify=lambda path: Artifact.open(path).verify_digest(),
    )
