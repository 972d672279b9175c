"""A whole load test: look at the server, warm it up, run each tenant alone if asked, then all."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import itertools
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import aiohttp

from deltaserve.bench.load.client import Asker, Client
from deltaserve.bench.load.plan import (
    Served,
    Session,
    check_inputs,
    probe_sessions,
    resolve_models,
    sessions,
)
from deltaserve.bench.load.prompts import Renderer
from deltaserve.bench.load.result import Measured
from deltaserve.bench.load.runner import COMPLETE, INTERRUPTED, Run, Runner
from deltaserve.bench.load.scrape import Scraper, Series
from deltaserve.bench.load.target import calibrate, check_key, look, version, warm_up
from deltaserve.bench.load.workload import Tenant, Workload

KEEPALIVE_SECONDS = 2.0
"""Less than uvicorn's 5: a connection that the server is about to close must not be reused."""

Progress = Callable[[str, Run], None]
"""Gets what is being run and how far it is."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Target:
    """Where to send requests. key: of tenants that name none. admin_key: to see its metrics, where
    it wants one for them. pid: of the server's process, if it was started here."""

    url: str
    key: str = ""
    admin_key: str = ""
    pid: int | None = None


def measure(target: Target, workload: Workload, on_progress: Progress) -> Measured:
    """Run the workload. Ctrl-C and SIGTERM end it early and keep what was measured.

    Raises:
        DeltaServeError: the server cannot be reached, refuses a key or a first request, or lacks
            a model: nothing was measured.
    """
    return asyncio.run(_measure(target, workload, on_progress))


async def _measure(target: Target, workload: Workload, on_progress: Progress) -> Measured:
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS)
    timeout = aiohttp.ClientTimeout(total=workload.request_timeout)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        check_key(target.admin_key, "the metrics")
        keys = workload.api_keys(target.key)
        for name, key in keys.items():
            check_key(key, f"tenant {name!r}")
        served = await _look_with_every_key(http, target, keys)
        check_inputs(workload, served)
        server = HttpServer(http, target, workload, keys)
        renderer = await server.prepare(served)
        return await LoadTest(server, workload, keys, served, renderer, on_progress).execute()


async def _look_with_every_key(
    http: aiohttp.ClientSession, target: Target, keys: Mapping[str, str]
) -> dict[str, list[Served]]:
    """What each tenant may ask. A key is tried once, whoever shares it."""
    seen: dict[str, list[Served]] = {}
    for name, key in keys.items():
        if key not in seen:
            seen[key] = await look(http, target.url, key, f"tenant {name!r}")
    return {name: seen[key] for name, key in keys.items()}


class Watcher(Protocol):
    """Follows the server's own numbers during a run."""

    async def follow(self, clock: Callable[[], float], series: Series) -> None: ...

    async def look(self, clock: Callable[[], float], series: Series) -> None: ...


class Backend(Protocol):
    """What is loaded: a server, or a simulation of one."""

    def client(self, clock: Callable[[], float]) -> Asker: ...

    def scraper(self) -> Watcher: ...

    async def facts(self) -> dict[str, object]:
        """For the record."""
        ...


class HttpServer:
    """A ``Backend`` that is reached over HTTP."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        target: Target,
        workload: Workload,
        keys: Mapping[str, str],
    ) -> None:
        self._http, self._target, self._workload, self._keys = http, target, workload, keys
        self._renderer = Renderer()
        self._models = 0
        self._version: str | None = None

    async def prepare(self, served: Mapping[str, Sequence[Served]]) -> Renderer:
        """Every model asked once, so that nothing measured is somebody's first time. Returns
        what makes prompts of a wanted length for this server."""
        self._models = len({model.name for models in served.values() for model in models})
        # Asked now: after the run it may be dead, and Ctrl-C would wait for it.
        self._version = await version(self._http, self._target.url)
        asked = {
            model: self._keys[tenant.name]
            for tenant in reversed(self._workload.tenants)
            for model in resolve_models(tenant, served[tenant.name])
        }
        client = self.client(asyncio.get_running_loop().time)
        first = self._workload.tenants[0]
        model = resolve_models(first, served[first.name])[0]
        self._renderer = await calibrate(client, model, self._keys[first.name])
        await warm_up(client, self._renderer, list(asked.items()))
        return self._renderer

    def client(self, clock: Callable[[], float]) -> Client:
        return Client(self._http, self._target.url, self._workload, clock)

    def scraper(self) -> Scraper:
        target, first = self._target, self._workload.tenants[0].name
        key = target.admin_key or self._keys[first]
        return Scraper(self._http, target.url, key, self._workload.scrape, target.pid)

    async def facts(self) -> dict[str, object]:
        return {
            "url": self._target.url,
            "version": self._version,
            "models": self._models,
            "tokens_per_word": self._renderer.tokens_per_word,
        }


class LoadTest:
    """The runs of one test: of each tenant alone, if asked for, and of all."""

    def __init__(
        self,
        backend: Backend,
        workload: Workload,
        keys: Mapping[str, str],
        served: Mapping[str, Sequence[Served]],
        renderer: Renderer,
        on_progress: Progress,
    ) -> None:
        """keys, served: of each tenant."""
        self._backend, self._workload = backend, workload
        self._keys, self._served = keys, served
        self._renderer = renderer
        self._on_progress = on_progress
        self._series = Series()

    async def execute(self) -> Measured:
        workload = self._workload
        tenants = workload.tenants
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        alone: dict[str, Run] = {}
        together = Run()
        only = ""
        for tenant in tenants if workload.alone and len(tenants) > 1 else ():
            together = await self._run([tenant], f"{tenant.name} alone")
            if together.ended != COMPLETE:
                only = tenant.name  # its records are all that there is
                break
            alone[tenant.name] = together
        if not only:
            together = await self._run(tenants, workload.name)
        facts = await self._backend.facts()
        return Measured(workload, together, facts, started, alone, only, self._series)

    async def _run(self, tenants: Sequence[Tenant], name: str) -> Run:
        runner = Runner(
            self._backend.client,
            self._workload,
            self._keys,
            lambda run: self._on_progress(name, run),
        )
        renderer = dataclasses.replace(self._renderer, salt=name)
        streams = {
            tenant: _begun(sessions(tenant, self._workload, self._served[tenant.name], renderer))
            for tenant in tenants
        }
        probes = None
        if self._workload.probes is not None:
            first = self._workload.tenants[0].name
            probes = _begun(probe_sessions(self._workload, self._served[first], renderer))
        self._series = Series()
        scraper = self._backend.scraper()
        follow = asyncio.ensure_future(scraper.follow(runner.clock, self._series))
        with _stopping(runner):
            run = await runner.execute(streams, probes)
            follow.cancel()
            await asyncio.gather(follow, return_exceptions=True)
            # A server that hangs takes its time, in which Ctrl-C must not lose the run.
            await scraper.look(runner.clock, self._series)
        return run


def _begun(stream: Iterator[Session]) -> Iterator[Session]:
    """The same stream. Its first session is made, and its files are read, before the clock runs:
    the requests of all would wait meanwhile."""
    return itertools.chain(list(itertools.islice(stream, 1)), stream)


@contextlib.contextmanager
def _stopping(runner: Runner) -> Iterator[None]:
    """The first signal stops the run and keeps what it has; a second does what it did before."""
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def as_before() -> None:
        for number, handler in before.items():
            if loop.remove_signal_handler(number):  # which leaves the system's own
                signal.signal(number, handler)

    def stop() -> None:
        as_before()
        runner.stop(INTERRUPTED)

    try:
        for number in SIGNALS:
            loop.add_signal_handler(number, stop)
    except (RuntimeError, ValueError):  # not in the main thread, where no signal arrives
        pass
    try:
        yield
    finally:
        as_before()
