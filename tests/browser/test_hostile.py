"""Names, paths and answers are whatever somebody else wrote: they are text, never markup.

Names of models are strict, so a server that has lost its mind is played by changing its answers on
the way to the browser.
"""

from __future__ import annotations

import json

import pytest
from console_server import ACME, ADMIN, HOSTILE

pytestmark = pytest.mark.browser

SCRIPT = "</textarea><script>alert(2)</script><svg onload=alert(3)>\u202egnp.exe\x00"


def changed(page, path, change):
    """What the server answers at ``path`` passes through ``change(text)``."""

    def handle(route):
        answer = route.fetch()
        route.fulfill(response=answer, status=200, body=change(answer.text()))

    page.page.route(path, handle)


def check_harmless(page):
    assert page.page.locator("img, script:not([src]), svg[onload], iframe").count() == 0
    assert page.page.evaluate("document.querySelectorAll('[onerror], [onload]').length") == 0


def test_names_and_paths_are_text(server, visit):
    server.publish("acme/hostile", HOSTILE)  # a real folder of that name
    page = visit(server, ADMIN)
    changed(page, "**/v1/models", lambda text: text.replace("acme/support", HOSTILE))
    page.button(HOSTILE).wait_for()
    page.button(HOSTILE).click()
    page.dialog(HOSTILE).wait_for()
    check_harmless(page)
    page.press("Escape")
    page.button("acme/hostile").click()
    page.dialog("acme/hostile").get_by_text(f"{HOSTILE} ·").wait_for()
    page.button("Unload …").click()
    check_harmless(page)
    page.button("Unload it").click()
    page.row("acme/hostile").wait_for(state="detached")


def test_what_the_server_says_is_text(server, visit):
    page = visit(server, ADMIN)
    page.expected = ("400 (Bad Request)",)
    page.button("Publish a delta").click()
    page.page.get_by_label("Name").fill(HOSTILE)
    page.page.get_by_label("Path").fill(SCRIPT)
    page.button("Publish").click()
    page.sees("cannot be a model's name")
    assert HOSTILE in page.text()
    check_harmless(page)


def test_answers_and_models_in_the_playground_are_text(server, visit):
    page = visit(server, ACME)
    part = {"choices": [{"index": 0, "text": HOSTILE + SCRIPT, "finish_reason": None}]}
    stream = f"data: {json.dumps(part)}\n\ndata: [DONE]\n\n"
    changed(page, "**/v1/completions", lambda _: stream)
    changed(page, "**/v1/models", lambda text: text.replace("acme/support", HOSTILE))
    page.tab("Playground")
    page.page.get_by_label("Ask as").select_option("Completion")
    page.page.get_by_label("Prompt").fill(SCRIPT)
    page.button("Ask").click()
    page.sees("2 done.")
    answers = page.page.locator(".answer-text").all_inner_texts()
    assert len(answers) == 2
    assert all(HOSTILE in answer and "alert(2)" in answer for answer in answers)
    check_harmless(page)


def test_the_browser_would_refuse_markup_and_strangers_anyway(server, visit):
    page = visit(server)
    page.expected = ("Content Security Policy", "requires 'Trusted")
    tries = {
        "markup": "document.body.innerHTML = '<b>x</b>'",
        "strangers": "fetch('http://127.0.0.2:9/')",
        "evaluated text": "setTimeout('alert(1)')",
    }
    for script in tries.values():
        failed = page.page.evaluate(
            f"async () => {{ try {{ await ({script}); }} catch {{ return true }} }}"
        )
        assert failed
    page.requested = [url for url in page.requested if "127.0.0.2" not in url]
