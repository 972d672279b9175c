"""Where the server may listen."""

from __future__ import annotations

import socket

import pytest

from deltaserve.config import EngineConfig, ServerConfig, hash_key
from deltaserve.errors import ConfigError
from deltaserve.server.lifecycle import bind

ENGINE = EngineConfig("base")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_loopback_needs_no_key(host):
    with bind(ServerConfig(ENGINE, host=host, port=0)) as listener:
        assert listener.getsockname()[1] > 0


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3"])
def test_other_addresses_need_a_key(host):
    with pytest.raises(ConfigError, match="DELTASERVE_API_KEY"):
        bind(ServerConfig(ENGINE, host=host, port=0))


def test_with_a_key_any_address_will_do():
    with bind(ServerConfig(ENGINE, host="0.0.0.0", port=0, api_key_sha256=hash_key("k"))):
        pass


def test_with_tenants_any_address_will_do():
    config = ServerConfig(ENGINE, host="0.0.0.0", port=0, tenants="t.yaml", state_dir="s")
    with bind(config):
        pass


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 is in use"):
            bind(ServerConfig(ENGINE, port=port))


def test_an_unknown_host():
    with pytest.raises(ConfigError, match="unknown host"):
        bind(ServerConfig(ENGINE, host="no.such.host.invalid"))
