"""Checks of HTML pages: hostile text, the tags of a page, and errors that a browser reports."""

from html.parser import HTMLParser
from typing import Any

from tests.browser import Browser

__all__ = ["HOSTILE", "Tags", "assert_no_script_gets_in", "complaints"]

HOSTILE = "</script><script>window.hacked=1</script><!--<img src=x onerror='window.hacked=1'>\"> \u2028 ]]> {{ 7*7 }}"


class Tags(HTMLParser):
    """Every tag with its attributes, and the texts between scripts' tags, as a browser would split them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts.append(data)
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def complaints(browser: Browser) -> list[Any]:
    """Errors, console lines, refused loads, and requests other than for the page itself."""
    bad = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    addresses = [p["request"]["url"] for method, p in browser.events if method == "Network.requestWillBeSent"]
    addresses = [address for address in addresses if not address.startswith("data:")]
    return [event for event in browser.events if event[0] in bad] + addresses[1:]


def assert_no_script_gets_in(browser: Browser) -> None:
    """Markup, scripts and addresses that are put into the open page are refused by its own policy."""
    browser.run("""document.body.insertAdjacentHTML('beforeend', "<img src='data:,' onerror='window.hacked=1'>")""")
    browser.run("document.body.append(Object.assign(document.createElement('script'), {text: 'window.hacked=1'}))")
    browser.run("document.body.append(Object.assign(new Image(), {src: 'https://example.invalid/'}))")

    def refusals() -> int:
        texts = [p["entry"]["text"] for method, p in browser.events if method == "Log.entryAdded"]
        return sum("Content Security Policy" in text for text in texts)

    for _ in range(300):  # a minute at most, on a busy machine
        browser.run("new Promise(done => setTimeout(done, 200))")
        if refusals() >= 3:
            break
    assert refusals() == 3
    assert browser.run("typeof window.hacked") == "undefined"
