"""A real HTTP server over FakeEngine, with real tokenizers, and the official client."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from fake_engine import KEY, FakeEngine
from house import House, opened
from serving import running
from tiny_tokenizer import TEMPLATE, byte_level_tokenizer

from deltaserve.config import EngineConfig, ServerConfig, hash_key
from deltaserve.engine.types import ModelInfo
from deltaserve.server.app import create_app
from deltaserve.server.tokenizers import ModelTokenizer, Tokenizers


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """base: no chat template. chatty: a template and more ends. grown: a token more."""
    root = tmp_path_factory.mktemp("models")
    dirs = {name: root / name for name in ("base", "chatty", "team/grown")}
    for path in dirs.values():
        path.mkdir(parents=True)
    byte_level_tokenizer().save_pretrained(dirs["base"])
    (dirs["base"] / "generation_config.json").write_text('{"eos_token_id": 1}')
    (dirs["chatty"] / "chat_template.jinja").write_text(TEMPLATE)
    (dirs["chatty"] / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    grown = byte_level_tokenizer(added=("<<tool>>",))
    grown.save_pretrained(dirs["team/grown"])
    return dirs


@pytest.fixture(scope="session")
def served(model_dirs: dict[str, Path]) -> list[ModelInfo]:
    base = ModelInfo("base", str(model_dirs["base"]), None, "sha256:base", vocab_size=400)
    return [base] + [
        ModelInfo(
            name,
            str(model_dirs[name]),
            "base",
            f"sha256:{name}",
            codecs=("int", "raw"),
            full_bytes=1000,
            resident_bytes=100,
            disk_bytes=90,
            vocab_size=400,
        )
        for name in ("chatty", "team/grown")
    ]


@pytest.fixture(scope="session")
def all_tokenizers(served: list[ModelInfo]) -> Tokenizers:
    return Tokenizers(served)


@pytest.fixture(scope="session")
def tokenizers(served: list[ModelInfo], all_tokenizers: Tokenizers) -> dict[str, ModelTokenizer]:
    return {info.name: all_tokenizers.of(info) for info in served}


@pytest.fixture(scope="session")
def _engine(served: list[ModelInfo]) -> FakeEngine:
    return FakeEngine(served)


@pytest.fixture
def engine(_engine: FakeEngine) -> FakeEngine:
    _engine.reset()
    return _engine


@pytest.fixture(scope="session")
def url(_engine: FakeEngine, all_tokenizers: Tokenizers) -> Iterator[str]:
    with running(create_app(_engine, all_tokenizers, ServerConfig(EngineConfig("base")))) as url:
        yield url


@pytest.fixture(scope="session")
def locked_url(_engine: FakeEngine, all_tokenizers: Tokenizers) -> Iterator[str]:
    config = ServerConfig(EngineConfig("base"), api_key_sha256=hash_key(KEY))
    with running(create_app(_engine, all_tokenizers, config)) as url:
        yield url


@pytest.fixture
def client(url: str, engine: FakeEngine) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture
def http(url: str, engine: FakeEngine) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=10) as http:
        yield http


@pytest.fixture
def open_house(
    tmp_path: Path, engine: FakeEngine, all_tokenizers: Tokenizers
) -> Iterator[Callable[..., House]]:
    """Opens a server with tenants; arguments are acme's limits."""
    with contextlib.ExitStack() as stack:
        yield lambda **acme: stack.enter_context(opened(tmp_path, engine, all_tokenizers, **acme))


@pytest.fixture
def house(open_house: Callable[..., House]) -> House:
    return open_house()


@pytest.fixture(scope="module")
def quiet_house(
    tmp_path_factory: pytest.TempPathFactory, _engine: FakeEngine, all_tokenizers: Tokenizers
) -> Iterator[House]:
    """For tests that are refused, and change nothing."""
    with opened(tmp_path_factory.mktemp("house"), _engine, all_tokenizers) as house:
        yield house
