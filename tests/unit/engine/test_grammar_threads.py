"""Grammars that take long: whose wait for whose."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from deltaserve.engine.grammar import THREADS, Compiler, Preparing
from deltaserve.engine.types import Grammar
from deltaserve.errors import RequestError


class SlowCompiler:
    """Compiles "slow" when it is let go on, anything else at once."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun: list[str] = []

    def matcher(self, tenant: str, grammar: str, vocabulary: object, stops: object) -> Any:
        self.begun.append(grammar)
        if grammar.startswith("slow"):
            assert self.go.wait(20)
        if grammar == "bad":
            raise RequestError("no grammar")
        return grammar


@pytest.fixture
def preparing() -> Preparing:
    made = Preparing()
    made._compiler = SlowCompiler()  # type: ignore[assignment]
    return made


def sequence(tenant: str, grammar: str) -> Any:
    sampling = SimpleNamespace(grammar=grammar, stop_token_ids=frozenset())
    request = SimpleNamespace(request_id=f"{tenant}-{grammar}", tenant=tenant, sampling=sampling)
    return Waiting(request=request, matcher=None)


class Waiting(SimpleNamespace):
    __hash__ = object.__hash__


def taken(preparing: Preparing, count: int) -> list[str]:
    names: list[str] = []
    deadline = time.monotonic() + 20
    while len(names) < count:
        assert time.monotonic() < deadline, names
        preparing.wait()
        ready, failed = preparing.take()
        names += [seq.request.request_id for seq in ready] + [e.request_id for e in failed]
    return names


def test_one_tenants_slow_grammars_do_not_hold_up_another(preparing: Preparing) -> None:
    for i in range(2 * THREADS):
        preparing.add(sequence("flood", f"slow{i}"), None)  # type: ignore[arg-type]
    for i in range(5):
        preparing.add(sequence("polite", f"quick{i}"), None)  # type: ignore[arg-type]
    preparing.add(sequence("polite", "bad"), None)  # type: ignore[arg-type]
    assert set(taken(preparing, 6)) == {*(f"polite-quick{i}" for i in range(5)), "polite-bad"}
    slow = [name for name in preparing._compiler.begun if name.startswith("slow")]
    assert slow == [f"slow{i}" for i in range(THREADS - 1)]
    preparing._compiler.go.set()
    assert len(taken(preparing, 2 * THREADS)) == 2 * THREADS
    assert not len(preparing)


def test_what_is_dropped_keeps_its_thread_until_it_ends(preparing: Preparing) -> None:
    for i in range(THREADS):
        preparing.add(sequence("flood", f"slow{i}"), None)  # type: ignore[arg-type]
        assert preparing.drop(f"flood-slow{i}")
    assert not preparing.drop("flood-slow0")
    preparing.add(sequence("flood", "quick"), None)  # type: ignore[arg-type]
    preparing.add(sequence("other", "quick"), None)  # type: ignore[arg-type]
    assert taken(preparing, 1) == ["other-quick"]
    assert "flood-quick" in preparing
    preparing._compiler.go.set()
    assert taken(preparing, 1) == ["flood-quick"]


def test_what_was_compiled_for_one_tenant_is_not_there_for_another(monkeypatch: Any) -> None:
    compiler, compiled = Compiler(), []

    def compile_(grammar: Grammar, vocabulary: Any) -> Any:
        compiled.append(grammar)
        return SimpleNamespace(deep_copy=lambda: None)

    monkeypatch.setattr(compiler, "_compile", compile_)
    vocabulary: Any = SimpleNamespace(digest="sha256:0", vocab_size=32)
    for tenant in ("acme", "acme", "globex"):
        compiler.matcher(tenant, Grammar("regex", "a+"), vocabulary, frozenset())
    assert len(compiled) == 2
