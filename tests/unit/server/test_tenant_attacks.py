"""What a tenant may try against another over HTTP, beside asking for his models by name."""

from __future__ import annotations

import contextlib
import socket
import time

import httpx
import pytest
from house import ACME, ADMIN, GLOBEX, error_of

from deltaserve.tenancy import limits

FOREIGN, ABSENT = "team/grown", "team/absent"
SAY = [{"role": "user", "content": "x"}]
STRANGE = [
    "tenant",
    "tenant-id",
    "user",
    "user-id",
    "forwarded-user",
    "deltaserve-tenant",
    "request-id",
]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/completions", {"prompt": [5]}),
        ("POST", "/v1/completions", {"prompt": [5], "stream": True}),
        ("POST", "/v1/chat/completions", {"messages": SAY, "stream": True}),
        ("POST", "/v1/embeddings", {"input": "x"}),
        ("POST", "/tokenize", {"prompt": "x"}),
        ("POST", "/v1/tokenize", {"messages": SAY}),
        ("POST", "/detokenize", {"tokens": [5]}),
        ("GET", "/tokenizer_info", None),
    ],
)  # fmt: skip
def test_a_foreign_model_answers_as_one_that_is_not_there(quiet_house, engine, method, path, body):
    answers = []
    for model in (FOREIGN, ABSENT):
        more = {"params": {"model": model}} if body is None else {"json": {"model": model, **body}}
        answers.append(quiet_house.ask(ACME, method, path, **more))
    first, second = answers
    assert error_of(first, 404)["code"] == "model_not_found"
    assert first.text.replace(FOREIGN, "X") == second.text.replace(ABSENT, "X")
    unlike = {"date", "x-request-id", "content-length"}
    assert {k: v for k, v in first.headers.items() if k not in unlike} == {
        k: v for k, v in second.headers.items() if k not in unlike
    }
    assert engine.submitted == []


def test_whose_a_request_is_says_its_key_alone(house):
    headers = {f"x-{name}": "acme" for name in STRANGE}
    headers |= {"authorization": f"Bearer {GLOBEX}", "openai-organization": "acme"}
    body = {"model": "base", "prompt": [5], "max_tokens": 1, "user": "acme"}
    answer = httpx.post(
        f"{house.url}/v1/completions?tenant=acme&key={ACME}", headers=headers, json=body
    )
    assert answer.status_code == 200
    assert [request.tenant for request in house.engine.submitted] == ["globex"]
    assert [record[0] for record in house.records()] == ["globex"]
    asked = httpx.get(f"{house.url}/v1/usage?tenant=acme", headers=headers)
    assert "acme" not in asked.text.replace("tenant=acme", "")


def test_an_id_is_never_the_clients(house):
    """Else one could abort, or be answered with, what another has asked."""
    answers = [
        house.ask(key, "POST", "/v1/completions", json={"model": "base", "prompt": [5]},
                  )
        for key in (ACME, GLOBEX)
    ]  # fmt: skip
    headers = {"authorization": f"Bearer {GLOBEX}", "x-request-id": answers[0].json()["id"]}
    again = httpx.post(
        f"{house.url}/v1/completions", headers=headers, json={"model": "base", "prompt": [5]}
    )
    ids = {answer.json()["id"] for answer in (*answers, again)}
    assert len(ids) == 3
    assert len({request.request_id for request in house.engine.submitted}) == 3
    named = house.complete(GLOBEX, request_id="mine")
    assert error_of(named, 400)["param"] == "request_id"
    for known in (answers[0].json()["id"], answers[0].headers["x-request-id"]):
        for method, path in (
            ("GET", f"/v1/completions/{known}"), ("GET", f"/v1/chat/completions/{known}"),
            ("GET", f"/v1/responses/{known}"), ("POST", f"/v1/responses/{known}/cancel"),
            ("DELETE", f"/v1/completions/{known}"), ("POST", f"/v1/abort/{known}"),
            ("POST", "/abort_requests"),
        ):  # fmt: skip
            assert house.ask(GLOBEX, method, path).status_code in (404, 405)
    assert house.engine.aborted == []


def test_what_is_left_of_anothers_limits_is_not_told(open_house):
    house = open_house(rpm_limit=5, tpm_limit=500)
    assert "x-ratelimit-limit-requests" in house.complete(ACME).headers
    for answer in (house.complete(GLOBEX), house.complete(GLOBEX, model="chatty")):
        assert [name for name in answer.headers if name.startswith("x-ratelimit")] == []


def raw(url: str, target: str, *headers: str) -> bytes:
    """The whole answer to a request line that no client library would send."""
    host, port = url.removeprefix("http://").split(":")
    lines = [f"GET {target} HTTP/1.1", "host: x", "connection: close", *headers, "", ""]
    answer = b""
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall("\r\n".join(lines).encode("latin-1"))
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                answer += part
    return answer


@pytest.mark.parametrize("managed", ["tenants", "keys", "audit", "deltas", "stats"])
@pytest.mark.parametrize(
    "target",
    ["//v1/{}", "/v1//{}", "/v1/./{}", "/v1/x/../{}", "/V1/{}", "/v1/{}/", "/v1/{}%2f", "/v1/{};x",
     "/%76%31/{}", "/v1%2f{}", "/v1/%2e/{}", "/x/../v1/{}", "/console/../v1/{}", "/v1/models/../{}",
     "/v1/{}%00", "/v1/{}?x=/v1/models", "http://x/v1/{}", "/v1/models/%2e%2e/{}", "/v1\\{}",
     "/v1/{}#x"],
)  # fmt: skip
def test_no_spelling_of_an_address_leads_to_management(quiet_house, target, managed):
    for key in (ACME, ""):
        head = f"authorization: Bearer {key}", "x-original-url: /v1/models"
        answer = raw(quiet_house.url, target.format(managed), *head)
        status = int(answer.split(b" ", 2)[1])
        assert status in (400, 401, 403, 404), answer
        assert b"globex" not in answer
    known = raw(quiet_house.url, f"/v1/{managed}", f"authorization: Bearer {ADMIN}")
    assert b" 200 " in known.partition(b"\r\n")[0]


@pytest.mark.parametrize(
    "sent",
    [f"authorization: bearer {ADMIN}x", f"authorization: Basic {ADMIN}", f"authorization: {ADMIN}",
     f"x-api-key: {ADMIN}", f"cookie: key={ADMIN}", f"api-key: {ADMIN}", "authorization: Bearer",
     "authorization: Bearer " + "x" * 8000,
     f"authorization: Bearer {ACME}\r\nauthorization: Bearer {ADMIN}"],
)  # fmt: skip
def test_a_key_counts_where_it_belongs_and_nowhere_else(quiet_house, sent):
    status = int(raw(quiet_house.url, "/v1/tenants", sent).split(b" ", 2)[1])
    assert status in (400, 401, 403)


def test_bodies_that_do_not_end_fill_no_memory(house, monkeypatch):
    monkeypatch.setattr(limits, "MAX_HELD_BYTES", 10_000)
    host, port = house.url.removeprefix("http://").split(":")
    large = {"prompt": "x" * 11_000, "max_tokens": 5}
    with socket.create_connection((host, int(port))) as slow:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ACME}\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 20000\r\n\r\n"
        slow.sendall(head.encode() + b'{"prompt": "' + b"x" * 9_980)
        wait_until(lambda: house.complete(ACME).status_code == 429)
        assert "bytes in progress" in error_of(house.complete(ACME), 429)["message"]
        assert house.complete(ACME).headers["retry-after"] == "1"
        assert house.complete(GLOBEX).status_code == 200
        assert "context length" in error_of(house.complete(GLOBEX, **large), 400)["message"]
    wait_until(lambda: house.complete(ACME).status_code == 200)  # the connection has ended
    assert "context length" in error_of(house.complete(ACME, **large), 400)["message"]


def wait_until(holds):
    deadline = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < deadline
