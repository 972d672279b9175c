"""Deltas from the roots and from the hub; the hub is a fake with the real one's layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from deltaserve.errors import RequestError
from deltaserve.registry.roots import Roots
from deltaserve.registry.sources import Sources


class Hub:
    """snapshot_download: files are links from a snapshot to blobs, as in the real cache."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str | None, list[str]]] = []
        self.error: Exception | None = None
        self.target: Path | None = None

    def __call__(self, repo_id, *, revision, cache_dir, allow_patterns):
        self.calls.append((repo_id, revision, allow_patterns))
        if self.error is not None:
            raise self.error
        repo = Path(cache_dir) / f"models--{repo_id.replace('/', '--')}"
        snapshot = repo / "snapshots" / ("0" * 40)
        for folder in (snapshot, repo / "blobs"):
            folder.mkdir(parents=True)
        (repo / "blobs/abc").write_text("{}")
        (snapshot / "delta.json").symlink_to(self.target or "../../blobs/abc")
        return str(snapshot)


@pytest.fixture
def hub():
    return Hub()


@pytest.fixture
def sources(tmp_path, hub):
    (tmp_path / "root/sql").mkdir(parents=True)
    return Sources(Roots([tmp_path / "root"]), tmp_path / "cache", hub)


def test_paths_are_local_and_confined(tmp_path, sources, hub):
    assert sources.fetch("sql") == tmp_path / "root/sql"
    assert not sources.is_unchecked("sql")
    with pytest.raises(RequestError, match="no directory inside"):
        sources.fetch(str(tmp_path))
    assert hub.calls == []


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "0" * 40, "refs/pr/1"])
def test_a_repository_is_fetched_once_named(sources, hub, tmp_path, revision):
    uri = "hf://acme/sql-delta" + (f"@{revision}" if revision else "")
    assert sources.is_unchecked(uri)
    folder = sources.fetch(uri)
    assert (folder / "delta.json").read_text() == "{}"
    assert folder.is_relative_to(tmp_path / "cache")
    ((repo, asked, patterns),) = hub.calls
    assert (repo, asked) == ("acme/sql-delta", revision)
    assert not {"*", "*.py", "*.bin", "*.pkl"} & set(patterns)


@pytest.mark.parametrize(
    "uri", ["s3://bucket/delta", "gs://b/d", "https://example.com/x", "file:///etc", "x://"]
)
def test_other_addresses_are_refused_with_the_way_out(sources, hub, uri):
    with pytest.raises(RequestError, match="delta_roots") as caught:
        sources.fetch(uri)
    assert caught.value.param == "path"
    assert hub.calls == []


@pytest.mark.parametrize(
    "uri",
    [
        "hf://",
        "hf://acme",
        "hf://a/b/c",
        "hf://a/b@",
        "hf://a/b@x y",
        "hf://a/b?x=1",
        "hf://a/b@../../x",
        "hf://a/..",
    ],
)
def test_malformed_hub_addresses_are_refused(sources, hub, uri):
    with pytest.raises(RequestError, match="OWNER/NAME"):
        sources.fetch(uri)
    assert hub.calls == []


@pytest.mark.parametrize(
    "error",
    [LocalEntryNotFoundError("no connection\nmore"), HFValidationError("bad"), OSError("no space")],
)
def test_a_hub_that_fails_is_the_requests_error(sources, hub, error):
    hub.error = error
    with pytest.raises(RequestError) as caught:
        sources.fetch("hf://acme/sql")
    assert "\n" not in str(caught.value)


def test_a_repository_cannot_link_out_of_the_cache(sources, hub, tmp_path):
    hub.target = tmp_path / "secret"
    hub.target.write_text("{}")
    with pytest.raises(RequestError):
        sources.fetch("hf://acme/evil")
