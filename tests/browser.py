"""A headless Chromium, driven by Playwright: one page to look at, new pages to click through."""

import shutil
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

__all__ = ["Browser", "find_browser"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
# Without a sandbox because containers run as root, the pages being our own; and without calls to its maker.
_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
_REPORTED = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Network.requestWillBeSent")


def find_browser() -> str | None:
    """The path of an installed Chromium or Chrome."""
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    return path or (str(_MAC) if _MAC.exists() else None)


class Browser:
    """A browser with one page. `events` holds whatever it reported of that page, as (method, parameters)."""

    def __init__(self, executable: str) -> None:
        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(executable_path=executable, args=_FLAGS)
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.page = self.new_page()
        self._session = self.page.context.new_cdp_session(self.page)
        for method in _REPORTED:
            self._session.on(method, lambda parameters, method=method: self.events.append((method, parameters)))
        for domain in ("Runtime", "Log", "Network", "Accessibility"):
            self.send(f"{domain}.enable")

    def new_page(self, **context: Any) -> Page:
        """A page of a new window, which shares nothing with others; its context is to be closed by who asks for it."""
        page = self._browser.new_context(**context).new_page()
        page.set_default_timeout(300_000)
        return page

    def close(self) -> None:
        """End the browser."""
        self._browser.close()
        self._playwright.stop()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol about the page and return its result."""
        return dict(self._session.send(method, parameters))

    def open(self, path: Path) -> None:
        """Load a file and wait until it has loaded; earlier events are forgotten."""
        self.events.clear()
        self.page.goto(path.as_uri())

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self.page.evaluate(expression)

    def press(self, *keys: str) -> None:
        """Press and release keys, each by its DOM name."""
        for key in keys:
            self.page.keyboard.press(key)

    def show_as(self, width: int, height: int, dark: bool = False) -> None:
        """Give the page a size in CSS pixels and a colour scheme."""
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.emulate_media(color_scheme="dark" if dark else "light")

    def screenshot(self, path: Path) -> None:
        """Write what is seen now as a PNG."""
        self.page.screenshot(path=path)
