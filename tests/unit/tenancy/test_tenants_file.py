"""The tenants file: what it may say, and what it says when it is wrong."""

from __future__ import annotations

import math

import pytest

from deltaserve.cli.main import dispatch
from deltaserve.errors import ConfigError
from deltaserve.tenancy.keys import digest, new_key
from deltaserve.tenancy.tenants import parse_duration, read_tenants

KEY = "sk-ds-secret"


def write(tmp_path, text):
    file = tmp_path / "tenants.yaml"
    file.write_text(text)
    return file


def test_a_file_gives_every_field(tmp_path):
    file = write(
        tmp_path,
        f"""
        tenants:
          - id: acme
            models: ["acme-*", base]
            rpm_limit: 600
            tpm_limit: 200000
            max_parallel_requests: 32
            daily_token_budget: 1000000
            monthly_token_budget: 20000000
            weight: 2
            priority: -1
            keys:
              - sha256: sha256:{digest(KEY)}
                key_alias: production
                expires: 2030-01-31
                rpm_limit: 10
              - sha256: {digest("other").upper()}
                expires: 2030-01-31T12:00:00Z
              - sha256: {digest("third")}
                expires: "2030-01-31"
          - id: globex
        """,
    )
    acme, globex = read_tenants(file)
    assert (acme.weight, acme.priority, acme.rpm_limit) == (2.0, -1, 600)
    assert acme.allows("acme-legal/v2")
    assert acme.allows("base")
    assert not acme.allows("globex-chat")
    assert [key.expires for key in acme.keys] == [1896048000.0, 1896091200.0, 1896048000.0]
    assert acme.keys[0].sha256 == digest(KEY)
    assert acme.keys[0].settings().rpm_limit == 10
    assert globex.allows("anything")
    assert globex.rpm_limit is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tenants: [{id: a, rmp_limit: 5}]", "tenants.0.rmp_limit: unknown field"),
        ("tenants: [{}]", "tenants.0.id: is missing"),
        ("tenants: [{id: a b}]", "tenants.0.id"),
        ("tenants: [{id: 5}]", "tenants.0.id"),
        ("tenants: [{id: a}, {id: a}]", "tenant a is there twice"),
        ("tenants: [{id: a, rpm_limit: 0}]", "rpm_limit"),
        ("tenants: [{id: a, rpm_limit: 10000000}]", "rpm_limit"),
        ("tenants: [{id: a, rpm_limit: '5'}]", "rpm_limit"),
        ("tenants: [{id: a, rpm_limit: true}]", "rpm_limit"),
        ("tenants: [{id: a, weight: 0}]", "weight"),
        ("tenants: [{id: a, weight: .nan}]", "weight"),
        ("tenants: [{id: a, models: []}]", "models"),
        ("tenants: [{id: a, models: x}]", "models"),
        (f"tenants: [{{id: a, keys: [{{sha256: {KEY}}}]}}]", "not the key"),
        ("tenants: [{id: a, keys: [{}]}]", "keys.0.sha256: is missing"),
        (
            f"tenants: [{{id: a, keys: [{{sha256: {'a' * 64}, expires: soon}}]}}]",
            "keys.0.expires",
        ),
        (
            f"tenants: [{{id: a, keys: [{{sha256: {'a' * 64}, expires: 2030-01-01T00:00:00}}]}}]",
            "zone",
        ),
        (
            f"tenants: [{{id: a, keys: [{{sha256: {'a' * 64}}}, {{sha256: {'a' * 64}}}]}}]",
            "is there twice",
        ),
        ("people: []", "tenants: is missing"),
        ("{tenants: [], people: []}", "people: unknown field"),
        ("tenants", "must hold a mapping"),
    ],
)
def test_wrong_files_are_refused_by_name_without_showing_secrets(tmp_path, text, message):
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_tenants(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("15m", 900), ("12h", 43200), ("90d", 7776000)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "d", "-1d", "1.5h", "0s", "1w", "9" * 20 + "s", "１d"])
def test_wrong_durations(text):
    with pytest.raises(ValueError, match="unit"):
        parse_duration(text)


def test_keys_are_long_random_and_fit_in_a_header():
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(len(key) > 40 and key.isascii() and key.isprintable() for key in keys)
    assert not math.isnan(len(digest("\udcff")))  # odd header bytes have a digest too


def test_the_command_makes_a_key_for_the_file(capsys):
    assert dispatch(["key"]) == 0
    key, sha256 = (line.split()[1] for line in capsys.readouterr().out.splitlines())
    assert digest(key) == sha256
