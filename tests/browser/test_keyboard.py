"""The console by keyboard alone."""

from __future__ import annotations

import pytest
from console_server import ACME, ADMIN

pytestmark = pytest.mark.browser

OUTLINED = """() => {
  const seen = document.activeElement.closest(".pick-list label") ?? document.activeElement;
  const style = getComputedStyle(seen);
  return style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
}"""


def sign_in(page, key):
    page.page.get_by_label("API key").wait_for()
    page.page.keyboard.type(key)  # the field has the focus from the start
    page.press("Enter")
    page.page.get_by_role("tab").first.wait_for()


def tab_to(page, name, limit=40):
    """Presses Tab until what is called so has the focus; all on the way shows that it has it."""
    for _ in range(limit):
        page.press("Tab")
        if page.page.evaluate("document.activeElement === document.body"):
            continue  # between the end of the page and its beginning
        assert page.page.evaluate(OUTLINED), page.focused()
        if page.focused() == name:
            return
    raise AssertionError(f"{name} cannot be reached; last was {page.focused()}")


def test_tabs_move_with_the_arrow_keys(server, visit):
    page = visit(server)
    sign_in(page, ADMIN)
    tab_to(page, "Models")
    order = []
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft", "Home", "End"):
        page.press(key)
        order.append(page.focused())
        chosen = page.page.get_by_role("tab", selected=True)
        assert chosen.inner_text() == order[-1]
        panel = page.page.get_by_role("tabpanel", name=order[-1])
        panel.wait_for()
        assert page.page.get_by_role("tabpanel").count() == 1
    assert order == [
        "Tenants", "Live", "Playground", "Models", "Playground", "Models", "Playground",
    ]  # fmt: skip


def test_a_delta_is_published_and_unloaded(server, visit):
    page = visit(server)
    sign_in(page, ADMIN)
    tab_to(page, "Publish a delta")
    page.press("Enter")
    page.dialog("Publish a delta").wait_for()
    for _ in range(12):  # focus stays inside
        page.press("Tab")
        assert page.page.evaluate("document.activeElement.closest('dialog') !== null")
    page.press("Escape")
    page.dialog("Publish a delta").wait_for(state="detached")
    assert page.focused() == "Publish a delta"
    page.press("Enter")
    page.page.keyboard.type("acme/typed")
    page.press("Tab")
    page.page.keyboard.type("two")
    page.press("Enter")
    page.sees("acme/typed is served as version 1.")
    page.dialog("Publish a delta").wait_for(state="detached")
    tab_to(page, "acme/typed")
    page.press("Enter")
    page.dialog("acme/typed").wait_for()
    tab_to(page, "Unload …")
    page.press("Enter")
    page.dialog("Unload acme/typed?").wait_for()
    tab_to(page, "Unload it")
    page.press("Space")
    page.sees("acme/typed is unloaded")
    page.dialog("acme/typed").wait_for(state="detached")


def test_models_are_asked(server, visit):
    page = visit(server)
    sign_in(page, ACME)
    assert page.focused() == "Models"
    page.press("End")
    page.page.get_by_label("acme/support").wait_for()
    for _ in range(10):
        page.press("Tab")
        if page.page.evaluate("document.activeElement.value") == "acme/support":
            break
    page.press("Space")
    assert not page.page.get_by_label("acme/support").is_checked()
    page.press("Tab")
    page.page.keyboard.type("reverse: abc")
    page.press("Control+Enter")
    page.sees("1 done.")
