"""The console as a person uses it: what is seen and named, not how it is built."""

from __future__ import annotations

from typing import Any

from console_server import ConsoleServer

PATIENCE_MS = 30_000


class ConsolePage:
    def __init__(self, context: Any, server: ConsoleServer) -> None:
        self.server = server
        self.context = context
        self.complaints: list[str] = []
        self.requested: list[str] = []
        self.expected: tuple[str, ...] = ()
        """Parts of the browser's own messages that a test provokes: Chromium reports answers such
        as 401 in the console."""
        context.set_default_timeout(PATIENCE_MS)
        page = self.page = context.new_page()
        page.on("request", lambda request: self.requested.append(request.url.removeprefix("blob:")))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: self.complaints.append(f"a dialog: {dialog.message}"))
        page.on("console", self._hear)

    def _hear(self, message: Any) -> None:
        if not any(part in message.text for part in self.expected):
            self.complaints.append(f"{message.type}: {message.text}")

    def leave(self) -> None:
        """Before its server goes."""
        self.page.goto("about:blank")

    def close(self) -> None:
        self.context.close()

    # -- what a person does ------------------------------------------------------------------

    def enter(self, *keys: str, tab: str = "") -> None:
        self.page.goto(f"{self.server.url}/console")
        for count, key in enumerate(keys):
            if count:
                self.page.locator("#keys").click()
            self.page.get_by_label("API key").fill(key)
            self.button("Use this key").click()
            self.button("Use this key").wait_for(state="detached")
        if tab:
            self.tab(tab)

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def button(self, name: str, exact: bool = True) -> Any:
        return self.page.get_by_role("button", name=name, exact=exact)

    def dialog(self, title: str) -> Any:
        return self.page.get_by_role("dialog", name=title, exact=True)

    def row(self, name: str) -> Any:
        """A row of the table that is seen, by the name in its first cell."""
        there = self.button(name)
        return self.page.get_by_role("row").filter(has=there)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    # -- what a person sees ------------------------------------------------------------------

    def text(self) -> str:
        return self.page.locator("body").inner_text()

    def sees(self, words: str) -> None:
        self.page.get_by_text(words).first.wait_for()

    def focused(self) -> str:
        """Name or text of what has the focus."""
        return self.page.evaluate(
            "(document.activeElement.getAttribute('aria-label') ?? document.activeElement.innerText"
            " ?? '').trim()"
        )

    def sideways(self) -> int:
        """Pixels that the page, or a dialog in it, can be scrolled sideways."""
        return self.page.evaluate(
            "Math.max(...[document.documentElement, ...document.querySelectorAll('dialog')]"
            ".map((one) => one.scrollWidth - one.clientWidth))"
        )
