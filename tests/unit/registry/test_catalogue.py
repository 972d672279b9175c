"""The catalogue under every sequence of changes, across restarts, and shared by processes."""

from __future__ import annotations

import multiprocessing
import sqlite3
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deltaserve.errors import ConflictError, NotFoundError
from deltaserve.registry.catalogue import Registry

BASE = "sha256:base"


def open_registry(path: Path) -> Registry:
    registry = Registry(path, clock=lambda: 1_900_000_000.0)
    registry.put_base(BASE, "base", "/models/base")
    return registry


@pytest.fixture
def path(tmp_path):
    return tmp_path / "registry.sqlite"


@pytest.fixture
def registry(path):
    registry = open_registry(path)
    yield registry
    registry.close()


def register(registry, name="sql", digest="sha256:1", **more):
    return registry.register(BASE, name, uri=name, path=f"/deltas/{name}", digest=digest, **more)


def test_a_delta_from_registration_to_rollback(registry):
    assert register(registry).state == "registered"
    assert registry.delta(BASE, "sql").current is None
    assert registry.activate(BASE, "sql", 1).current == 1
    assert register(registry, digest="sha256:2").number == 2
    assert registry.delta(BASE, "sql").current == 1  # until it has been loaded
    delta = registry.activate(BASE, "sql", 2)
    assert [v.state for v in delta.versions] == ["ready", "ready"]
    assert delta.previous().number == 1
    assert registry.activate(BASE, "sql", 1).current == 1
    with pytest.raises(ConflictError, match="no earlier version"):
        registry.delta(BASE, "sql").previous()


def test_a_version_that_failed_changes_nothing_but_itself(registry):
    register(registry)
    registry.activate(BASE, "sql", 1)
    register(registry, digest="sha256:2")
    delta = registry.fail(BASE, "sql", 2, "damaged")
    assert (delta.current, delta.version(2).error) == (1, "damaged")
    register(registry, digest="sha256:3")
    registry.activate(BASE, "sql", 3)
    assert registry.delta(BASE, "sql").previous().number == 1  # not the failed one


def test_the_same_content_is_the_same_version(registry):
    first = register(registry)
    again = registry.register(
        BASE, "sql", uri="moved", path="/elsewhere", digest=first.digest, pinned=True
    )
    assert (again.number, again.path) == (1, "/elsewhere")
    assert registry.delta(BASE, "sql").pinned
    assert register(registry, name="other").number == 1  # of another name


def test_numbers_are_never_used_again(registry):
    register(registry)
    register(registry, digest="sha256:2")
    registry.remove_version(BASE, "sql", 2)
    assert register(registry, digest="sha256:3").number == 3


def test_bases_are_apart(registry):
    registry.put_base("sha256:other", "other", "/models/other")
    register(registry)
    assert registry.deltas("sha256:other") == []
    registry.put_base(BASE, "renamed", "/moved")
    assert [(base.name, base.path) for base in registry.bases()] == [
        ("other", "/models/other"), ("renamed", "/moved"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda r: r.delta(BASE, "nope"), NotFoundError),
        (lambda r: r.remove(BASE, "nope"), NotFoundError),
        (lambda r: r.set_pinned(BASE, "nope", True), NotFoundError),
        (lambda r: r.activate(BASE, "sql", 9), NotFoundError),
        (lambda r: r.fail(BASE, "nope", 1, "x"), NotFoundError),
        (lambda r: r.remove_version(BASE, "sql", 1), ConflictError),
        (lambda r: register(r, name="x" * 10, digest=None), sqlite3.IntegrityError),
    ],
)
def test_refused_changes_change_nothing(registry, change, kind):
    register(registry)
    registry.activate(BASE, "sql", 1)
    before = registry.deltas(BASE)
    with pytest.raises(kind):
        change(registry)
    assert registry.deltas(BASE) == before


class CatalogueMachine(RuleBasedStateMachine):
    """Any changes, any restarts; the model is a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.path = Path(self.folder.name, "registry.sqlite")
        self.registry = open_registry(self.path)
        self.model: dict[str, dict[int, tuple[str, str]]] = {}
        self.current: dict[str, int | None] = {}
        self.next: dict[str, int] = {}

    names = st.sampled_from(["sql", "legal/v2"])

    @rule(name=names, digest=st.sampled_from(["a", "b", "c"]))
    def publish(self, name: str, digest: str) -> None:
        number = register(self.registry, name, digest).number
        versions = self.model.setdefault(name, {})
        self.current.setdefault(name, None)
        known = [n for n, (d, _) in versions.items() if d == digest]
        assert number == (known[0] if known else self.next.get(name, 1))
        if not known:
            versions[number] = (digest, "registered")
            self.next[name] = number + 1

    @precondition(lambda self: self.model)
    @rule(data=st.data(), works=st.booleans())
    def load(self, data: st.DataObject, works: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        if not self.model[name]:
            return
        number = data.draw(st.sampled_from(sorted(self.model[name])))
        digest, _ = self.model[name][number]
        if works:
            self.registry.activate(BASE, name, number)
            self.current[name] = number
        else:
            self.registry.fail(BASE, name, number, "no")
        self.model[name][number] = (digest, "ready" if works else "failed")

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove_version(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        for number in sorted(self.model[name])[:1]:
            if number != self.current[name]:
                self.registry.remove_version(BASE, name, number)
                del self.model[name][number]

    @rule(name=names)
    def remove(self, name: str) -> None:
        if name in self.model:
            self.registry.remove(BASE, name)
            for table in (self.model, self.current, self.next):
                del table[name]

    @rule()
    def restart(self) -> None:
        self.registry.close()
        self.registry = open_registry(self.path)

    @invariant()
    def holds_what_was_done(self) -> None:
        found = {delta.name: delta for delta in self.registry.deltas(BASE)}
        assert {name: d.current for name, d in found.items()} == self.current
        assert {
            name: {v.number: (v.digest, v.state) for v in d.versions} for name, d in found.items()
        } == self.model

    def teardown(self) -> None:
        self.registry.close()
        self.folder.cleanup()


CatalogueMachine.TestCase.settings = settings(
    max_examples=15, stateful_step_count=20, deadline=None
)
TestCatalogue = CatalogueMachine.TestCase


def publish_many(path: Path, worker: int, barrier) -> None:
    barrier.wait()
    registry = open_registry(path)
    for index in range(15):
        version = register(registry, digest=f"sha256:{worker}/{index}")
        registry.activate(BASE, "sql", version.number)
    registry.close()


def test_processes_share_it_without_losing_or_repeating_a_version(path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    workers = [context.Process(target=publish_many, args=(path, n, barrier)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    registry = open_registry(path)
    delta = registry.delta(BASE, "sql")
    assert [version.number for version in delta.versions] == list(range(1, 46))
    assert {version.digest for version in delta.versions} == {
        f"sha256:{worker}/{index}" for worker in range(3) for index in range(15)
    }
    assert delta.current in range(1, 46)
    registry.close()
