"""Signing in: who sees what, and where keys are kept."""

from __future__ import annotations

import pytest
from console_server import ACME, ADMIN

pytestmark = pytest.mark.browser

STORED = "[sessionStorage, localStorage].map((one) => JSON.stringify({...one}))"


def tabs(page):
    shown = page.page.get_by_role("tab")
    shown.first.wait_for()
    return shown.all_inner_texts()


def test_a_wrong_key_opens_nothing(server, visit):
    page = visit(server)
    page.expected = ("401 (Unauthorized)",)
    for wrong in ("sk-wrong", "ключ"):
        page.page.get_by_label("API key").fill(wrong)
        page.button("Use this key").click()
        page.sees("The server does not know this key.")
    assert page.page.get_by_role("tab").count() == 0
    page.page.get_by_label("API key").fill("")
    page.button("Use this key").click()
    page.sees("Paste a key first.")


def test_a_key_is_kept_for_the_tab_only_and_forgotten_when_asked(server, visit):
    page = visit(server, ACME)
    assert tabs(page) == ["Models", "Usage", "Playground"]
    in_session, in_local = page.page.evaluate(STORED)
    assert ACME in in_session
    assert ACME not in in_local
    assert all(ACME not in url for url in page.requested)
    page.page.reload()
    assert tabs(page) == ["Models", "Usage", "Playground"]
    other = page.context.new_page()  # another tab knows nothing
    other.goto(f"{server.url}/console")
    other.get_by_label("API key").wait_for()
    page.page.locator("#keys").click()
    page.button("Forget Tenant acme").click()
    page.page.get_by_role("heading", name="Sign in").wait_for()
    assert page.page.get_by_role("tab").count() == 0
    assert ACME not in "".join(page.page.evaluate(STORED))


def test_a_tenant_finds_only_what_is_its_own(server, visit):
    server.publish("globex/secret", "two")
    page = visit(server, ACME)
    page.row("acme/support").wait_for()
    page.button("acme/support").click()
    page.dialog("acme/support").get_by_text("v1/completions").wait_for()
    shown = page.text()
    for absent in ("globex", "Publish", "Unload", "Roll back", "Versions"):
        assert absent not in shown
    page.press("Escape")
    page.tab("Usage")
    page.sees("Usage of acme")
    page.page.goto(f"{server.url}/console#live")  # the address opens no more than the tabs do
    page.page.reload()
    page.row("acme/support").wait_for()
    guarded = ("/v1/deltas", "/v1/tenants", "/v1/keys", "/metrics", "/v1/audit", "/v1/stats")
    assert not [url for url in page.requested if any(path in url for path in guarded)]
    server.admin("DELETE", "/v1/deltas/globex/secret")


def test_the_administrator_is_told_that_the_playground_needs_a_tenants_key(server, visit):
    page = visit(server, ADMIN, tab="Playground")
    assert tabs(page) == ["Models", "Tenants", "Live", "Playground"]
    page.sees("The admin key manages and cannot generate.")
    page.button("Enter a key").click()
    page.page.get_by_label("API key").fill(ACME)
    page.button("Use this key").click()
    page.page.get_by_label("Prompt").wait_for()
    assert page.page.locator("#keys").inner_text() == "Admin + Tenant acme"


def test_a_key_that_is_revoked_meanwhile_leads_back_to_the_door(server, visit):
    made = server.admin("POST", "/v1/tenants/acme/keys", json={})
    page = visit(server, made["key"])
    page.row("acme/support").wait_for()
    page.expected = ("401 (Unauthorized)",)
    server.admin("DELETE", f"/v1/keys/{made['id']}")
    page.page.get_by_role("heading", name="Sign in").wait_for()
    page.sees("no longer taken by the server")
