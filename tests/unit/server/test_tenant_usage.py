"""What a tenant used: recorded before the answer ends, and told to whose it is."""

from __future__ import annotations

import csv
import io
import time

import httpx
import pytest
from house import ACME, ADMIN, ASK, GLOBEX, error_of

from deltaserve.engine.types import FinishReason, TokenEvent


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


@pytest.mark.parametrize("stream", [False, True])
def test_answers_whose_grammar_turns_out_to_have_no_end_are_refused_and_paid_for(house, stream):
    def dead_end(request):
        yield TokenEvent(request.request_id, (5,))
        yield TokenEvent(request.request_id, (), FinishReason.REFUSED, "no token fits")

    house.engine.script = dead_end
    answer = house.complete(ACME, prompt=[5, 6], stream=stream)
    if stream:
        assert "no token fits" in answer.text
        assert "[DONE]" not in answer.text
    else:
        assert error_of(answer, 400)["message"] == "no token fits"
    assert house.eventually(1) == [("acme", "base", "cancelled", 2, 0, 1)]


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
    "query",
    [
        "group_by=nope", "group_by=day,tenant,day", "group_by=" + "day," * 3000,
        "first_day=yesterday", "first_day=20300101", "format=xml",
    ],
)  # fmt: skip
def test_wrong_questions_about_usage(quiet_house, query):
    assert (
        error_of(quiet_house.get(ADMIN, f"/v1/usage?{query}"), 400)["param"] == query.split("=")[0]
    )
