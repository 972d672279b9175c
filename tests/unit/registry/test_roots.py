"""No path leads out of the roots, however it is written."""

from __future__ import annotations

import os

import pytest

from deltaserve.errors import ConfigError, RequestError
from deltaserve.registry.roots import Roots


@pytest.fixture
def tree(tmp_path):
    """roots/a and roots/b may be served from; outside may not."""
    for name in ("roots/a/sql", "roots/b/legal/v2", "outside/secret", "roots/a2"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "delta.json").write_text("{}")
    return tmp_path


@pytest.fixture
def roots(tree):
    return Roots([tree / "roots/a", tree / "roots/b"])


def test_paths_inside_are_found_relative_or_not(tree, roots):
    sql, legal = tree / "roots/a/sql", tree / "roots/b/legal/v2"
    assert roots.resolve("sql") == roots.resolve(str(sql)) == sql
    assert roots.resolve("legal/v2") == roots.resolve("legal/../legal/./v2") == legal
    assert roots.resolve("../b/legal/v2") == legal  # from one root into another


@pytest.mark.parametrize(
    "path",
    [
        "..", "../../outside/secret", "/", "/etc", "sql/../../../outside/secret", "../a2",
        "sql\0", "nope", "", "a" * 5000, "sql/delta.json", "~", "%2e%2e/outside/secret",
    ],
)  # fmt: skip
def test_paths_outside_are_refused_alike(tree, roots, path):
    if path == "":  # the root itself holds only what is inside
        assert roots.resolve(path) == tree / "roots/a"
        return
    with pytest.raises(RequestError, match="no directory inside one of the configured"):
        roots.resolve(path)


def test_an_absolute_path_outside_is_refused_whether_or_not_it_exists(tree, roots):
    messages = []
    for name in ("secret", "absent"):
        with pytest.raises(RequestError) as caught:
            roots.resolve(str(tree / "outside" / name))
        messages.append(str(caught.value).replace(name, "X"))
    assert messages[0] == messages[1]


def test_links_may_lead_to_other_deltas_but_not_out(tree, roots):
    base = tree / "roots/a"
    (base / "same").symlink_to(tree / "roots/b/legal/v2")
    (base / "out").symlink_to(tree / "outside/secret")
    (base / "loop").symlink_to("loop")
    assert roots.resolve("same") == tree / "roots/b/legal/v2"
    for name in ("out", "loop"):
        with pytest.raises(RequestError):
            roots.resolve(name)


@pytest.mark.parametrize("kind", ["file", "absent", "directory", "fifo"])
def test_a_delta_may_not_lend_what_lies_elsewhere(tree, roots, kind):
    link = tree / "roots/a/sql/delta.safetensors"
    if kind == "fifo":
        os.mkfifo(link)
    else:
        targets = {"file": "outside/secret/delta.json", "absent": "nope", "directory": "outside"}
        link.symlink_to(tree / targets[kind])
    if kind == "directory":  # never entered
        assert roots.resolve("sql")
        return
    with pytest.raises(RequestError):
        roots.resolve("sql")


def test_blobs_beside_snapshots_are_inside(tree, roots):
    (tree / "roots/b/blobs").mkdir()
    (tree / "roots/b/blobs/1234").write_text("x")
    (tree / "roots/b/legal/v2/delta.safetensors").symlink_to("../../blobs/1234")
    assert roots.resolve("legal/v2")


def test_a_root_that_is_itself_a_link_works(tree):
    (tree / "link").symlink_to(tree / "roots/a")
    roots = Roots([tree / "link"])
    assert roots.resolve(str(tree / "link/sql")) == tree / "roots/a/sql"


def test_without_roots_there_are_no_paths(tree):
    with pytest.raises(RequestError, match="there is none"):
        Roots([]).resolve(str(tree / "roots/a/sql"))


def test_a_root_must_be_a_directory(tree):
    with pytest.raises(ConfigError, match="is not a directory"):
        Roots([tree / "absent"])
