"""Deltas come, change and go while the server runs; every answer is that of its version."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import openai
import pytest
from fake_engine import FakeEngine
from tiny_tokenizer import byte_level_tokenizer

from deltaserve.engine.types import ModelInfo
from deltaserve.server import tokenizers as loading

PROMPT = "<<new>> world"


@pytest.fixture
def newcomer(served: list[ModelInfo], tmp_path: Path) -> ModelInfo:
    """A delta that was not there at the start, with a token of its own."""
    byte_level_tokenizer(added=("<<new>>",)).save_pretrained(tmp_path)
    return replace(served[1], name="new", path=str(tmp_path), digest="sha256:new")


def names(client: openai.OpenAI) -> list[str]:
    return [card.id for card in client.models.list().data]


def test_a_new_delta_is_served_with_its_own_tokenizer(
    client: openai.OpenAI, engine: FakeEngine, newcomer: ModelInfo
) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="new", prompt="x")
    engine.infos.append(replace(newcomer, state="loading", tier="disk"))
    assert names(client)[-1] == "new"
    assert client.completions.create(model="new", prompt=PROMPT).choices[0].text == PROMPT
    assert len(engine.submitted[-1].prompt_ids) < len(PROMPT) - len("<<new>>")
    engine.infos.pop()
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("new")


def test_another_version_is_read_with_its_own_tokenizer(
    client: openai.OpenAI, engine: FakeEngine, newcomer: ModelInfo
) -> None:
    old = client.completions.create(model="chatty", prompt=PROMPT)
    engine.infos[1] = replace(newcomer, name="chatty", version=2)
    new = client.completions.create(model="chatty", prompt=PROMPT)
    assert new.usage.prompt_tokens < old.usage.prompt_tokens
    assert new.system_fingerprint != old.system_fingerprint
    assert client.models.retrieve("chatty").version == 2


def test_a_version_that_comes_while_a_prompt_is_read_is_not_given_foreign_tokens(
    client: openai.OpenAI,
    engine: FakeEngine,
    newcomer: ModelInfo,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode = loading.ModelTokenizer.encode

    def replaced_meanwhile(self: loading.ModelTokenizer, *args: object) -> list[int]:
        engine.infos[1] = replace(newcomer, name="chatty", version=2)
        return encode(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(loading.ModelTokenizer, "encode", replaced_meanwhile)
    with pytest.raises(openai.InternalServerError, match="send it again") as caught:
        client.completions.create(model="chatty", prompt=PROMPT)
    assert caught.value.code == "model_replaced"
    assert engine.submitted == []
    assert client.completions.create(model="chatty", prompt=PROMPT).choices


def test_others_are_served_while_a_tokenizer_loads(
    client: openai.OpenAI,
    engine: FakeEngine,
    newcomer: ModelInfo,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load, loads = loading.load_tokenizer, []

    def slowly(*args: object) -> object:
        loads.append(args)
        time.sleep(0.5)
        return load(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(loading, "load_tokenizer", slowly)
    engine.infos.append(newcomer)
    ask = {"model": "new", "prompt": "x"}
    waiting = [threading.Thread(target=client.completions.create, kwargs=ask) for _ in range(2)]
    for thread in waiting:
        thread.start()
    while not loads:
        time.sleep(0.01)
    began = time.monotonic()
    client.completions.create(model="base", prompt="x")
    assert time.monotonic() - began < 0.4
    for thread in waiting:
        thread.join()
    assert len(loads) == 1
    assert [r.model for r in engine.submitted] == ["base", "new", "new"]


def test_what_cannot_be_loaded_says_why_but_not_where(
    client: openai.OpenAI, engine: FakeEngine, newcomer: ModelInfo
) -> None:
    reason = f"{newcomer.path}/delta.safetensors: it was cut off"
    engine.infos.append(replace(newcomer, state="error", tier="disk", error=reason))
    with pytest.raises(openai.InternalServerError, match="it was cut off") as caught:
        client.completions.create(model="new", prompt="x")
    assert caught.value.status_code == 503
    assert newcomer.path not in caught.value.message
    assert client.models.retrieve("new").state == "error"


def test_a_damaged_tokenizer_is_a_failure_of_its_model_alone(
    client: openai.OpenAI, engine: FakeEngine, newcomer: ModelInfo
) -> None:
    Path(newcomer.path, "tokenizer.json").write_text("{")
    engine.infos.append(replace(newcomer, digest="sha256:damaged"))
    with pytest.raises(openai.InternalServerError, match="tokenizer is missing or damaged"):
        client.completions.create(model="new", prompt="x")
    assert client.completions.create(model="base", prompt="x").choices


def test_the_list_tells_where_a_model_is(
    client: openai.OpenAI, engine: FakeEngine, newcomer: ModelInfo
) -> None:
    engine.infos[1] = replace(engine.infos[1], state="draining")
    engine.infos.append(replace(newcomer, state="registered", tier="host", pinned=True, version=3))
    assert names(client) == ["base", "team/grown", "new"]
    card = client.models.retrieve("new")
    assert (card.state, card.tier, card.version, card.pinned) == ("registered", "host", 3, True)
    assert (card.parent, card.root, card.bytes["resident"]) == ("base", "base", 100)
    assert client.models.retrieve("base").state == "ready"
