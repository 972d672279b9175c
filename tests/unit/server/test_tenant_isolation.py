"""Tenants who do not trust each other: who may ask, what exists for whom, and limits."""

from __future__ import annotations

import time
from contextlib import closing

import httpx
import openai
import pytest
from house import ACME, ADMIN, ASK, GLOBEX, House, error_of, write_tenants
from serving import running

from deltaserve.config import EngineConfig, ServerConfig
from deltaserve.server.app import create_app
from deltaserve.server.office import Office
from deltaserve.tenancy.keys import digest

MANAGEMENT = ["/v1/tenants", "/v1/keys", "/v1/audit", "/v1/deltas", "/v1/stats", "/metrics"]


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
