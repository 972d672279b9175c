"""From a configuration to a listening server, and down again without leaving anything behind."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FrameType

import uvicorn

from deltaserve.config import ServerConfig
from deltaserve.engine.client import EngineClient
from deltaserve.errors import ConfigError
from deltaserve.logs import set_up_logs
from deltaserve.server.app import create_app
from deltaserve.server.connections import (
    GuardedProtocol,
    allow_many_descriptors,
    end_silent_peers,
)
from deltaserve.server.drain import Drain
from deltaserve.server.office import Office
from deltaserve.server.restore import registered_deltas, remember
from deltaserve.server.tokenizers import Tokenizers
from deltaserve.server.traces import open_tracing
from deltaserve.server.waiting_room import waiting_room

FAREWELL_SECONDS = 2
"""What the last bytes of answers may take to leave, once nothing is generated any more."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(config: ServerConfig) -> None:
    """Load the models and serve them until SIGINT or SIGTERM.

    Raises:
        DeltaServeError: the address cannot be used, or a model cannot be served.
    """
    set_up_logs(logging.INFO, as_json=config.log_format == "json")
    allow_many_descriptors()
    with contextlib.ExitStack() as stack:
        try:
            stop = Stop()
            with stop.noted():
                # Before minutes of loading: what cannot be had is known at once.
                listener = stack.enter_context(contextlib.closing(bind(config)))
                office = stack.enter_context(open_office(config))
                if (tracing := open_tracing(config.otlp_traces_endpoint)) is not None:
                    stack.callback(tracing.close)
                client, tokenizers = load(config, office, listener, stop, stack)
        except StoppedError:
            print("DeltaServe stopped: SIGTERM came while the models were loaded.", flush=True)
            return
        drain = Drain()
        if office is not None:
            remember(client, office.registry, config.engine)
        app = create_app(client, tokenizers, config, drain, office, tracing)
        names = [model.name for model in client.models()]
        settings = uvicorn.Config(
            app,
            http=GuardedProtocol,
            log_config=None,
            log_level="warning",
            access_log=False,  # RequestContext writes one line for each request
            lifespan="off",
            timeout_graceful_shutdown=FAREWELL_SECONDS,
            server_header=False,
        )
        ready = f"DeltaServe ready at {_url(listener)} — {_summary(names)}"
        if not config.locked:
            ready += "\nNo key is set: everybody on this machine may use it, and nobody else can."
        server = Server(settings, ready, client, drain, config.drain_timeout_s)
        if office is not None:
            server.on_end = office.sources.stop
        with _explain_bind_errors(config):
            server.run(sockets=[listener])
    print("DeltaServe stopped.", flush=True)


def load(
    config: ServerConfig,
    office: Office | None,
    listener: socket.socket,
    stop: Stop,
    stack: contextlib.ExitStack,
) -> tuple[EngineClient, Tokenizers]:
    """The engine, which ``stack`` closes; whoever asks meanwhile is told to wait.

    Raises StoppedError.
    """
    wanted = add_registered(config, office)
    print(f"Loading {wanted.engine.base}, {len(wanted.engine.deltas)} delta(s) ...", flush=True)
    with waiting_room(listener, GuardedProtocol), stop.heeded():
        client = start_engine(wanted)
        stack.callback(client.close)
        return client, Tokenizers(client.models())


@contextlib.contextmanager
def open_office(config: ServerConfig) -> Iterator[Office | None]:
    """What a configuration with tenants needs. Raises ConfigError."""
    if not config.managed:
        yield None
        return
    with contextlib.closing(Office.open(config)) as office:
        yield office


def add_registered(config: ServerConfig, office: Office | None) -> ServerConfig:
    """With the deltas that were served before the last stop; those given now come first."""
    if office is None:
        return config
    given = {delta.name for delta in config.engine.deltas}
    before = registered_deltas(office.registry, config.engine.base)
    more = tuple(delta for delta in before if delta.name not in given)
    return replace(config, engine=replace(config.engine, deltas=config.engine.deltas + more))


class StoppedError(Exception):
    """Somebody does not want what is being loaded any more."""


class Stop:
    """SIGTERM before anything is served, which ends the start in order as Ctrl-C does.

    It is noted at once, but raised only in ``heeded``: not while threads are being started. A
    second one ends the process.
    """

    def __init__(self) -> None:
        self._asked = self._heeding = False

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Raises StoppedError at the end, if it came outside of ``heeded``."""
        previous = signal.signal(signal.SIGTERM, self._handle)
        try:
            yield
            if self._asked:
                raise StoppedError
        finally:
            signal.signal(signal.SIGTERM, previous)

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """Raises StoppedError, within the block too."""
        self._heeding = True
        try:
            if self._asked:
                raise StoppedError
            yield
        finally:
            self._heeding = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._asked = True
        if self._heeding:
            raise StoppedError


def start_engine(config: ServerConfig) -> EngineClient:
    """Load base and deltas, where the configuration wants the engine to run."""
    if not config.engine_process:
        from deltaserve.engine.local import LocalClient  # the whole engine: only if it runs here

        return LocalClient.start(config.engine)
    from deltaserve.engine.remote import ProcessClient, Supervision

    return ProcessClient(config.engine, Supervision(hang_seconds=config.engine_hang_s))


class Server(uvicorn.Server):
    """Says when it is ready; drains on the first signal, and ends at once on the second."""

    def __init__(
        self,
        config: uvicorn.Config,
        ready: str,
        client: EngineClient,
        drain: Drain,
        drain_timeout_s: float,
    ) -> None:
        super().__init__(config)
        self._ready = ready
        self._client = client
        self._drain = drain
        self._drain_timeout_s = drain_timeout_s
        self.on_end: Callable[[], None] = lambda: None
        """Called when it has drained, before threads are waited for."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._ready, flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # Unlike uvicorn's, this does not raise the signal again: being asked to stop is no failure.
        previous = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit = self._drain.begun
        self._drain.begin()

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True ends the server."""
        over = self._drain.over(self._drain_timeout_s)
        if over or self.should_exit:
            self.on_end()
        if over and self._drain.in_flight:
            reason = (
                "the server is shutting down, and this request did not end within "
                f"{self._drain_timeout_s:g} s (drain_timeout_s)"
            )
            await asyncio.to_thread(self._client.close, reason)
        return await super().on_tick(counter) or over


def bind(config: ServerConfig) -> socket.socket:
    """A socket at the configured address.

    Raises:
        ConfigError: the address is taken or unknown, or open to others without a key.
    """
    with _explain_bind_errors(config):
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        # By address, not by name: what a name means is decided elsewhere.
        if not (config.locked or ipaddress.ip_address(address[0]).is_loopback):
            raise ConfigError(
                f"{config.host} is open to other machines, so an API key is needed: set "
                "DELTASERVE_API_KEY (or --api-key), or --tenants, or listen on 127.0.0.1"
            )
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            end_silent_peers(listener)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
        return listener


@contextlib.contextmanager
def _explain_bind_errors(config: ServerConfig) -> Iterator[None]:
    try:
        yield
    except socket.gaierror as error:
        raise ConfigError(f"unknown host {config.host!r}: {error.strerror}") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {config.port} of {config.host} is in use: choose another with --port "
                "(0 picks a free one)"
            ) from error
        if error.errno in (errno.EACCES, errno.EADDRNOTAVAIL):
            raise ConfigError(
                f"cannot listen on {config.host}:{config.port}: {error.strerror}"
            ) from error
        raise


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _summary(names: list[str]) -> str:
    """``3 models: base, a, b``; the first few by name."""
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"{len(names)} {'model' if len(names) == 1 else 'models'}: {shown}"
