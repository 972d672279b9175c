"""The server under test: may it be loaded, what does it serve, is it warm."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import urllib.parse
from collections.abc import Sequence
from typing import Any

import aiohttp

from deltaserve.bench.load.answer import error_message, one_line
from deltaserve.bench.load.client import (
    Client,
    Prompt,
    authorization,
    connection_failure,
    redirection,
)
from deltaserve.bench.load.plan import Served
from deltaserve.bench.load.prompts import Renderer
from deltaserve.bench.load.reading import parse_json
from deltaserve.bench.load.records import Outcome, Record
from deltaserve.bench.load.workload import Workload
from deltaserve.errors import ConfigError, DeltaServeError

CALIBRATION_WORDS = (4, 20)
WARMUP_WORDS = 8
WARMUP_TOKENS = 4
WARMUP_AT_ONCE = 8
LOOK_SECONDS = 10.0
BUSY = (429, 503)
UNKNOWN_FIELD = (400, 422)
BUSY_RETRIES = 4
BUSY_SECONDS = 0.25
BUSY_PATIENCE = 30.0
"""The longest time that a refusal may ask to wait (Retry-After)."""


class TargetError(DeltaServeError):
    """The server cannot be reached, or refuses what every request would need."""


def check_url(url: str, *, allow_remote: bool) -> str:
    """The address without a trailing slash or /v1.

    Raises:
        ConfigError: not an address, or not of this machine and ``allow_remote`` is not set: a
            load test of somebody else's server is an attack.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise ConfigError(f"{url!r} is no address: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{url!r} is no address: give something like http://127.0.0.1:8000")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError("--url takes an address without user, ? and #; --api-key takes a key")
    try:
        found = socket.getaddrinfo(parts.hostname, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"unknown host {parts.hostname!r}: {error.strerror}") from error
    except UnicodeError as error:
        raise ConfigError(f"{url!r} is no address: no host is called so") from error
    addresses = [ipaddress.ip_address(each[4][0]) for each in found]
    # 0.0.0.0, which servers print as theirs, is reached as loopback.
    local = all(each.is_loopback or each.is_unspecified for each in addresses)
    if not local and not allow_remote:
        raise ConfigError(
            f"{parts.hostname} is another machine: say --allow-remote if its load is yours to make"
        )
    return url.rstrip("/").removesuffix("/v1")


def check_key(key: str, who: str) -> None:
    """Raises ConfigError: no header can carry it, as one that was read with its line end."""
    if not key.isprintable():
        raise ConfigError(f"the key of {who} holds a line end or another control character")


async def look(http: aiohttp.ClientSession, url: str, key: str, who: str) -> list[Served]:
    """What the server serves; nothing where it cannot tell, as ``transformers serve`` without a
    cache of models. Raises TargetError: unreachable, or wrong key."""
    timeout = aiohttp.ClientTimeout(LOOK_SECONDS)
    try:
        async with http.get(
            f"{url}/v1/models",
            headers=authorization(key),
            timeout=timeout,
            allow_redirects=False,
        ) as response:
            if response.status in (401, 403):
                said = error_message(await response.read())
                raise TargetError(f"{url} refuses the key of {who}: {said}")
            if place := redirection(response):
                raise TargetError(f"{place}: give that address, if it is meant")
            if response.status != 200:
                response.close()  # a server that failed may be about to close it too
                return []
            models = parse_json(await response.read())["data"]
            return [Served(_name(model), model.get("parent")) for model in models]
    except TimeoutError as error:
        raise TargetError(f"no server answers at {url}: silent for {LOOK_SECONDS:g} s") from error
    except aiohttp.ClientResponseError as error:
        raise TargetError(f"no server answers at {url}: what listens there is not HTTP") from error
    except (aiohttp.ClientError, OSError) as error:
        raise TargetError(f"no server answers at {url}: {connection_failure(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def _name(model: dict[str, Any]) -> str:
    """Raises TypeError: it has none."""
    if not isinstance(model["id"], str):
        raise TypeError(f"id is {model['id']!r}")
    return model["id"]


async def version(http: aiohttp.ClientSession, url: str) -> str | None:
    """What the server says of itself, if it does."""
    found: Any = None
    with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError, ValueError):
        timeout = aiohttp.ClientTimeout(LOOK_SECONDS)
        async with http.get(f"{url}/version", timeout=timeout, allow_redirects=False) as response:
            found = parse_json(await response.read()) if response.status == 200 else None
    found = found.get("version") if isinstance(found, dict) else found
    return one_line(found) if isinstance(found, str) else None


async def listens(url: str) -> bool:
    """Whether something accepts connections there."""
    parts = urllib.parse.urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        async with asyncio.timeout(1.0):
            _, writer = await asyncio.open_connection(parts.hostname, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


async def calibrate(client: Client, model: str, key: str) -> Renderer:
    """How many tokens the server counts for a word. Raises TargetError when it refuses."""
    ids = client.workload.token_ids
    if ids is not None:
        return Renderer(token_ids=ids)
    counted = []
    for words in CALIBRATION_WORDS:
        text = Renderer().prompt([("calibration", words)])
        record = await _ask(client, model, as_prompt(text, client.workload), 1, key)
        counted.append((words, record.prompt_tokens))
    return Renderer.calibrated(*counted)


async def warm_up(client: Client, renderer: Renderer, asked: Sequence[tuple[str, str]]) -> None:
    """Requests for each (model, key), a few at once. Raises TargetError when one fails."""
    slots = asyncio.Semaphore(WARMUP_AT_ONCE)

    async def one(model: str, key: str, number: int) -> None:
        text = renderer.prompt([(f"warm-up {model} {number}", WARMUP_WORDS)])
        async with slots:
            await _ask(client, model, as_prompt(text, client.workload), WARMUP_TOKENS, key)

    numbers = range(client.workload.warmup)
    work = [one(model, key, number) for number in numbers for model, key in asked]
    for result in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


def as_prompt(text: str | list[int], workload: Workload) -> Prompt:
    """A single question as the endpoint wants it."""
    if workload.endpoint == "completions" or not isinstance(text, str):
        return text
    return [{"role": "user", "content": text}]


async def _ask(client: Client, model: str, prompt: Prompt, tokens: int, key: str) -> Record:
    """A request that must be answered: tried again a few times if it is told to come later, or
    if the connection broke, which hides why it was refused."""
    for attempt in range(BUSY_RETRIES + 1):
        now = client.clock()
        record = Record("", model, now, now, now, Outcome.OK)
        record, _ = await client.ask(record, prompt, tokens, key)
        if record.outcome is Outcome.UNFINISHED:
            raise asyncio.CancelledError
        if record.status not in BUSY and record.outcome is not Outcome.DISCONNECTED:
            break
        wait = record.retry_after or BUSY_SECONDS * 2**attempt
        if wait > BUSY_PATIENCE:
            break
        await asyncio.sleep(wait)
    if not record.ok:
        hint = ""
        if record.status in UNKNOWN_FIELD and client.workload.ignore_eos:
            hint = " (if it does not know ignore_eos, set ignore_eos: false)"
        raise TargetError(
            f"a first request for {model} failed: {record.error}: {record.message}{hint}"
        )
    return record
