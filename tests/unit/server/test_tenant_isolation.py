"""Tenants who do not trust each other, behind one endpoint."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import openai
import pytest
from conftest import running
from fake_engine import FakeEngine

from deltaserve.config import EngineConfig, ServerConfig, hash_key
from deltaserve.engine.types import FinishReason, TokenEvent
from deltaserve.server.app import create_app
from deltaserve.server.office import Office
from deltaserve.server.tokenizers import Tokenizers
from deltaserve.tenancy.keys import digest

ADMIN = "admin-secret"
ACME, GLOBEX = "sk-acme", "sk-globex"
ASK = {"model": "base", "prompt": "hello", "max_tokens": 5}
MANAGEMENT = ["/v1/tenants", "/v1/keys", "/v1/audit", "/v1/deltas", "/v1/stats", "/metrics"]


def write_tenants(folder: Path, **acme: object) -> str:
    tenants = [
        {"id": "acme", "models": ["chatty", "base"], "weight": 2, "priority": 1, **acme,
         "keys": [{"sha256": digest(ACME)}]},
        {"id": "globex", "models": ["team/*", "base"], "keys": [{"sha256": digest(GLOBEX)}]},
    ]  # fmt: skip
    (folder / "tenants.yaml").write_text(json.dumps({"tenants": tenants}))
    return str(folder / "tenants.yaml")


class House:
    """A server with two tenants and an administrator."""

    def __init__(self, url: str, state: Path, engine: FakeEngine, office: Office) -> None:
        self.url, self.state, self.engine, self.office = url, state, engine, office

    def ask(self, key: str | None, method: str, path: str, **more: object) -> httpx.Response:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.request(method, self.url + path, headers=headers, timeout=10, **more)

    def get(self, key: str | None, path: str) -> httpx.Response:
        return self.ask(key, "GET", path)

    def complete(self, key: str, **changes: object) -> httpx.Response:
        return self.ask(key, "POST", "/v1/completions", json=ASK | changes)

    def records(self) -> list[tuple]:
        query = (
            "SELECT tenant, model, outcome, prompt_tokens, cached_tokens, completion_tokens "
            "FROM usage ORDER BY created"
        )
        with closing(sqlite3.connect(self.state / "accounts.sqlite")) as connection:
            return connection.execute(query).fetchall()

    def eventually(self, count: int) -> list[tuple]:
        deadline = time.monotonic() + 5
        while len(self.records()) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.records()


@contextlib.contextmanager
def opened(folder: Path, engine: FakeEngine, tokenizers: Tokenizers, **acme: object):
    config = ServerConfig(
        EngineConfig("base"),
        tenants=write_tenants(folder, **acme),
        admin_key_sha256=hash_key(ADMIN),
        state_dir=str(folder / "state"),
    )
    with (
        closing(Office.open(config)) as office,
        running(create_app(engine, tokenizers, config, office=office)) as url,
    ):
        yield House(url, folder / "state", engine, office)


@pytest.fixture
def open_house(tmp_path, engine, all_tokenizers):
    """Opens a server; arguments are acme's limits."""
    with contextlib.ExitStack() as stack:
        yield lambda **acme: stack.enter_context(opened(tmp_path, engine, all_tokenizers, **acme))


@pytest.fixture
def house(open_house) -> House:
    return open_house()


@pytest.fixture(scope="module")
def quiet_house(tmp_path_factory, _engine, all_tokenizers) -> Iterator[House]:
    """For tests that are refused, and change nothing."""
    with opened(tmp_path_factory.mktemp("house"), _engine, all_tokenizers) as house:
        yield house


def error_of(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# -- who may ask --------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "sk-wrong", digest(ACME), "key_" + digest(ACME)[:16]])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/usage", "/v1/nope", *MANAGEMENT])
def test_nothing_is_open_without_a_key(quiet_house, key, path):
    assert error_of(quiet_house.get(key, path), 401)["code"] == "invalid_api_key"


def test_health_is_open(quiet_house):
    assert quiet_house.get(None, "/health").status_code == 200
    assert quiet_house.get(None, "/version").status_code == 200


@pytest.mark.parametrize("path", [*MANAGEMENT, "/v1/deltas/x", "/v1/tenants/acme", "/v1%2Fkeys"])
def test_tenants_do_not_manage(quiet_house, path):
    assert "admin key" in error_of(quiet_house.get(ACME, path), 403)["message"]


def test_the_admin_key_does_not_generate(house):
    assert "tenant's key" in error_of(house.complete(ADMIN), 403)["message"]
    assert house.engine.submitted == []
    assert len(house.get(ADMIN, "/v1/models").json()["data"]) == 3


def test_without_an_admin_key_there_are_no_management_routes(tmp_path, engine, all_tokenizers):
    config = ServerConfig(
        EngineConfig("base"), tenants=write_tenants(tmp_path), state_dir=str(tmp_path / "state")
    )
    office = Office.open(config)
    app = create_app(engine, all_tokenizers, config, office=office)
    with running(app) as url, closing(office):
        house = House(url, tmp_path / "state", engine, office)
        assert house.complete(ACME).status_code == 200
        for key, status in ((ACME, 403), (ADMIN, 401), (None, 401)):
            assert house.get(key, "/v1/tenants").status_code == status
    with running(app.router) as url:  # as if the keys were not asked for
        for path in ("/v1/tenants", "/v1/keys", "/v1/audit", "/v1/deltas"):
            assert httpx.get(url + path).status_code == 404


# -- what exists for whom -----------------------------------------------------------------------


def test_a_model_that_a_tenant_may_not_use_does_not_exist_for_him(quiet_house):
    names = {
        key: [card["id"] for card in quiet_house.get(key, "/v1/models").json()["data"]]
        for key in (ACME, GLOBEX)
    }
    assert names == {ACME: ["base", "chatty"], GLOBEX: ["base", "team/grown"]}
    for model in ("team/grown", "team/absent"):
        answers = [
            quiet_house.get(ACME, f"/v1/models/{model}"),
            quiet_house.complete(ACME, model=model),
            quiet_house.ask(ACME, "POST", "/v1/chat/completions",
                      json={"model": model, "messages": [{"role": "user", "content": "x"}]}),
        ]  # fmt: skip
        messages = {error_of(answer, 404)["message"].replace(model, "X") for answer in answers}
        assert messages == {
            "The model 'X' does not exist. GET /v1/models lists those that do: base, chatty."
        }


def test_the_engine_knows_whose_request_it_is(house):
    house.complete(ACME)
    house.complete(ACME, cache_salt="mine", priority=-5)
    house.complete(GLOBEX, cache_salt="mine", priority=3)
    first, salted, other = house.engine.submitted
    assert (first.tenant, first.weight, first.priority) == ("acme", 2.0, 1)
    assert (salted.priority, other.priority) == (1, 3)  # nobody lets himself go before others
    assert other.tenant == "globex"
    assert len({request.cache_salt for request in (first, salted, other)}) == 3
    assert all(len(request.cache_salt) == 64 for request in (first, salted, other))


# -- limits -------------------------------------------------------------------------------------


def test_requests_per_minute(open_house):
    house = open_house(rpm_limit=2)
    assert house.complete(ACME).headers["x-ratelimit-remaining-requests"] == "1"
    assert house.complete(ACME).headers["x-ratelimit-limit-requests"] == "2"
    refused = house.complete(ACME)
    error = error_of(refused, 429)
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert "tenant acme has used its 2 requests per minute" in error["message"]
    assert 58 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert house.complete(GLOBEX).status_code == 200
    assert house.get(ACME, "/v1/models").status_code == 200  # asking is free
    assert len(house.engine.submitted) == 3


def test_tokens_are_set_aside_and_what_was_not_used_is_given_back(open_house):
    house = open_house(tpm_limit=50)
    tokens = len(house.complete(GLOBEX, prompt="hello").json()["choices"][0]["text"])  # warm
    assert tokens
    prompt = [5, 6, 7]
    answer = house.complete(ACME, prompt=prompt, max_tokens=40)
    used = answer.json()["usage"]["total_tokens"]
    assert used == 7  # the echo and its end
    assert answer.headers["x-ratelimit-remaining-tokens"] in ("7", "43")
    assert house.get(ACME, "/v1/models").headers["x-ratelimit-remaining-tokens"] == "43"
    refused = house.complete(ACME, prompt=prompt, max_tokens=41)
    message = error_of(refused, 429)["message"]
    assert "50 tokens per minute, 7 of them used or reserved" in message
    assert "up to 44" in message
    assert int(refused.headers["retry-after"]) > 50
    assert house.complete(ACME, prompt=prompt, max_tokens=40).status_code == 200


def test_all_choices_are_set_aside(open_house):
    house = open_house(tpm_limit=50)
    assert house.complete(ACME, prompt=[[5, 6]] * 2, n=3, max_tokens=8).status_code == 429
    assert house.complete(ACME, prompt=[[5, 6]] * 2, n=3, max_tokens=7).status_code == 200


def test_what_can_never_fit_is_not_to_be_tried_again(open_house):
    house = open_house(tpm_limit=50)
    refused = house.complete(ACME, max_tokens=100)
    error_of(refused, 429)
    assert refused.headers["x-should-retry"] == "false"
    assert "retry-after" not in refused.headers
    with (
        openai.OpenAI(base_url=f"{house.url}/v1", api_key=ACME, max_retries=5) as client,
        pytest.raises(openai.RateLimitError, match="50 tokens per minute"),
    ):
        client.completions.create(**ASK | {"max_tokens": 100})


@pytest.mark.parametrize("period", ["daily", "monthly"])
def test_a_budget_lasts_across_a_restart(open_house, period):
    house = open_house(**{f"{period}_token_budget": 30})
    assert house.complete(ACME, prompt=[5, 6, 7], max_tokens=20).json()["usage"][
        "total_tokens"
    ] == 7  # fmt: skip
    again = open_house(**{f"{period}_token_budget": 30})
    assert again.complete(ACME, prompt=[5, 6, 7], max_tokens=21).status_code == 429
    assert again.complete(ACME, prompt=[5, 6, 7], max_tokens=20).status_code == 200
    error = error_of(again.complete(ACME, prompt=[5, 6, 7], max_tokens=20), 429)
    assert error["code"] == "insufficient_quota"
    assert f"budget of 30 tokens a {'day' if period == 'daily' else 'month'}" in error["message"]


def test_requests_at_a_time_are_free_again_when_they_end_or_their_client_leaves(open_house):
    house = open_house(max_parallel_requests=1)
    house.engine.pause = 0.3
    headers = {"authorization": f"Bearer {ACME}"}
    body = ASK | {"stream": True, "prompt": [5] * 90, "max_tokens": 90}
    with httpx.stream("POST", f"{house.url}/v1/completions", json=body, headers=headers) as held:
        lines = held.iter_lines()
        next(lines)
        assert "requests at a time" in error_of(house.complete(ACME), 429)["message"]
        assert house.complete(GLOBEX).status_code == 200
    deadline = time.monotonic() + 10
    house.engine.pause = 0.0
    while house.complete(ACME, max_tokens=1).status_code == 429:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_refused_or_wrong_request_holds_nothing(open_house):
    house = open_house(max_parallel_requests=1, tpm_limit=50)
    for changes in ({"max_tokens": 100}, {"prompt": ""}, {"model": "nope"}, {"n": 0}):
        assert house.complete(ACME, **changes).status_code in (400, 404, 429)
    house.engine.dead = True
    assert house.complete(ACME, max_tokens=40).status_code == 503
    house.engine.dead = False
    assert house.complete(ACME, prompt=[5], max_tokens=44).status_code == 200


# -- usage --------------------------------------------------------------------------------------


def test_each_finished_request_has_a_record(house):
    house.complete(ACME, prompt=[5, 6, 7], max_tokens=20)
    house.complete(GLOBEX, model="team/grown", prompt=[[5, 6], [7]], n=2, max_tokens=2, user="u")
    assert house.records() == [
        ("acme", "base", "ok", 3, 0, 4),
        ("globex", "team/grown", "ok", 3, 0, 8),
    ]


def test_a_stream_does_not_end_before_its_record_is_kept(house):
    headers = {"authorization": f"Bearer {ACME}"}
    body = ASK | {"stream": True, "prompt": [5, 6, 7], "max_tokens": 20}
    with httpx.stream("POST", f"{house.url}/v1/completions", json=body, headers=headers) as answer:
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                assert house.records() == [("acme", "base", "ok", 3, 0, 4)]
                return
    raise AssertionError("the stream did not end")


def test_what_a_client_that_leaves_has_used_is_recorded_once(house):
    house.engine.pause = 0.05
    headers = {"authorization": f"Bearer {ACME}"}
    body = ASK | {"stream": True, "prompt": [5] * 20, "max_tokens": 20}
    with httpx.stream("POST", f"{house.url}/v1/completions", json=body, headers=headers) as answer:
        next(answer.iter_lines())
    (record,) = house.eventually(1)
    assert record[:5] == ("acme", "base", "cancelled", 20, 0)
    assert 1 <= record[5] < 20
    time.sleep(0.2)
    assert len(house.records()) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_failed_at_is_recorded_as_such(house, stream):
    def fail(request):
        yield TokenEvent(request.request_id, (5,))
        yield TokenEvent(request.request_id, (), FinishReason.ERROR, "out of luck")

    house.engine.script = fail
    house.complete(ACME, prompt=[5, 6], stream=stream)
    assert house.eventually(1) == [("acme", "base", "error", 0, 0, 0)]


def test_what_the_engine_does_not_take_is_not_recorded(house):
    house.engine.dead = True
    assert house.complete(ACME, n=2).status_code == 503
    house.engine.dead = False
    house.complete(GLOBEX)
    assert [record[0] for record in house.eventually(1)] == ["globex"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_recorded_is_not_answered(house, stream, monkeypatch):
    house.office.usage._connection.execute("PRAGMA query_only = 1")
    answer = house.complete(ACME, stream=stream)
    if stream:
        assert "could not be recorded" in answer.text
        assert "[DONE]" not in answer.text
    else:
        assert "could not be recorded" in error_of(answer, 503)["message"]
        assert "choices" not in answer.text


def test_usage_is_told_to_those_whose_it_is(house):
    house.complete(ACME, prompt=[5, 6, 7], max_tokens=20)
    house.complete(GLOBEX, prompt=[5], max_tokens=20)
    today = time.strftime("%Y-%m-%d", time.gmtime())
    row = {"day": today, "tenant": "acme", "model": "base", "requests": 1, "prompt_tokens": 3,
           "cached_tokens": 0, "completion_tokens": 4}  # fmt: skip
    for query in ("", "?tenant=globex", "?tenant=acme"):  # whatever he asks for
        assert house.get(ACME, f"/v1/usage{query}").json()["data"] == [row]
    everybody = house.get(ADMIN, "/v1/usage?group_by=tenant").json()["data"]
    assert [(r["tenant"], r["requests"]) for r in everybody] == [("acme", 1), ("globex", 1)]
    assert house.get(ADMIN, "/v1/usage?last_day=2020-01-01").json()["data"] == []
    answer = house.get(ADMIN, "/v1/usage?format=csv&tenant=acme")
    assert answer.headers["content-type"].startswith("text/csv")
    assert list(csv.DictReader(io.StringIO(answer.text))) == [
        {name: str(value) for name, value in row.items()}
    ]


@pytest.mark.parametrize(
    "query", ["group_by=nope", "first_day=yesterday", "first_day=20300101", "format=xml"]
)
def test_wrong_questions_about_usage(quiet_house, query):
    assert (
        error_of(quiet_house.get(ADMIN, f"/v1/usage?{query}"), 400)["param"] == query.split("=")[0]
    )


# -- management ---------------------------------------------------------------------------------


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
