"""``deltaserve serve`` for customers: deltas come and go while it serves, and nothing is forgotten.

One server for all tests, in their order; it is killed and started again on the way.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import openai
import pytest

from deltaserve.compress.plan import make_plan
from deltaserve.compress.run import compress
from deltaserve.tenancy.keys import digest
from tests.families import make_fine_tune
from tests.process_helpers import engine_of, wait_until
from tests.tenancy_server import ACME, ADMIN, GLOBEX, PROMPT, Serving, make_base

TENANTS = {
    "tenants": [
        {"id": "acme", "models": ["acme/*", "base"], "keys": [{"sha256": digest(ACME)}]},
        {"id": "globex", "models": ["globex/*"], "keys": [{"sha256": digest(GLOBEX)}]},
    ]
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and in deltas/ three of it, a damaged one, and one of another base."""
    root = tmp_path_factory.mktemp("tenancy")
    for seed, name in enumerate(("base", "other-base")):
        make_base(root / name, seed)
    for seed, name in enumerate(("one", "two", "three"), start=1):
        make_fine_tune(root / "base", root / name, seed=seed)
        compress(root / "base", root / name, root / "deltas" / name, make_plan(codec="raw"))
    make_fine_tune(root / "other-base", root / "foreign", seed=9)
    compress(root / "other-base", root / "foreign", root / "deltas/foreign", make_plan(codec="raw"))
    shutil.copytree(root / "deltas/three", root / "deltas/damaged")
    weights = root / "deltas/damaged/delta.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64] + b"\x01" * 64)
    (root / "tenants.yaml").write_text(json.dumps(TENANTS))
    return root


@pytest.fixture(scope="module")
def serving(files: Path) -> Iterator[Serving]:
    serving = Serving(files)
    yield serving
    serving.stop()


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    """What was answered by which delta, so that later tests can tell which one answers."""
    return {}


def test_a_delta_is_published_while_others_decode(serving, answers):
    answers["base"] = serving.answer(ACME, "base")
    times: list[float] = []

    def stream() -> None:
        with serving.client(ACME) as client:
            for _ in client.completions.create(
                model="base", prompt="x", max_tokens=230, stream=True,
                extra_body={"ignore_eos": True},
            ):  # fmt: skip
                times.append(time.monotonic())

    reader = threading.Thread(target=stream)
    reader.start()
    while not times:
        time.sleep(0.001)
    began = time.monotonic()
    shown = serving.admin("POST", "/v1/deltas", json={"name": "acme/chat", "path": "one"})
    ended = time.monotonic()
    reader.join()
    assert (shown["version"], shown["state"], shown["pinned"]) == (1, "ready", False)
    assert any(began < at < ended for at in times)
    answers["one"] = serving.answer(ACME, "acme/chat")
    assert answers["one"] != answers["base"]


def test_nobody_else_sees_it(serving):
    with serving.client(GLOBEX) as client:
        assert list(client.models.list()) == []
        for model in ("acme/chat", "base"):
            with pytest.raises(openai.NotFoundError, match="does not exist"):
                client.completions.create(model=model, prompt="x")


def test_a_new_version_takes_over_and_is_rolled_back(serving, answers):
    second = {"name": "acme/chat", "path": str(serving.files / "deltas/two"), "pinned": True}
    shown = serving.admin("POST", "/v1/deltas", json=second)
    assert (shown["version"], shown["pinned"]) == (2, True)
    answers["two"] = serving.answer(ACME, "acme/chat")
    assert answers["two"] != answers["one"]
    assert serving.admin("POST", "/v1/deltas/acme/chat/rollback", json={})["version"] == 1
    assert serving.answer(ACME, "acme/chat") == answers["one"]
    serving.admin("POST", "/v1/deltas/acme/chat/rollback", 409, json={})
    activated = serving.admin("POST", "/v1/deltas", json={"name": "acme/chat", "version": 2})
    assert activated["version"] == 2
    assert serving.answer(ACME, "acme/chat") == answers["two"]
    again = serving.admin("POST", "/v1/deltas", json=second)  # the same content
    assert [version["version"] for version in again["versions"]] == [1, 2]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("damaged", "damaged"),
        ("foreign", "was made for the base"),
        ("../base", "no directory inside"),
        ("/etc", "no directory inside"),
        ("absent", "no directory inside"),
        (".", "is not a delta"),
        ("s3://bucket/x", "cannot be fetched from s3"),
    ],
)
def test_what_cannot_be_loaded_changes_nothing(serving, answers, path, message):
    for name in ("acme/chat", "acme/new"):
        error = serving.admin("POST", "/v1/deltas", 400, json={"name": name, "path": path})
        assert message in error["error"]["message"]
    assert serving.answer(ACME, "acme/chat") == answers["two"]
    with serving.client(ACME) as client:
        assert [model.id for model in client.models.list()] == ["base", "acme/chat"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": "acme/x"}, "path"),
        ({"name": "acme/x", "path": "one", "version": 1}, "path"),
        ({"name": "acme/x", "path": "one", "digest": "sha256:0"}, "digest"),
        ({"name": "acme/chat", "version": 1, "digest": "sha256:0"}, "digest"),
        ({"name": "base", "path": "one"}, "path"),
        ({"name": "no spaces", "path": "one"}, "path"),
        ({"name": "acme/x", "path": "one", "pinned": "yes"}, "pinned"),
        ({"name": "acme/x", "path": "one", "color": 1}, "color"),
        ({"path": "one"}, "name"),
    ],
)
def test_wrong_publications(serving, body, param):
    error = serving.admin("POST", "/v1/deltas", 400, json=body)
    assert error["error"]["param"] == param


def test_pins_and_questions(serving):
    assert serving.admin("PATCH", "/v1/deltas/acme/chat", json={"pinned": False})["pinned"] is False
    serving.admin("PATCH", "/v1/deltas/acme/none", 404, json={"pinned": True})
    serving.admin("GET", "/v1/deltas/acme/none", 404)
    shown = serving.admin("GET", "/v1/deltas/acme/chat")
    assert shown["bytes"]["resident"] > 0
    versions = {v["path"]: v["state"] for v in shown["versions"]}
    assert versions == {
        "one": "ready", str(serving.files / "deltas/two"): "ready", "damaged": "failed",
    }  # fmt: skip


def test_vllms_names(serving):
    load = {"lora_name": "globex/a", "lora_path": str(serving.files / "deltas/three")}
    headers = {"authorization": f"Bearer {ADMIN}"}

    def post(path: str, body: dict) -> httpx.Response:
        return httpx.post(f"{serving.url}/v1/{path}", json=body, headers=headers, timeout=60)

    assert "added successfully" in post("load_lora_adapter", load).text
    assert post("load_lora_adapter", load).status_code == 400  # already
    assert post("load_lora_adapter", load | {"load_inplace": True}).status_code == 200
    assert serving.answer(GLOBEX, "globex/a")
    assert "removed successfully" in post("unload_lora_adapter", {"lora_name": "globex/a"}).text
    assert post("unload_lora_adapter", {"lora_name": "globex/a"}).status_code == 404
    with pytest.raises(openai.NotFoundError):
        serving.answer(GLOBEX, "globex/a")


def test_unloading_returns_when_its_requests_have_ended_and_its_memory_is_free(serving):
    serving.admin("POST", "/v1/deltas", json={"name": "globex/b", "path": "three"})
    before = serving.admin("GET", "/v1/stats")["residency"]["device_deltas"]
    with serving.client(GLOBEX) as client:
        stream = client.completions.create(
            model="globex/b", prompt="x", max_tokens=200, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        chunks = iter(stream)
        next(chunks)
        gone = serving.admin("DELETE", "/v1/deltas/globex/b")
        assert gone["deleted"] is True
        assert serving.admin("GET", "/v1/stats")["residency"]["device_deltas"] == before - 1
        assert list(chunks)[-1].choices[0].finish_reason == "length"


def test_kill_9_loses_no_answered_request_and_forgets_no_delta(serving, answers):
    answered: list[str] = []

    def ask(stream: bool) -> None:
        """Until the server is gone; a stream is answered once its end has come."""
        body = {"model": "acme/chat", "prompt": PROMPT, "max_tokens": 3, "stream": stream}
        headers = {"authorization": f"Bearer {ACME}"}
        with httpx.Client(base_url=serving.url, headers=headers, timeout=60) as client:
            while True:
                try:
                    answer = client.post("/v1/completions", json=body)
                except httpx.HTTPError:
                    return
                if answer.status_code == 200 and (not stream or "data: [DONE]" in answer.text):
                    answered.append(answer.headers["x-request-id"])

    late = {"id": "late", "models": ["acme/chat"]}
    serving.admin("POST", "/v1/tenants", 201, json=late)
    key = serving.admin("POST", "/v1/tenants/late/keys", 201, json={})["key"]

    deltas = serving.files / "deltas"
    shutil.copytree(deltas / "three", deltas / "changed")
    for name, path in (("acme/third", "three"), ("acme/fourth", "changed")):
        serving.admin("POST", "/v1/deltas", json={"name": name, "path": path})
    threads = [threading.Thread(target=ask, args=(i % 2 == 0,)) for i in range(6)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while len(answered) < 60 and time.monotonic() < deadline:
        time.sleep(0.02)
    serving.kill()
    for thread in threads:
        thread.join()
    with closing(sqlite3.connect(serving.files / "state/accounts.sqlite")) as connection:
        kept = [row[0] for row in connection.execute("SELECT request_id FROM usage")]
    assert len(answered) >= 60
    assert set(answered) <= set(kept)
    assert len(set(kept)) == len(kept)

    (deltas / "three").rename(deltas / "moved")  # for the next test
    shutil.rmtree(deltas / "changed")
    shutil.copytree(deltas / "two", deltas / "changed")
    serving.start("--engine-process")
    assert serving.answer(ACME, "acme/chat") == answers["two"]
    assert serving.admin("GET", "/v1/deltas/acme/chat")["version"] == 2
    assert serving.admin("POST", "/v1/deltas/acme/chat/rollback", json={})["version"] == 1
    assert serving.answer(ACME, "acme/chat") == answers["one"]
    assert serving.answer(key, "acme/chat") == answers["one"]
    sums = serving.admin("GET", "/v1/usage?group_by=tenant&tenant=acme")["data"]
    assert sums[0]["requests"] >= len(answered)


def test_a_crash_of_the_engine_forgets_no_version(serving, answers):
    serving.admin("POST", "/v1/deltas", json={"name": "acme/chat", "version": 2, "pinned": True})

    def status() -> int:
        return httpx.get(f"{serving.url}/ready").status_code

    for pid in engine_of(serving.process):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: status() == 503)
    wait_until(lambda: status() == 200)
    assert serving.answer(ACME, "acme/chat") == answers["two"]
    shown = serving.admin("GET", "/v1/deltas/acme/chat")
    assert (shown["version"], shown["pinned"], shown["state"]) == (2, True, "ready")
    assert serving.admin("POST", "/v1/deltas/acme/chat/rollback", json={})["version"] == 1
    assert serving.answer(ACME, "acme/chat") == answers["one"]


def test_deltas_that_are_gone_or_changed_are_not_served_and_the_others_are(serving):
    for name, reason in (("acme/third", "not a directory"), ("acme/fourth", "was published")):
        shown = serving.admin("GET", f"/v1/deltas/{name}")
        assert (shown["state"], shown["versions"][0]["state"]) == ("not served", "failed")
        assert reason in shown["versions"][0]["error"]
        with pytest.raises(openai.NotFoundError):
            serving.answer(ACME, name)
    mended = serving.admin("POST", "/v1/deltas", json={"name": "acme/third", "path": "moved"})
    assert (mended["version"], mended["state"]) == (1, "ready")


def test_the_audit_remembers_all_of_it(serving):
    actions = [line["action"] for line in serving.admin("GET", "/v1/audit")["data"]]
    assert actions[0] == "publish_delta"
    assert {"roll_back_delta", "change_delta", "delete_delta"} <= set(actions)
