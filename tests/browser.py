"""Headless Chromium, driven by its DevTools protocol over two pipes: no driver, no port, no package."""

from __future__ import annotations

import base64
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import PATIENCE


class Browser:
    """A browser with a profile of its own, and one page. `complaints`: of the page's console, CSP violations included.

    Args:
        binary: of Debian's package `chromium`.
    """

    def __init__(self, binary: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        self.complaints: list[str] = []
        self._number, self._buffer, self._replies = 0, b"", dict[int, Any]()
        to_it, self._to = os.pipe()
        self._from, from_it = os.pipe()

        def as_3_and_4() -> None:
            high = [os.dup2(fd, 60 + n) for n, fd in enumerate((to_it, from_it))]
            for n, fd in enumerate(high):
                os.dup2(fd, 3 + n)

        # Root has no sandbox, and containers have a small /dev/shm.
        self._process = subprocess.Popen(
            [
                *(binary, "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-dev-shm-usage"),
                *("--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"),
                *("--force-color-profile=srgb", "--hide-scrollbars", f"--user-data-dir={self._profile.name}"),
                "--lang=en-GB",
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=as_3_and_4, close_fds=False, start_new_session=True,
        )  # fmt: skip
        os.close(to_it)
        os.close(from_it)
        self._session: str | None = None
        (page, *_) = [t for t in self.ask("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self.ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in "Page", "Runtime", "Log", "Network":
            self.ask(f"{domain}.enable")

    def close(self) -> None:
        os.close(self._to)
        os.close(self._from)
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(PATIENCE)
        self._profile.cleanup()

    # -- the protocol ----------------------------------------------------------------------------------------------

    def ask(self, method: str, **params: Any) -> Any:
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        deadline = time.monotonic() + PATIENCE
        while number not in self._replies:
            assert self._receive(deadline - time.monotonic()), f"the browser does not answer {method}"
        reply = self._replies.pop(number)
        assert "error" not in reply, f"{method}: {reply['error']}"
        return reply["result"]

    def _receive(self, within: float) -> bool:
        """Take the next message, if there is one in time."""
        while b"\0" not in self._buffer:
            if not select.select([self._from], [], [], max(0.0, within))[0]:
                return False
            received = os.read(self._from, 1 << 20)
            assert received, "the browser has ended"
            self._buffer += received
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        if "id" in message:
            self._replies[message["id"]] = message
        elif message["method"] == "Log.entryAdded":
            entry = message["params"]["entry"]
            self.complaints.append(f"{entry['level']}: {entry['text']} {entry.get('url', '')}")
        elif message["method"] == "Runtime.consoleAPICalled":
            self.complaints.append(str([each.get("value") for each in message["params"]["args"]]))
        elif message["method"] == "Runtime.exceptionThrown":
            self.complaints.append(str(message["params"]["exceptionDetails"]))
        return True

    # -- what a reader does ------------------------------------------------------------------------------------------

    def open(self, url: str) -> None:
        """Returns once all of the page is loaded."""
        assert "errorText" not in self.ask("Page.navigate", url=url)
        self.until(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, or of its promise, as JSON knows it."""
        params = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        result = self.ask("Runtime.evaluate", expression=script, **params)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, script: str) -> Any:
        """Wait until the expression is true, and return it."""
        return self.wait_for(lambda: self.run(script), script)

    @staticmethod
    def wait_for(condition: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + PATIENCE
        while not (found := condition()):
            assert time.monotonic() < deadline, f"it never became true: {what}"
            time.sleep(0.02)
        return found

    def press(self, key: str, code: int, *, shift: bool = False) -> None:
        """A key, as `press("Tab", 9)`."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in "keyDown", "keyUp":
            self.ask(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                modifiers=8 if shift else 0, **(text if kind == "keyDown" else {}),
            )  # fmt: skip

    def look_as(self, *, width: int = 1280, height: int = 900, dark: bool = False, zone: str = "UTC") -> None:
        """The size of the window, the colours and the time zone of the reader."""
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Emulation.setTimezoneOverride", timezoneId=zone)

    def photograph(self, path: Path, *, whole: bool = True) -> None:
        """A PNG of the page, or of the window."""
        found = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))
