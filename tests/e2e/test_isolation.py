"""Two tenants who do not trust each other, on one model of a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from deltaserve.tenancy.keys import digest
from tests.tenancy_server import ACME, ADMIN, GLOBEX, Serving, make_base

SECRET = "the vault opens at nine: " * 4
TENANTS = {
    "tenants": [
        {"id": "acme", "keys": [{"sha256": digest(ACME)}]},
        {"id": "globex", "keys": [{"sha256": digest(GLOBEX)}]},
    ]
}


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    root = tmp_path_factory.mktemp("isolation")
    make_base(root / "base")
    (root / "deltas").mkdir()
    (root / "tenants.yaml").write_text(json.dumps(TENANTS))
    serving = Serving(root)
    yield serving
    serving.stop()


def ask(
    serving: Serving, key: str, path: str = "/v1/completions", **body: object
) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}", "x-request-id": "the-same"}
    body = {"model": "base", "max_tokens": 1, "temperature": 0} | body
    return httpx.post(serving.url + path, headers=headers, json=body, timeout=60)


def cached(serving: Serving, key: str, prompt: str = SECRET, **body: object) -> int:
    usage = ask(serving, key, prompt=prompt, **body).raise_for_status().json()["usage"]
    return usage["prompt_tokens_details"]["cached_tokens"]


def test_nobody_sees_what_another_has_asked(serving):
    """Neither in ``cached_tokens`` nor in the time that computing the prompt takes: where nothing
    is found in the cache, all of it is computed."""
    assert cached(serving, ACME) == 0
    assert cached(serving, ACME) > 0
    assert cached(serving, GLOBEX) == 0
    assert cached(serving, GLOBEX) > 0
    for salt in ("x", "acme", "0" * 20):  # whatever is guessed of the other's
        assert cached(serving, ACME, cache_salt=salt, prompt=f"{salt}:{SECRET}") == 0
        assert cached(serving, ACME, cache_salt=salt, prompt=f"{salt}:{SECRET}") > 0
        assert cached(serving, GLOBEX, cache_salt=salt, prompt=f"{salt}:{SECRET}") == 0
    # Not through a chat that makes the same tokens either, nor through choices of one prompt.
    said = {"messages": [{"role": "user", "content": SECRET}]}
    for key in (ACME, GLOBEX):
        answer = ask(serving, key, "/v1/chat/completions", n=2, **said).raise_for_status().json()
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_leaving_ends_nobody_elses_answer(serving):
    """Both send the same id; one leaves, again and again."""
    long = {"max_tokens": 60, "ignore_eos": True, "prompt": "add: 1+2"}
    alone = ask(serving, GLOBEX, **long).json()["choices"][0]["text"]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, serving, GLOBEX, **long)
        while not asked.done():
            headers = {"authorization": f"Bearer {ACME}", "x-request-id": "the-same"}
            body = {"model": "base", "stream": True, **long}
            url = f"{serving.url}/v1/completions"
            with httpx.stream("POST", url, headers=headers, json=body, timeout=60) as answer:
                next(answer.iter_lines())
    assert asked.result().json()["choices"][0]["text"] == alone


def test_neither_log_nor_metrics_nor_state_hold_prompts_answers_or_keys(serving):
    answer = ask(serving, ACME, prompt=SECRET, max_tokens=24, ignore_eos=True, user="u" * 5000)
    text = answer.json()["choices"][0]["text"]
    ask(serving, ACME, prompt=SECRET * 100, max_tokens=99999)
    ask(serving, ACME, prompt=SECRET, guided_regex=f"({SECRET}")
    ask(serving, ACME, model=SECRET, prompt="x")
    ask(serving, "vault", prompt="x")
    headers = {"authorization": f"Bearer {ADMIN}"}
    metrics = httpx.get(f"{serving.url}/metrics", headers=headers).text
    assert 'tenant="acme"' in metrics
    kept = [file.read_bytes() for file in Path(serving.files, "state").rglob("*") if file.is_file()]
    assert len(kept) >= 2
    for where in (serving.log.read_bytes(), metrics.encode(), *kept):
        for word in ("vault", text, ACME, GLOBEX, ADMIN):
            assert word.encode() not in where
