"""Charts of a server at work, and a server that goes away."""

from __future__ import annotations

import threading

import pytest
from console_server import ADMIN, ConsoleServer

pytestmark = pytest.mark.browser


def chart(page, title):
    return page.page.get_by_role("figure").filter(has=page.page.get_by_role("heading", name=title))


def test_charts_show_what_happens(server, visit):
    page = visit(server, ADMIN, tab="Live")
    chart(page, "Time to first token").get_by_text(
        "Nothing yet: it begins with the next request."
    ).wait_for()
    busy = [
        threading.Thread(target=server.generate, args=(model, 200))
        for model in ("base", "acme/support")
    ]
    for thread in busy:
        thread.start()
    throughput = chart(page, "Throughput")
    page.page.wait_for_function(
        "() => document.querySelector('.tile dd').textContent.match(/^[1-9]/)"
    )
    for thread in busy:
        thread.join()
    for title in ("Throughput", "Queue", "Time to first token", "Time between tokens"):
        chart(page, title).locator("polyline").first.wait_for(state="attached")
    # The same in words, and value by value with the keys.
    area = throughput.get_by_role("group")
    described = page.page.locator(f"#{area.get_attribute('aria-describedby')}").text_content()
    assert "Generated: now" in described
    assert "Prompts: now" in described
    area.focus()
    page.press("ArrowLeft")
    spoken = throughput.locator("[aria-live]")
    assert "Generated" in spoken.text_content()
    page.press("ArrowLeft")
    assert " s ago: Generated" in spoken.text_content()


def test_a_server_that_goes_away_is_missed_and_found_again(files, visit, tmp_path):
    state = tmp_path / "own"
    state.mkdir()
    for name in ("base", "deltas", "tenants.yaml"):
        (state / name).symlink_to(files / name)
    server = ConsoleServer(state)
    server.publish("acme/kept", "one")
    page = visit(server, ADMIN)
    page.row("acme/kept").wait_for()
    page.expected = ("net::ERR", "Failed to load resource")
    server.kill()
    page.sees("Disconnected from the server.")
    assert page.row("acme/kept").is_visible()  # what was known stays to be read
    page.button("Publish a delta").click()
    page.page.get_by_label("Name").fill("acme/x")
    page.page.get_by_label("Path").fill("one")
    page.button("Publish").click()
    page.sees("The connection to the server was lost.")
    page.press("Escape")
    server.start()
    page.page.get_by_text("Disconnected from the server.").wait_for(state="hidden")
    page.sees("Ready")
    server.publish("acme/later", "two")
    page.row("acme/later").wait_for()
    page.leave()
    server.close()


def test_a_server_that_still_loads_is_waited_for(server, visit):
    page = visit(server, ADMIN)
    page.row("acme/support").wait_for()
    page.expected = ("503 (Service Unavailable)",)
    loading = {"error": {"message": "the models are being loaded"}}
    page.page.route("**/ready", lambda route: route.fulfill(status=503, json=loading))
    page.page.route("**/version", lambda route: route.fulfill(json={"version": "1"}))
    page.page.reload()
    page.sees("The server is starting: the models are being loaded.")
    page.page.unroute_all()
    page.row("acme/support").wait_for()
    page.page.get_by_text("The server is starting").wait_for(state="hidden")


def test_a_server_without_keys_shows_all_but_management(files, visit):
    server = ConsoleServer(files, "--delta", f"own={files / 'deltas/one'}", keys=False)
    page = visit(server)
    page.row("own").wait_for()
    assert page.page.get_by_role("tab").all_inner_texts() == ["Models", "Live", "Playground"]
    assert page.button("Publish a delta").count() == 0
    page.tab("Live")
    page.page.get_by_text("Tokens per second", exact=True).wait_for()
    page.tab("Playground")
    page.page.get_by_label("own").wait_for()
    page.page.get_by_label("Prompt").fill("copy: x")
    page.button("Ask").click()
    page.sees("2 done.")
    page.leave()
    server.close()
