"""A headless Chromium spoken to over a pipe in its own DevTools protocol: no driver, no package, no port."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["Browser", "find_browser"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
# Chromium reads commands from file 3 and answers on file 4; Python hands its own numbers over.
_START = """import fcntl, os, sys
ends = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for number, end in zip((3, 4), ends):
    os.dup2(end, number)
os.execv(sys.argv[3], sys.argv[3:])"""
_KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowUp": 38, "ArrowDown": 40}


def find_browser() -> str | None:
    """The path of an installed Chromium or Chrome."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    return found or (str(_MAC) if _MAC.exists() else None)


class Browser:
    """One page in a headless browser. `events` holds whatever the browser reported, as (method, parameters)."""

    def __init__(self, executable: str, profile: Path) -> None:
        self._count = 0
        self._received = b""
        self.events: list[tuple[str, dict[str, Any]]] = []
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        # Without a sandbox because containers run as root; the pages are our own.
        flags = [f"--user-data-dir={profile}"]
        flags += ["--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(commands), str(answers), executable, *flags],
            pass_fds=(commands, answers), stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands)
        os.close(answers)
        self._session: str | None = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        """End the browser and wait for it."""
        self._session = None
        self.send("Browser.close")
        self._process.wait(20)
        os.close(self._write)
        os.close(self._read)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come meanwhile are kept."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        number = self._count
        while (answer := self._receive()).get("id") != number:
            self.events.append((answer.get("method", ""), answer.get("params", {})))
        assert "error" not in answer, f"{method}: {answer['error']}"
        return dict(answer["result"])

    def open(self, path: Path) -> None:
        """Load a file and wait until it has loaded; earlier events are forgotten."""
        self.events.clear()
        self.send("Page.navigate", url=path.as_uri())
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            answer = self._receive()
            self.events.append((answer.get("method", ""), answer.get("params", {})))

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, *keys: str) -> None:
        """Press and release keys, each by its DOM name."""
        for key in keys:
            text = {"text": "\r" if key == "Enter" else key} if key in ("Enter", " ") else {}
            named = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": _KEYS[key]}
            self.send("Input.dispatchKeyEvent", type="keyDown", **named, **text)
            self.send("Input.dispatchKeyEvent", type="keyUp", **named)

    def show_as(self, width: int, height: int, dark: bool = False) -> None:
        """Give the page a size in CSS pixels and a colour scheme."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """Write what is seen now as a PNG."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def _receive(self) -> dict[str, Any]:
        """The next message, which ends in a zero byte."""
        while b"\0" not in self._received:
            assert select.select([self._read], [], [], 60)[0], "the browser has said nothing for a minute"
            chunk = os.read(self._read, 1 << 20)
            assert chunk, "the browser has ended"
            self._received += chunk
        message, _, self._received = self._received.partition(b"\0")
        return dict(json.loads(message))
