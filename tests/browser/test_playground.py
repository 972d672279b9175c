"""The playground: several models answer one prompt, side by side."""

from __future__ import annotations

import pytest
from console_server import ACME, ADMIN

pytestmark = pytest.mark.browser

PROMPT = "reverse: abc"

# Whose answer grew, in the order of time.
WATCH = """() => {
  window.grown = [];
  new MutationObserver((changes) => {
    for (const { target } of changes) {
      if (target.matches(".answer-text")) window.grown.push(target.getAttribute("aria-label"));
    }
  }).observe(document.querySelector(".answers"), { childList: true, subtree: true });
}"""
# A part of each of two answers is there.
BEGUN = """() => [...document.querySelectorAll('.answer-text')]
  .filter((one) => one.textContent).length > 1"""


@pytest.fixture
def page(server, visit):
    page = visit(server, ACME, tab="Playground")
    page.page.get_by_label("acme/support").wait_for()
    page.page.get_by_label("Ask as").select_option("Completion")
    page.page.get_by_label("Prompt").fill(PROMPT)
    return page


def column(page, model):
    return page.page.get_by_role("article").filter(
        has=page.page.get_by_role("heading", name=model, exact=True)
    )


def answer(page, model):
    return page.page.get_by_role("region", name=f"Answer of {model}")


def fact(page, model, name):
    term = column(page, model).get_by_text(name, exact=True)
    return term.locator("xpath=following-sibling::dd").inner_text()


def asked_of_the_api(server, model, tokens):
    body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0}
    return server.ask(ACME, "POST", "/v1/completions", json=body).json()


def test_two_models_answer_side_by_side_as_the_api_does(server, page):
    page.page.get_by_label("Max tokens").fill("100")
    page.page.evaluate(WATCH)
    page.button("Ask").click()
    page.sees("2 done.")
    grown = page.page.evaluate("window.grown")
    base = [at for at, model in enumerate(grown) if model == "Answer of base"]
    other = [at for at, model in enumerate(grown) if model == "Answer of acme/support"]
    assert len(base) > 5  # piece by piece
    assert len(other) > 5
    assert base[0] < other[-1]  # and both at once
    assert other[0] < base[-1]
    first, second = (column(page, model).bounding_box() for model in ("base", "acme/support"))
    assert first["y"] == second["y"]
    assert first["x"] + first["width"] < second["x"]
    texts = []
    for model in ("base", "acme/support"):
        expected = asked_of_the_api(server, model, 100)
        texts.append(answer(page, model).text_content())
        assert texts[-1] == expected["choices"][0]["text"]
        count = expected["usage"]["completion_tokens"]
        assert fact(page, model, "Generated") == f"{count} tokens"
        prompt = fact(page, model, "Prompt")
        assert prompt.startswith(f"{expected['usage']['prompt_tokens']} tokens")
        assert fact(page, model, "First token").endswith("s")
        assert fact(page, model, "In all").endswith("s")
        assert fact(page, model, "Speed").endswith("tokens/s")
        ended = {"stop": "ended by itself", "length": "reached max tokens"}
        reason = ended[expected["choices"][0]["finish_reason"]]
        column(page, model).get_by_text(f"Done: {reason}.").wait_for()
    assert texts[0] != texts[1]


def test_chat_is_asked_with_the_template(server, page):
    page.page.get_by_label("Ask as").select_option("Chat")
    page.page.get_by_label("Max tokens").fill("20")
    page.button("Ask").click()
    page.sees("2 done.")
    body = {
        "model": "base", "max_tokens": 20, "temperature": 0,
        "messages": [{"role": "user", "content": PROMPT}],
    }  # fmt: skip
    expected = server.ask(ACME, "POST", "/v1/chat/completions", json=body).json()
    assert answer(page, "base").text_content() == expected["choices"][0]["message"]["content"]


def stop(page, name):
    """Asks, and presses the button as soon as both answer: these models are faster than hands."""
    page.button("Ask").click()
    page.page.wait_for_function(
        f"""() => {{
          const begun = ({BEGUN})();
          const named = (one) => (one.ariaLabel ?? one.innerText) === "{name}";
          if (begun) [...document.querySelectorAll("button")].find(named).click();
          return begun;
        }}"""
    )


def test_answers_are_stopped_here_and_on_the_server(server, page):
    page.page.get_by_label("Max tokens").fill("240")
    stop(page, "Stop base")
    column(page, "base").get_by_text("Stopped by you").wait_for()
    page.sees("1 done, 1 stopped.")
    stop(page, "Stop all")
    page.sees("2 stopped.")
    assert page.button("Ask").is_visible()
    metrics = server.ask(ADMIN, "GET", "/metrics").text
    running = next(line for line in metrics.splitlines() if "requests_running{" in line)
    assert running.endswith(" 0.0")
    for model in ("base", "acme/support"):
        whole = asked_of_the_api(server, model, 240)["choices"][0]["text"]
        part = answer(page, model).text_content()
        assert whole.startswith(part)
        assert 0 < len(part) < len(whole)


def test_an_error_stands_in_its_column_and_the_others_go_on(server, page):
    server.publish("acme/gone", "two")
    page.page.get_by_label("acme/gone").wait_for()
    page.page.get_by_label("acme/gone").check()
    page.page.get_by_label("acme/support").uncheck()
    page.page.get_by_label("Max tokens").fill("12")
    server.admin("DELETE", "/v1/deltas/acme/gone")
    page.expected = ("404 (Not Found)", "400 (Bad Request)")
    page.button("Ask").click()
    column(page, "acme/gone").get_by_text("does not exist").wait_for()
    page.sees("1 done, 1 failed.")
    assert answer(page, "base").text_content()
    page.page.get_by_label("Temperature").fill("warm")
    page.button("Ask").click()
    column(page, "base").get_by_text("temperature").wait_for()


def test_it_says_what_is_missing_before_it_asks(page):
    page.page.get_by_label("Prompt").fill("")
    page.button("Ask").click()
    page.sees("Write a prompt first.")
    for box in page.page.get_by_role("checkbox").all():
        box.uncheck()
    page.button("Ask").click()
    page.sees("Choose a model first.")
    assert not [url for url in page.requested if "completions" in url]
