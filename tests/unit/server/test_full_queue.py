"""Too many requests: refused at once, with the time after which to return; and what n shares."""

from __future__ import annotations

import openai
import pytest

from deltaserve.errors import QueueFullError

COMPLETION = {"model": "base", "prompt": "hello"}


def fill(engine, monkeypatch, after=0):
    """The engine takes so many requests and refuses the rest."""
    submit = engine.submit

    def refuse(request):
        if len(engine.submitted) >= after:
            raise QueueFullError("the queue is full: 9 requests wait", retry_after_s=7)
        submit(request)

    monkeypatch.setattr(engine, "submit", refuse)


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_429_and_says_when_to_return(http, engine, monkeypatch, stream):
    fill(engine, monkeypatch)
    response = http.post("/v1/completions", json=COMPLETION | {"stream": stream})
    assert response.status_code == 429
    assert response.headers["retry-after"] == "7"
    assert response.json()["error"] == {
        "message": "the queue is full: 9 requests wait",
        "type": "rate_limit_error",
        "param": None,
        "code": "rate_limit_exceeded",
    }


def test_the_official_client_knows_it_as_its_rate_limit_error(client, engine, monkeypatch):
    fill(engine, monkeypatch)
    with pytest.raises(openai.RateLimitError, match="the queue is full"):
        client.completions.create(**COMPLETION)


def test_all_choices_are_queued_or_none(http, engine, monkeypatch):
    fill(engine, monkeypatch, after=2)
    assert http.post("/v1/completions", json=COMPLETION | {"n": 3}).status_code == 429
    assert set(engine.aborted) == {request.request_id for request in engine.submitted}
    assert len(engine.submitted) == 2


def test_choices_of_one_prompt_are_siblings_of_its_first(http, engine):
    body = {"model": "base", "prompt": ["one", "two"], "n": 3}
    assert http.post("/v1/completions", json=body).status_code == 200
    first = {tuple(r.prompt_ids): r.request_id for r in engine.submitted if r.fork_of is None}
    assert len(first) == 2
    siblings = [request for request in engine.submitted if request.fork_of is not None]
    assert len(siblings) == 4
    assert all(request.fork_of == first[tuple(request.prompt_ids)] for request in siblings)
