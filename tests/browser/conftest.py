"""Headless Chromium before a real server. Without a browser these tests are skipped, and say so."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from console_page import ConsolePage
from console_server import ConsoleServer, make_files

NO_BROWSER = "no Chromium: install Debian's chromium, or run `playwright install chromium`"


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="install deltaserve[browser]")
    with sync_api.sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        found = shutil.which("chromium") or (str(own) if own.exists() else None)
        if found is None:
            pytest.skip(NO_BROWSER)
        # Containers: the sandbox refuses to run as root, and /dev/shm is small.
        options = ["--disable-dev-shm-usage", *(["--no-sandbox"] if os.getuid() == 0 else [])]
        browser = playwright.chromium.launch(executable_path=found, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("console"))


@pytest.fixture(scope="session")
def server(files: Path, chromium: object) -> Iterator[ConsoleServer]:
    """With tenants; serves base and acme/support. Tests leave it as they found it."""
    server = ConsoleServer(files)
    server.publish("acme/support", "one")
    yield server
    server.close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., ConsolePage]]:
    """Opens the console in a fresh browser profile. What must never happen is looked for at the
    end: a request to somebody else, an error in the browser's console, a script that breaks."""
    pages: list[ConsolePage] = []

    def visit(server: ConsoleServer, *keys: str, tab: str = "", **options: object) -> ConsolePage:
        options.setdefault("viewport", {"width": 1280, "height": 900})
        page = ConsolePage(chromium.new_context(**options), server)
        pages.append(page)
        page.enter(*keys, tab=tab)
        return page

    yield visit
    for page in pages:
        page.close()
        assert page.complaints == []
        assert [url for url in page.requested if not url.startswith(page.server.url)] == []
