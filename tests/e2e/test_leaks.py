"""A server that is treated badly for long has as many descriptors and bytes as before."""

from __future__ import annotations

import json
import os
import random
import socket
import time
from pathlib import Path

import pytest

from deltaserve.tenancy.keys import digest
from tests.process_helpers import engine_of, wait_until
from tests.tenancy_server import ACME, Serving, make_base

HEAD = (
    "POST /v1/{} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n"
    "content-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n"
)
MB = 2**20


class Vandal:
    def __init__(self, url: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        self.address = host, int(port)
        self.chance = random.Random(7)

    def send(self, route: str, body: bytes, read: int | None, key: str = ACME) -> None:
        """read: bytes of the answer before leaving; None for all of it."""
        with socket.create_connection(self.address, timeout=30) as connection:
            connection.sendall(HEAD.format(route, key, len(body)).encode() + body)
            while (read is None or read > 0) and (part := connection.recv(read or 65536)):
                read = None if read is None else read - len(part)

    def once(self) -> None:
        chance = self.chance
        noise = chance.randbytes(chance.randrange(1500))
        route = chance.choice(["completions", "chat/completions", "tokenize", "embeddings"])
        self.send(route, noise, None)
        self.send(route, json.dumps({"model": noise.hex(), noise.hex(): 1}).encode(), None)
        self.send(route, b"{}", None, key=noise.hex()[:200] or "x")
        with socket.create_connection(self.address, timeout=30) as connection:
            head = HEAD.format(route, ACME, 900).encode() + b"{"
            connection.sendall(head[: chance.randrange(len(head))])
        stream = {"model": "base", "prompt": "a", "max_tokens": 99, "ignore_eos": True,
                  "stream": True, "seed": chance.randrange(10**6)}  # fmt: skip
        self.send("completions", json.dumps(stream).encode(), chance.randrange(1, 900))
        pattern = {"guided_regex": f"a{{{chance.randrange(1, 10**6)}}}b", "stream": False}
        self.send("completions", json.dumps(stream | pattern | {"max_tokens": 2}).encode(), None)


def processes(serving: Serving) -> list[int]:
    return [serving.process.pid, *engine_of(serving.process)]


def descriptors(pids: list[int]) -> int:
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)


def resident(pids: list[int]) -> int:
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("leaks")
    make_base(root / "base")
    (root / "deltas").mkdir()
    tenants = [{"id": "acme", "keys": [{"sha256": digest(ACME)}]}]
    (root / "tenants.yaml").write_text(json.dumps({"tenants": tenants}))
    serving = Serving(root)
    yield serving
    serving.stop()


@pytest.mark.parametrize(
    ("warm", "rounds", "growth"),
    [(20, 15, 400 * MB), pytest.param(60, 1000, 150 * MB, marks=pytest.mark.slow)],
)
def test_nothing_is_left_behind(serving, warm, rounds, growth):
    """Six requests a round. Caches fill while it warms up: 16 compiled grammars, for one."""
    vandal = Vandal(serving.url)
    for _ in range(warm):
        vandal.once()
    time.sleep(0.5)
    pids = processes(serving)
    files, memory = descriptors(pids), resident(pids)
    for _ in range(rounds):
        vandal.once()
    wait_until(lambda: descriptors(pids) <= files + 8)
    assert resident(pids) < memory + growth
    stats = serving.admin("GET", "/v1/stats")
    assert (stats["running"], stats["waiting"], stats["kv_blocks_used"]) == (0, 0, 0)
    assert "Traceback" not in serving.log.read_text()
