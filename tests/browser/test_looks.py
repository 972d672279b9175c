"""A phone's width, light and dark, no motion for who wants none."""

from __future__ import annotations

import pytest
from console_server import ACME, ADMIN

pytestmark = pytest.mark.browser

PHONE = {"width": 360, "height": 740}
TABS = ("Models", "Tenants", "Live", "Playground")

# WCAG's contrast of each text that is seen with what is behind it; gives those below 4.5.
POOR_CONTRAST = """() => {
  const parse = (colour) => {
    const numbers = colour.match(/[\\d.]+/g).map(Number);
    const whole = colour.startsWith("color(") ? 1 : 255;
    return [...numbers.slice(0, 3).map((one) => one / whole), numbers[3] ?? 1];
  };
  const luminance = ([r, g, b]) => [r, g, b]
    .map((one) => (one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4))
    .reduce((sum, one, index) => sum + one * [0.2126, 0.7152, 0.0722][index], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = parse(getComputedStyle(node).backgroundColor);
      if (colour[3] === 1) return colour;
    }
    return [1, 1, 1, 1];
  };
  const poor = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((one) => one.nodeType === 3 && one.data.trim());
    if (!own || !node.checkVisibility() || node.closest(".unseen")) continue;
    const style = getComputedStyle(node);
    const front = parse(node.closest("svg") ? style.fill : style.color);
    const pair = [front, behind(node)].map(luminance);
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (ratio < 4.5) poor.push(`${node.className} ${node.textContent.slice(0, 40)}: ${ratio}`);
  }
  return poor;
}"""


def look_everywhere(page, check):
    """Calls ``check(where)`` in all views and in the dialogs with most in them."""
    for tab in TABS:
        page.tab(tab)
        page.page.wait_for_load_state("networkidle")
        check(tab)
        if tab == "Models":
            for title in ("acme/support", "Publish a delta"):
                page.button(title).click()
                check(title)
                page.press("Escape")
        if tab == "Tenants":
            for title in ("acme", "Create a tenant"):
                page.button(title).click()
                check(title)
                page.press("Escape")
    page.page.get_by_label("Prompt").fill("copy: x")
    page.page.get_by_label("Temperature").fill("warm")
    page.expected = ("400 (Bad Request)",)
    page.button("Ask").click()
    page.sees("failed.")
    check("errors")
    page.page.locator("#keys").click()
    check("keys")
    page.press("Escape")


def test_on_a_phone_nothing_is_wider_than_the_screen(server, visit):
    long = "acme/" + "long-name-" * 12
    server.publish(long, "one")
    page = visit(server, ADMIN, ACME, viewport=PHONE, has_touch=True)
    page.button(long).wait_for()
    wide = []
    look_everywhere(page, lambda where: page.sideways() > 0 and wide.append(where))
    assert wide == []
    server.admin("DELETE", f"/v1/deltas/{long}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(server, visit, scheme):
    server.generate("acme/support", tokens=60)
    page = visit(server, ADMIN, ACME, color_scheme=scheme)
    background = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(one) for one in background[4:-1].split(",")) / 3
    assert brightness < 60 if scheme == "dark" else brightness > 200
    poor = []
    look_everywhere(page, lambda where: poor.extend(page.page.evaluate(POOR_CONTRAST)))
    assert poor == []


def test_colours_can_be_chosen_and_stay_chosen(server, visit):
    page = visit(server, color_scheme="light")
    look = "getComputedStyle(document.body).backgroundColor"
    light = page.page.evaluate(look)
    page.page.get_by_label("Colours").select_option("Dark")
    dark = page.page.evaluate(look)
    page.page.reload()
    assert page.page.evaluate(look) == dark != light


@pytest.mark.parametrize(("motion", "moves"), [("reduce", False), ("no-preference", True)])
def test_nothing_moves_for_who_wants_no_motion(server, visit, motion, moves):
    page = visit(server, ACME, tab="Playground", reduced_motion=motion)
    page.page.get_by_label("Prompt").fill("copy: x")
    page.page.get_by_label("Max tokens").fill("200")
    page.button("Ask").click()
    page.page.locator(".answer.running").first.wait_for()
    assert page.page.evaluate("document.getAnimations().length > 0") == moves
    page.button("Stop all").click()
    page.sees("stopped.")
