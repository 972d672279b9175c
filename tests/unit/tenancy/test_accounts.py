"""Tenants and keys: made, rotated, revoked, kept across a restart; and whose salt is whose."""

from __future__ import annotations

import sqlite3
import stat

import pytest

from deltaserve.errors import (
    AuthenticationError,
    ConfigError,
    ConflictError,
    ForbiddenError,
    NotFoundError,
    RequestError,
)
from deltaserve.tenancy import audit
from deltaserve.tenancy.accounts import Accounts
from deltaserve.tenancy.keys import Key, KeyRing, digest
from deltaserve.tenancy.tenants import FileTenant, KeySettings

HOUR = 3600.0
ADMIN = "admin"
FILE_KEY = "sk-from-the-file"


class Clock:
    now = 1_900_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "accounts.sqlite"


@pytest.fixture
def accounts(path, clock):
    accounts = Accounts(path, wall=clock)
    yield accounts
    accounts.close()


@pytest.fixture
def acme(accounts):
    return accounts.create_tenant({"id": "acme", "rpm_limit": 5}, ADMIN)


def refused(accounts, secret):
    with pytest.raises(AuthenticationError) as caught:
        accounts.authenticate(secret)
    return str(caught.value)


def test_a_key_opens_its_tenant_and_is_kept_as_a_digest_only(accounts, acme, path):
    secret, key = accounts.create_key("acme", {"key_alias": "ci"}, ADMIN)
    caller = accounts.authenticate(secret)
    assert (caller.tenant, caller.key) == (acme, key)
    assert key.sha256 == digest(secret)
    for file in path.parent.iterdir():
        assert secret.encode() not in file.read_bytes()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("sent", ["", "sk-ds-", "x" * 5000, "Ünïcode", "\udcff", "0" * 64])
def test_what_is_no_key_opens_nothing(accounts, acme, sent):
    accounts.create_key("acme", {}, ADMIN)
    assert "Missing or wrong API key" in refused(accounts, sent)


def test_the_digest_of_a_key_is_no_key(accounts, acme):
    _, key = accounts.create_key("acme", {}, ADMIN)
    refused(accounts, key.sha256)
    refused(accounts, key.id)


def test_the_place_of_a_key_in_the_table_cannot_be_known_outside():
    key = Key("acme", digest("secret"), KeySettings())
    rings = [KeyRing([key]) for _ in range(2)]
    assert all(ring.find("secret") == key for ring in rings)
    places = [next(iter(ring._keys)) for ring in rings]
    assert places[0] != places[1]
    assert bytes.fromhex(key.sha256) not in places


def test_keys_expire(accounts, acme, clock):
    secret, _ = accounts.create_key("acme", {"duration": "1h"}, ADMIN)
    clock.now += HOUR - 1
    accounts.authenticate(secret)
    clock.now += 1
    assert "expired" in refused(accounts, secret)


def test_rotation_lets_both_keys_work_for_a_while(accounts, acme, clock):
    old, key = accounts.create_key("acme", {"key_alias": "prod", "rpm_limit": 3}, ADMIN)
    new, rotated = accounts.rotate_key(key.id, HOUR, ADMIN)
    assert rotated.settings == key.settings
    assert accounts.authenticate(old).tenant == accounts.authenticate(new).tenant
    clock.now += HOUR
    assert "expired" in refused(accounts, old)
    accounts.authenticate(new)
    with pytest.raises(ConflictError, match="expired"):
        accounts.rotate_key(key.id, HOUR, ADMIN)


def test_rotation_does_not_lengthen_a_life(accounts, acme, clock):
    old, key = accounts.create_key("acme", {"duration": "1m"}, ADMIN)
    new, _ = accounts.rotate_key(key.id, HOUR, ADMIN)
    clock.now += 60
    refused(accounts, old)
    refused(accounts, new)


def test_a_revoked_key_ends_at_once_and_stays_in_the_list(accounts, acme):
    secret, key = accounts.create_key("acme", {}, ADMIN)
    accounts.revoke_key(key.id, ADMIN)
    refused(accounts, secret)
    assert [listed.id for listed in accounts.keys("acme")] == [key.id]


@pytest.mark.parametrize("level", ["tenant", "key"])
def test_blocking_is_undone_by_unblocking(accounts, acme, level):
    secret, key = accounts.create_key("acme", {}, ADMIN)
    update = accounts.update_tenant if level == "tenant" else accounts.update_key
    name = "acme" if level == "tenant" else key.id
    update(name, {"blocked": True}, ADMIN)
    with pytest.raises(ForbiddenError):
        accounts.authenticate(secret)
    update(name, {"blocked": False}, ADMIN)
    accounts.authenticate(secret)


def test_a_model_must_be_allowed_by_tenant_and_key(accounts):
    accounts.create_tenant({"id": "acme", "models": ["acme-*", "base"]}, ADMIN)
    secret, _ = accounts.create_key("acme", {"models": ["*-chat", "globex-*"]}, ADMIN)
    caller = accounts.authenticate(secret)
    names = ["acme-chat", "acme-sql", "base", "globex-chat", "ACME-chat"]
    assert [name for name in names if caller.allows(name)] == ["acme-chat"]


def test_a_keys_priority_wins(accounts, acme):
    accounts.update_tenant("acme", {"priority": 5}, ADMIN)
    plain, _ = accounts.create_key("acme", {}, ADMIN)
    urgent, _ = accounts.create_key("acme", {"priority": 0}, ADMIN)
    assert accounts.authenticate(plain).priority == 5
    assert accounts.authenticate(urgent).priority == 0


def test_salts_are_shared_only_where_that_was_asked_for(accounts):
    salts = {}
    for tenant, group in (("a", None), ("b", None), ("c", "shared"), ("d", "shared")):
        accounts.create_tenant({"id": tenant, "cache_salt": group}, ADMIN)
        for alias, salt in (("plain", None), ("also", None), ("own", "shared"), ("same", "a")):
            secret, _ = accounts.create_key(tenant, {"cache_salt": salt}, ADMIN)
            salts[tenant, alias] = accounts.authenticate(secret).salt
    for tenant in "abcd":
        assert salts[tenant, "plain"] == salts[tenant, "also"]
    assert salts["c", "plain"] == salts["d", "plain"]
    distinct = {salts[t, alias] for t in "abcd" for alias in ("plain", "own", "same")}
    assert len(distinct) == 12 - 1


def test_no_salt_of_a_request_leads_out_of_its_tenants(accounts):
    callers = []
    for tenant in ("a", "b"):
        accounts.create_tenant({"id": tenant}, ADMIN)
        secret, _ = accounts.create_key(tenant, {}, ADMIN)
        callers.append(accounts.authenticate(secret))
    a, b = callers
    for asked in ("", "x", a.salt, b.salt, '"b"', "own"):
        assert accounts.salt(a, asked) not in {a.salt, b.salt, accounts.salt(b, asked)}
        assert accounts.salt(a, asked) == accounts.salt(a, asked)
    assert accounts.salt(a, None) == a.salt


def test_everything_survives_a_restart(accounts, acme, path, clock):
    secret, key = accounts.create_key("acme", {"duration": "1h", "tpm_limit": 9}, ADMIN)
    gone, revoked = accounts.create_key("acme", {}, ADMIN)
    accounts.revoke_key(revoked.id, ADMIN)
    accounts.update_tenant("acme", {"weight": 3, "rpm_limit": None}, ADMIN)
    accounts.close()
    again = Accounts(path, wall=clock)
    caller = again.authenticate(secret)
    assert (caller.tenant.weight, caller.tenant.rpm_limit) == (3.0, None)
    assert caller.key == key
    refused(again, gone)
    again.close()


def test_deleting_a_tenant_takes_its_keys(accounts, acme):
    secret, _ = accounts.create_key("acme", {}, ADMIN)
    accounts.delete_tenant("acme", ADMIN)
    refused(accounts, secret)
    assert accounts.tenants() == accounts.keys() == []


def test_the_files_tenants_are_changed_in_the_file_only(path, clock):
    listed = FileTenant(id="acme", rpm_limit=7, keys=[{"sha256": digest(FILE_KEY)}])
    accounts = Accounts(path, [listed], wall=clock)
    caller = accounts.authenticate(FILE_KEY)
    assert caller.tenant.rpm_limit == 7
    for change in (
        lambda: accounts.update_tenant("acme", {"rpm_limit": 9}, ADMIN),
        lambda: accounts.delete_tenant("acme", ADMIN),
        lambda: accounts.revoke_key(caller.key.id, ADMIN),
        lambda: accounts.rotate_key(caller.key.id, HOUR, ADMIN),
        lambda: accounts.update_key(caller.key.id, {"rpm_limit": 1}, ADMIN),
    ):
        with pytest.raises(ConflictError, match="change it there"):
            change()
    made, _ = accounts.create_key("acme", {}, ADMIN)
    accounts.close()
    without = Accounts(path, wall=clock)  # the tenant was taken out of the file
    for secret in (FILE_KEY, made):
        refused(without, secret)
    without.close()


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda a: a.create_tenant({"id": "acme"}, ADMIN), ConflictError),
        (lambda a: a.create_tenant({"id": "no/slash"}, ADMIN), RequestError),
        (lambda a: a.create_tenant({"id": "x", "keys": []}, ADMIN), RequestError),
        (lambda a: a.create_tenant({"id": "x", "id2": 5}, ADMIN), RequestError),
        (lambda a: a.update_tenant("acme", {"rpm_limit": -1}, ADMIN), RequestError),
        (lambda a: a.update_tenant("acme", {"id": "globex"}, ADMIN), RequestError),
        (lambda a: a.update_tenant("nobody", {}, ADMIN), NotFoundError),
        (lambda a: a.create_key("nobody", {}, ADMIN), NotFoundError),
        (lambda a: a.create_key("acme", {"duration": "soon"}, ADMIN), RequestError),
        (lambda a: a.create_key("acme", {"weight": 2}, ADMIN), RequestError),
        (lambda a: a.revoke_key("key_0", ADMIN), NotFoundError),
    ],
)
def test_refused_changes_change_nothing(accounts, acme, path, change, kind):
    before = accounts.tenants(), accounts.keys(), audit.read(path, limit=10)
    with pytest.raises(kind):
        change(accounts)
    assert (accounts.tenants(), accounts.keys(), audit.read(path, limit=10)) == before


def test_the_audit_tells_every_change_and_no_secret(accounts, acme, path):
    secret, key = accounts.create_key("acme", {"key_alias": "ci"}, "admin")
    accounts.update_tenant("acme", {"rpm_limit": 8}, "key_of_jane")
    accounts.rotate_key(key.id, 0, "admin")
    accounts.note("admin", "publish", "delta/sql", None, {"version": 1})
    lines = audit.read(path, limit=10)
    assert [line["action"] for line in lines] == [
        "publish", f"rotate {key.id}", "update_tenant", "create_key", "create_tenant",
    ]  # fmt: skip
    update = lines[2]
    assert (update["actor"], update["object"]) == ("key_of_jane", "acme")
    assert (update["before"]["rpm_limit"], update["after"]["rpm_limit"]) == (5, 8)
    assert [line["id"] for line in audit.read(path, limit=2, before_id=lines[1]["id"])] == [
        lines[2]["id"], lines[3]["id"],
    ]  # fmt: skip
    assert secret not in str(lines)


def test_a_database_of_a_newer_version_is_refused(path, clock):
    Accounts(path, wall=clock).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match="newer DeltaServe"):
        Accounts(path)


def test_a_file_that_is_no_database_is_refused(path):
    path.parent.mkdir()
    path.write_text("not a database, but long enough to look like one " * 50)
    with pytest.raises(ConfigError, match="cannot be used"):
        Accounts(path)
