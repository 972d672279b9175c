"""Models: listed, published, rolled back, pinned, unloaded. The API is asked what became of it."""

from __future__ import annotations

import time

import pytest
from console_server import ADMIN

pytestmark = pytest.mark.browser


@pytest.fixture
def page(server, visit):
    return visit(server, ADMIN)


def publish(page, name, path):
    page.button("Publish a delta").click()
    page.page.get_by_label("Name").fill(name)
    page.page.get_by_label("Path").fill(path)
    page.button("Publish").click()


def cells(page, name):
    row = page.row(name)
    row.wait_for()
    return [cell.inner_text() for cell in row.get_by_role("cell").all()]


def eventually(holds):
    """A message of an earlier step may still be seen, and says nothing about this one."""
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_is_served_is_listed(server, visit):
    server.generate("acme/support")
    page = visit(server, ADMIN)
    card = server.admin("GET", "/v1/models/acme/support")
    page.page.get_by_role("row", name="acme/support").get_by_text("Ready").wait_for()
    first = page.page.get_by_role("table").get_by_role("row").nth(1)
    assert first.inner_text().startswith("base")
    name, state, tier, memory, requests, version = cells(page, "acme/support")
    assert (name, state, tier, version) == ("acme/support", "Ready", "Device", "1")
    assert memory.split()[0] == f"{card['bytes']['resident'] / 1000:.0f}"
    usage = server.admin("GET", "/v1/usage?group_by=model")["data"]
    assert int(requests) == next(row["requests"] for row in usage if row["model"] == "acme/support")


def test_a_delta_lives_its_life(server, page):
    publish(page, "acme/new", "one")
    page.sees("acme/new is served as version 1.")
    assert cells(page, "acme/new")[-1] == "1"

    page.button("acme/new").click()
    details = page.dialog("acme/new")
    assert details.get_by_role("button", name="Roll back …").count() == 0  # nowhere to go yet
    details.get_by_role("button", name="Publish a new version …").click()
    assert page.page.get_by_label("Name").input_value() == "acme/new"
    page.page.get_by_label("Path").fill("two")
    page.button("Publish").click()
    page.sees("acme/new is served as version 2.")

    page.button("acme/new").click()
    details.get_by_role("button", name="Roll back …").click()
    page.button("Roll back to version 1").click()
    page.sees("acme/new is served as version 1 again.")
    eventually(lambda: server.admin("GET", "/v1/deltas/acme/new")["version"] == 1)

    details.get_by_role("button", name="Pin", exact=True).click()
    details.get_by_role("button", name="Unpin").wait_for()
    eventually(lambda: server.admin("GET", "/v1/deltas/acme/new")["pinned"])

    page.press("Escape")
    page.button("Publish a delta").click()  # a version that is registered, without its path
    page.page.get_by_label("Name").fill("acme/new")
    page.page.get_by_label("From").select_option("Version 2 (two)")
    assert not page.page.get_by_label("Path").is_visible()
    page.button("Publish").click()
    page.sees("acme/new is served as version 2.")
    eventually(lambda: server.admin("GET", "/v1/deltas/acme/new")["version"] == 2)

    page.button("acme/new").click()
    page.button("Forget version 1").click()
    page.button("Forget version 1").last.click()
    page.sees("Version 1 of acme/new is forgotten.")
    details.get_by_role("button", name="Unload …").click()
    page.button("Cancel").click()
    eventually(lambda: server.admin("GET", "/v1/deltas/acme/new")["state"] == "ready")
    details.get_by_role("button", name="Unload …").click()
    page.button("Unload it").click()
    page.sees("acme/new is unloaded and its memory is free.")
    page.row("acme/new").wait_for(state="detached")
    assert server.ask(ADMIN, "GET", "/v1/deltas/acme/new").status_code == 404


@pytest.mark.parametrize(
    ("name", "path", "label", "message"),
    [
        ("acme/x", "absent", "Path", "no directory inside"),
        ("bad name", "one", "Path", "cannot be a model's name"),
        ("", "one", "Name", "Give it a name."),
        ("acme/x", "", "Path", "Say where it is."),
    ],
)
def test_what_cannot_be_published_is_said_at_its_field(page, name, path, label, message):
    page.expected = ("400 (Bad Request)",)
    publish(page, name, path)
    field = page.page.get_by_label(label)
    page.sees(message)
    assert field.get_attribute("aria-invalid") == "true"
    described = field.get_attribute("aria-describedby").split()[-1]
    assert message in page.page.locator(f"#{described}").inner_text()
    assert page.button("acme/x").count() == 0


def test_models_are_found_and_sorted(server, page):
    server.publish("acme/zebra", "two")
    page.row("acme/zebra").wait_for()
    page.button("Model").click()  # downwards
    names = page.page.get_by_role("table").get_by_role("button").all_inner_texts()
    assert [name for name in names if "acme" in name] == ["acme/zebra", "acme/support"]
    page.page.get_by_label("Find a model").fill("zeb")
    page.row("acme/support").wait_for(state="detached")
    page.page.get_by_label("Find a model").fill("nothing like it")
    page.sees("No model matches: change the filter.")
    server.admin("DELETE", "/v1/deltas/acme/zebra")
