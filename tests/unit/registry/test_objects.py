"""Deltas from a web server and from an object store, both real ones on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from deltaserve.errors import ArtifactError, ConfigError, RequestError
from deltaserve.registry.objects import PARTIAL, STOPPED, Objects
from deltaserve.registry.remotes import RemoteError, open_remote
from deltaserve.registry.roots import Roots
from deltaserve.registry.sources import Sources

WEIGHTS = bytes(range(256)) * 4096


class Store(ThreadingHTTPServer):
    """Files by path, with ranges, as web servers and S3 (/BUCKET/KEY) have them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        self.redirect: str | None = None
        self.cut: int | None = None
        """Answers end after so many bytes, once."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def put(self, folder: str, **changes: bytes) -> None:
        files = {"delta.json": manifest(WEIGHTS), "delta.safetensors": WEIGHTS,
                 "tokenizer.json": b"{}"}  # fmt: skip
        for name, data in (files | {k.replace("__", "."): v for k, v in changes.items()}).items():
            self.files[f"/{folder}/{name}"] = data


class Handler(BaseHTTPRequestHandler):
    server: Store

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        store, asked = self.server, self.headers.get("range")
        store.asked.append((self.command, self.path, asked))
        data = store.files.get(unquote(self.path))
        if store.redirect is not None:
            self.send_response(302)
            self.send_header("location", store.redirect)
            data = b""
        elif data is None:
            self.send_response(404)
            data = b""
        elif asked is not None:
            start, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", asked).groups())
            self.send_response(206)
            self.send_header("content-range", f"bytes {start}-{end}/{len(data)}")
            data = data[start : end + 1]
        else:
            self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.send_header("etag", f'"{hashlib.md5(data).hexdigest()}"')
        self.send_header("last-modified", "Thu, 26 Nov 2026 00:00:00 GMT")
        self.end_headers()
        if body and store.cut is not None and len(data) > store.cut:
            data, store.cut = data[: store.cut], None
            self.close_connection = True
        if body:
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


def manifest(weights: bytes) -> bytes:
    return hashlib.sha256(weights).hexdigest().encode()


def verify(folder: Path) -> None:
    """The shape of a delta's own check: the manifest names the digest of the weights."""
    weights = b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))
    if manifest(weights) != (folder / "delta.json").read_bytes():
        raise ArtifactError(f"{folder} is damaged")


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    thread = threading.Thread(target=store.serve_forever, args=(0.01,))
    thread.start()
    yield store
    store.shutdown()
    thread.join()
    store.server_close()


def make(folder: Path, *prefixes: str, max_bytes: int = 1 << 30, opener=open_remote) -> Objects:
    return Objects(
        prefixes, folder, max_bytes=max_bytes, companions=("tokenizer.json", "config.json"),
        verify=verify, opener=opener,
    )  # fmt: skip


def test_a_web_servers_delta_is_fetched_whole_and_once(store, tmp_path):
    store.put("deltas/sql")
    objects = make(tmp_path / "kept", f"{store.url}/deltas/")
    folder = objects.fetch(f"{store.url}/deltas/sql/")
    assert (folder / "delta.safetensors").read_bytes() == WEIGHTS
    assert {path.name for path in folder.iterdir()} == {
        "delta.json", "delta.safetensors", "tokenizer.json",
    }  # fmt: skip
    before = len(store.asked)
    assert objects.fetch(f"{store.url}/deltas/sql") == folder
    assert {path for _, path, _ in store.asked[before:]} == {"/deltas/sql/delta.json"}


def test_shards(store, tmp_path):
    store.put("sql")
    del store.files["/sql/delta.safetensors"]
    for number in (1, 2, 3):
        part = WEIGHTS[(number - 1) * 400_000 : number * 400_000]
        store.files[f"/sql/delta-{number:05d}-of-00003.safetensors"] = part
    folder = make(tmp_path, store.url).fetch(f"{store.url}/sql")
    assert len(list(folder.glob("*.safetensors"))) == 3


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_what_was_cut_off_goes_on_where_it_ended(store, tmp_path, monkeypatch, scheme):
    monkeypatch.setattr("deltaserve.registry.remotes.CHUNK_BYTES", 100_000)
    prefix = f"{store.url}/bucket" if scheme == "http" else "s3://bucket"
    with_s3(monkeypatch, store)
    store.put("bucket/sql")
    if scheme == "http":
        store.cut = 300_000
        with pytest.raises(RequestError, match="cannot be fetched"):
            make(tmp_path, prefix).fetch(f"{prefix}/sql")
    else:
        with pytest.raises(RequestError, match="shutting down"):
            make(tmp_path, prefix, opener=stopping).fetch(f"{prefix}/sql")
    assert [path.suffix for path in tmp_path.iterdir()] == [PARTIAL]
    (kept,) = tmp_path.glob("*/delta.safetensors")
    done = kept.stat().st_size
    assert 0 < done < len(WEIGHTS)
    before = len(store.asked)
    folder = make(tmp_path, prefix).fetch(f"{prefix}/sql")
    assert (folder / "delta.safetensors").read_bytes() == WEIGHTS
    starts = [
        int(asked.removeprefix("bytes=").partition("-")[0])
        for verb, path, asked in store.asked[before:]
        if verb == "GET" and path.endswith("delta.safetensors") and asked
    ]
    assert min(starts) == done


def stopping(uri: str):
    """As when the server is stopped after three pieces of the weights."""
    remote = open_remote(uri)
    read = remote.read

    def reading(name: str, start: int, size: int) -> Iterator[bytes]:
        for count, piece in enumerate(read(name, start, size)):
            if name == "delta.safetensors" and count == 3:
                raise RemoteError(STOPPED)
            yield piece

    remote.read = reading
    return remote


def with_s3(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    pytest.importorskip("obstore")
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


def with_gs(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    pytest.importorskip("obstore")
    monkeypatch.setenv("GOOGLE_BASE_URL", store.url)
    monkeypatch.setenv("GOOGLE_ALLOW_HTTP", "true")
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")


def with_az(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    pytest.importorskip("obstore")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", store.url)
    monkeypatch.setenv("AZURE_ALLOW_HTTP", "true")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")


@pytest.mark.parametrize(("scheme", "use"), [("s3", with_s3), ("gs", with_gs), ("az", with_az)])
def test_an_object_stores_delta(store, tmp_path, monkeypatch, scheme, use):
    use(monkeypatch, store)
    store.put("bucket/team/sql")
    prefix = f"{scheme}://bucket/team"
    sources = Sources(Roots([]), tmp_path / "hub", objects=make(tmp_path / "o", prefix))
    folder = sources.fetch(f"{prefix}/sql")
    assert (folder / "delta.safetensors").read_bytes() == WEIGHTS
    with pytest.raises(RequestError, match=r"no delta\.json"):
        sources.fetch(f"{prefix}/none")


def test_a_new_version_at_the_same_address_does_not_touch_the_old_one(store, tmp_path):
    store.put("sql")
    old = make(tmp_path, store.url).fetch(f"{store.url}/sql")
    store.put("sql", delta__json=manifest(b"new"), delta__safetensors=b"new")
    new = make(tmp_path, store.url).fetch(f"{store.url}/sql")
    assert new != old
    assert (old / "delta.safetensors").read_bytes() == WEIGHTS


def test_what_is_not_what_its_manifest_says_is_thrown_away(store, tmp_path):
    store.put("sql", delta__safetensors=WEIGHTS[:-1] + b"x")
    with pytest.raises(RequestError, match=rf"{re.escape(store.url)}/sql is damaged"):
        make(tmp_path, store.url).fetch(f"{store.url}/sql")
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_ends_downloads_nothing(store, tmp_path):
    store.put("sql")
    objects = make(tmp_path, store.url)
    objects.stop()
    with pytest.raises(RequestError, match="shutting down"):
        objects.fetch(f"{store.url}/sql")


def test_too_large_is_not_begun(store, tmp_path):
    store.put("sql")
    with pytest.raises(RequestError, match="max_delta_bytes is 1000"):
        make(tmp_path, store.url, max_bytes=1000).fetch(f"{store.url}/sql")
    assert not any(path.endswith("safetensors") for verb, path, _ in store.asked if verb == "GET")


def test_redirections_are_not_followed(store, tmp_path):
    with contextlib.closing(Store()) as inside:
        inside.close = inside.server_close  # never served: nobody may come
        store.redirect = f"{inside.url}/latest/meta-data"
        with pytest.raises(RequestError, match="not followed"):
            make(tmp_path, store.url).fetch(f"{store.url}/sql")


@pytest.mark.parametrize(
    "uri",
    [
        "{url}/other/sql", "{url}/deltas-not/sql", "{url}/deltas/../other/sql",
        "{url}/deltas/%2e%2e/other", "{url}/deltas/./sql", "{url}/deltas/sql?x=1",
        "{url}/deltas//sql", "{url}/deltas/sql#x", "http://169.254.169.254/latest/meta-data",
        "http://user@127.0.0.1/deltas", "http://127.0.0.1:1/deltas/sql", "https://127.0.0.1/deltas",
        "s3://deltas/sql", "file:///etc", "gopher://x/deltas", "http://", "x://", "://",
        "{url}/deltas/sql\n", "{url}/deltas/\u2025/x", "{url}\\deltas",
    ],
)  # fmt: skip
def test_only_what_is_below_the_configured_addresses_is_asked(store, tmp_path, uri):
    with pytest.raises(RequestError) as caught:
        make(tmp_path, f"{store.url}/deltas").fetch(uri.format(url=store.url))
    assert caught.value.param == "path"
    assert store.asked == []


@pytest.mark.parametrize(
    "prefix", ["", "http://", "ftp://x", "/tmp", "https://u:p@x/", "s3://b/.."]
)
def test_prefixes_that_are_none(tmp_path, prefix):
    with pytest.raises(ConfigError, match="delta_urls"):
        make(tmp_path, prefix)
