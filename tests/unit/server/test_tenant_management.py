"""The administrator's routes for tenants and keys."""

from __future__ import annotations

import json

import httpx
import pytest
from house import ADMIN, error_of


def test_a_tenant_from_its_making_to_its_end(house):
    def admin(method, path, status=200, **more):
        answer = house.ask(ADMIN, method, path, **more)
        assert answer.status_code == status, answer.text
        return answer.json()

    made = admin("POST", "/v1/tenants", 201, json={"id": "initech", "rpm_limit": 100})
    assert (made["rpm_limit"], made["source"]) == (100, "api")
    key = admin("POST", "/v1/tenants/initech/keys", 201, json={"key_alias": "ci", "rpm_limit": 1})
    assert house.complete(key["key"]).status_code == 200
    refused = house.complete(key["key"])
    assert f"key {key['id']} has used" in error_of(refused, 429)["message"]
    assert refused.headers["x-ratelimit-limit-requests"] == "1"
    admin("PATCH", f"/v1/keys/{key['id']}", json={"rpm_limit": None})
    assert house.complete(key["key"]).status_code == 200
    new = admin("POST", f"/v1/keys/{key['id']}/rotate?overlap=1h", 201)
    assert house.complete(key["key"]).status_code == house.complete(new["key"]).status_code == 200
    admin("DELETE", f"/v1/keys/{key['id']}")
    assert house.complete(key["key"]).status_code == 401
    admin("PATCH", "/v1/tenants/initech", json={"models": ["team/*"]})
    assert house.complete(new["key"]).status_code == 404
    listed = admin("GET", "/v1/keys?tenant=initech")["data"]
    assert [card["key_alias"] for card in listed] == ["ci", "ci"]
    assert not any("key" in card or "sha256" in card for card in listed)
    admin("DELETE", "/v1/tenants/initech")
    assert house.complete(new["key"]).status_code == 401
    actions = [line["action"] for line in admin("GET", "/v1/audit")["data"]]
    assert actions[0] == "delete_tenant"
    assert actions[-1] == "create_tenant"
    audit = json.dumps(admin("GET", "/v1/audit"))
    assert key["key"] not in audit
    assert new["key"] not in audit


def test_a_new_key_is_not_to_be_cached(quiet_house):
    answer = quiet_house.ask(ADMIN, "POST", "/v1/tenants/acme/keys", json={})
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/tenants", {"id": "acme"}, 409),
        ("POST", "/v1/tenants", {"id": "x", "rpm": 5}, 400),
        ("POST", "/v1/tenants", [], 400),
        ("POST", "/v1/tenants", {"id": "x", "weight": "1"}, 400),
        ("PATCH", "/v1/tenants/acme", {"rpm_limit": 5}, 409),
        ("PATCH", "/v1/tenants/nope", {}, 404),
        ("DELETE", "/v1/tenants/acme", None, 409),
        ("POST", "/v1/tenants/nope/keys", {}, 404),
        ("POST", "/v1/tenants/acme/keys", {"duration": "5"}, 400),
        ("POST", "/v1/keys/key_1/rotate", None, 404),
        ("POST", "/v1/keys/key_1/rotate?overlap=x", None, 400),
        ("DELETE", "/v1/keys/key_1", None, 404),
        ("GET", "/v1/audit?limit=0", None, 400),
        ("GET", "/v1/audit?limit=x", None, 400),
        ("GET", f"/v1/audit?before={10**30}", None, 400),
        ("GET", f"/v1/audit?before=-{10**30}", None, 400),
        ("GET", "/v1/tenants/nope", None, 404),
    ],
)
def test_wrong_management(quiet_house, method, path, body, status):
    more = {} if body is None else {"json": body}
    error_of(quiet_house.ask(ADMIN, method, path, **more), status)


def test_management_needs_json(quiet_house):
    answer = quiet_house.ask(ADMIN, "POST", "/v1/tenants", content=b'{"id": "x"}')
    error_of(answer, 415)
    kind = {"content-type": "application/json", "authorization": f"Bearer {ADMIN}"}
    for body in (b"", b"{", b'{"id": NaN}', b"[" * 100_000, b'{"id": "\\ud800"}'):
        answer = httpx.post(f"{quiet_house.url}/v1/tenants", content=body, headers=kind)
        error_of(answer, 400)
