"""The console's files, and what it asks of the API beside the routes that were there before."""

from __future__ import annotations

import re
from importlib.resources import files

import httpx
import pytest
from house import ACME, ADMIN, error_of

FOLDER = files("deltaserve.server") / "console"
NAMES = sorted(item.name for item in FOLDER.iterdir())


def test_the_page_is_open_and_holds_nothing(quiet_house):
    page = quiet_house.get(None, "/console")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert page.headers["cache-control"] == "no-cache"
    assert "acme" not in page.text
    assert quiet_house.get(None, "/console/").headers["location"] == "../console"


@pytest.mark.parametrize("name", NAMES)
def test_each_file_is_served_and_asked_for_again_only_if_it_changed(quiet_house, name):
    path = "/console" if name == "index.html" else f"/console/{name}"
    answer = quiet_house.get(None, path)
    assert answer.content == (FOLDER / name).read_bytes()
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = quiet_house.ask(None, "GET", path + "?").request
    again.headers["if-none-match"] = answer.headers["etag"]
    with httpx.Client() as client:
        assert client.send(again).status_code == 304


@pytest.mark.parametrize("name", ["../auth.py", "%2e%2e/auth.py", "x.js", "..%2fapp.py", "a/b.js"])
def test_nothing_else_is_served(quiet_house, name):
    error_of(quiet_house.get(None, f"/console/{name}"), 404)


@pytest.mark.parametrize("name", NAMES)
def test_files_need_nobody_else_and_no_inline_script(name):
    source = (FOLDER / name).read_text()
    assert len(source.splitlines()) < 350
    addresses = re.findall(r"https?://[^\s\"'`)]+", source)
    assert [url for url in addresses if not url.startswith("http://www.w3.org/")] == []
    if name.endswith(".html"):
        assert re.findall(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", source) == []
    if name.endswith(".js"):
        imported = re.findall(r'from "([^"]+)"', source)
        assert all(path.startswith("./") and path[2:] in NAMES for path in imported)
        assert (
            re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", source)
            == []
        )


def test_the_version_tells_what_key_is_needed(quiet_house, url, locked_url):
    assert quiet_house.get(None, "/version").json()["keys"] == "tenants"
    assert httpx.get(f"{url}/version").json()["keys"] == "none"
    assert httpx.get(f"{locked_url}/version").json()["keys"] == "one"


def test_a_key_is_told_whose_it_is_and_what_is_left(open_house):
    house = open_house(rpm_limit=10, daily_token_budget=1000)
    assert house.get(ADMIN, "/v1/key").json() == {"object": "key", "kind": "admin"}
    error_of(house.get("sk-wrong", "/v1/key"), 401)
    usage = house.complete(ACME).json()["usage"]
    card = house.get(ACME, "/v1/key").json()
    assert (card["kind"], card["tenant"]["id"], card["expires"]) == ("tenant", "acme", None)
    assert (card["tenant"]["rpm_limit"], card["tenant"]["used"]["rpm_limit"]) == (10, 1)
    assert card["tenant"]["used"]["daily_token_budget"] == usage["total_tokens"]
    assert card["tenant"]["used"]["max_parallel_requests"] == 0
    assert card["rpm_limit"] is None
    # How it stands beside others, and what keeps it apart from them, is not for it to know.
    shown = card.keys() | card["tenant"].keys()
    assert not shown & {"weight", "priority", "cache_salt", "blocked"}
    listed = house.get(ADMIN, "/v1/tenants").json()["data"]
    assert next(t for t in listed if t["id"] == "acme")["used"] == card["tenant"]["used"]
