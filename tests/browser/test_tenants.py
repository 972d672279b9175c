"""Tenants and keys, made and ended in the console; what the keys open is asked of the API."""

from __future__ import annotations

import httpx
import pytest
from console_server import ACME, ADMIN, HOSTILE

pytestmark = pytest.mark.browser


@pytest.fixture
def page(server, visit):
    return visit(server, ADMIN, tab="Tenants")


def opens(server, key):
    return server.ask(key, "GET", "/v1/models").status_code


def new_key(page, title):
    """The key that is shown, once."""
    dialog = page.dialog(title)
    key = dialog.get_by_role("status").inner_text()
    page.button("Done").click()
    # The dialog's role is gone at once, its element with the close event that follows.
    page.page.get_by_text(key).wait_for(state="detached")
    assert key not in page.page.content()
    return key


def test_a_tenant_and_its_keys_live_their_lives(server, page):
    page.button("Create a tenant").click()
    page.page.get_by_label("Name").fill("globex")
    page.page.get_by_role("textbox", name="Models").fill("globex/*, base")
    page.page.get_by_label("Tokens per month (UTC)").fill("5 000 000")
    page.button("Create").click()
    first = new_key(page, "The key of globex")
    assert opens(server, first) == 200
    tenant = server.admin("GET", "/v1/tenants/globex")
    assert tenant["models"] == ["globex/*", "base"]
    assert (tenant["monthly_token_budget"], tenant["rpm_limit"]) == (5_000_000, None)

    page.button("globex").click()
    details = page.dialog("globex")
    details.get_by_text("0 of 5M").wait_for()
    page.button("Create a key …").click()
    page.page.get_by_label("What it is for (optional)").fill(HOSTILE)
    page.page.get_by_label("Valid for").fill("90d")
    page.button("Create the key").click()
    second = new_key(page, "A key for globex")
    details.get_by_text(HOSTILE).wait_for()
    assert page.page.locator("img").count() == 0
    assert opens(server, second) == 200

    row = details.get_by_role("listitem").filter(has_text=HOSTILE)
    row.get_by_role("button", name="Rotate").click()
    page.page.get_by_label("The old key still works").select_option("no longer: it ends at once")
    page.button("Rotate").click()
    third = new_key(page, "The new key")
    assert [opens(server, key) for key in (first, second, third)] == [200, 401, 200]

    row = details.get_by_role("listitem").filter(has_text=HOSTILE).filter(has_text="Open")
    row.get_by_role("button", name="Revoke").click()
    page.button("Revoke it").click()
    page.sees("The key is revoked.")
    assert [opens(server, key) for key in (first, third)] == [200, 401]

    page.button("Change …").click()
    page.page.get_by_label("Requests per minute").fill("30")
    page.button("Save").click()
    details.get_by_text("0 of 30").wait_for()
    assert server.admin("GET", "/v1/tenants/globex")["rpm_limit"] == 30
    page.button("Block …").click()
    page.button("Block it").click()
    page.button("Unblock").wait_for()
    assert opens(server, first) == 403
    page.button("Delete …").click()
    page.button("Delete it").click()
    page.row("globex").wait_for(state="detached")
    assert server.ask(ADMIN, "GET", "/v1/tenants/globex").status_code == 404


def test_what_is_wrong_is_said_at_its_field(page):
    page.expected = ("400 (Bad Request)", "409 (Conflict)")
    page.button("Create a tenant").click()
    page.page.get_by_label("Name").fill("acme")
    page.page.get_by_label("Requests per minute").fill("many")
    page.button("Create").click()
    page.sees("Rpm_limit: Input should be a valid integer")
    assert page.page.get_by_label("Requests per minute").get_attribute("aria-invalid") == "true"
    page.page.get_by_label("Requests per minute").fill("")
    page.button("Create").click()
    page.sees("There is a tenant 'acme' already")


def test_a_tenant_of_the_file_cannot_be_changed_here(page):
    page.button("acme").click()
    page.sees("This tenant comes from the server's tenants file")
    for absent in ("Change …", "Block …", "Delete …"):
        assert page.button(absent).count() == 0


def test_a_tenant_sees_its_usage_and_its_limits(server, visit):
    server.generate("base")
    page = visit(server, ACME, tab="Usage")
    used = page.page.get_by_text("of 100K")
    used.wait_for()
    card = server.ask(ACME, "GET", "/v1/key").json()
    assert used.inner_text() == f"{card['tenant']['used']['daily_token_budget']:,} of 100K"
    page.page.get_by_role("cell", name="base", exact=True).wait_for()
    page.page.get_by_label("By", exact=True).select_option("By day")
    page.page.get_by_role("columnheader", name="Day").wait_for()
    with page.page.expect_download() as download:
        page.button("CSV").click()
    assert download.value.suggested_filename == "usage.csv"
    rows = download.value.path().read_text().splitlines()
    assert rows[0] == "day,requests,prompt_tokens,cached_tokens,completion_tokens"
    usage = httpx.get(
        f"{server.url}/v1/usage?group_by=day", headers={"authorization": f"Bearer {ACME}"}
    ).json()["data"]
    assert rows[1].split(",")[1] == str(usage[0]["requests"])
