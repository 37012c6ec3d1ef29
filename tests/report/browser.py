"""Headless Chromium for the tests, over its DevTools protocol on a pair of pipes.

``with Browser() as browser: page = browser.open(path, width=400)``. Debian's package is
``chromium-headless-shell``; `CHROMIUM` is None where there is none.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in _NAMES if (found := shutil.which(name))), None)


class Browser:
    """One browser process with one page."""

    def __init__(self) -> None:
        self._files = contextlib.ExitStack()
        profile = self._files.enter_context(tempfile.TemporaryDirectory())
        from_us, self._write = os.pipe()
        self._read, to_us = os.pipe()
        # Chromium reads commands from descriptor 3 and writes to 4.
        redirected = f'exec "$@" 3<&{from_us} 4>&{to_us}'
        # Root in a container has no sandbox, and /dev/shm may be small there.
        flags = "--headless --remote-debugging-pipe --no-sandbox --disable-dev-shm-usage "
        flags += "--disable-gpu --hide-scrollbars"
        command = [CHROMIUM or "chromium", *flags.split(), f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            ["bash", "-c", redirected, "bash", *command],
            pass_fds=(from_us, to_us),
            stderr=subprocess.DEVNULL,
        )
        os.close(from_us)
        os.close(to_us)
        self._number, self._received = 0, b""
        self.events: list[dict[str, Any]] = []
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        attached = self._send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)
        with contextlib.suppress(OSError):  # a child of it may still be writing there
            self._files.close()

    def open(self, page: Path, *, width: int, height: int = 900) -> None:
        """Load a file into a window of that many CSS pixels; a narrow one is a phone's."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 700,
        )
        self.events.clear()
        self.send("Page.navigate", url=page.resolve().as_uri())
        self._until(lambda event: event["method"] == "Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def requests(self) -> list[str]:
        """What the last page asked for, itself and embedded data left out."""
        urls = [
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in urls[1:] if not url.startswith("data:")]

    def complaints(self) -> list[str]:
        """Errors and warnings in the console."""
        return [
            event["params"]["entry"]["text"]
            for event in self.events
            if event["method"] == "Log.entryAdded"
        ]

    def screenshot(self) -> bytes:
        """PNG of the whole page, not just of the window."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        return base64.b64decode(shot["data"])

    def pdf(self) -> bytes:
        """The page as printed."""
        return base64.b64decode(self.send("Page.printToPDF", printBackground=False)["data"])

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command to the page; its answer."""
        return self._send(method, session=self._session, **parameters)

    def _send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _until(self, wanted: Any, timeout: float = 60) -> None:
        end = time.monotonic() + timeout
        while not any(map(wanted, self.events)):
            assert time.monotonic() < end, "the page does not load"
            self._next()

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            more = os.read(self._read, 2**16)
            assert more, f"{CHROMIUM} ended with {self._process.wait()}"
            self._received += more
        text, _, self._received = self._received.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message
