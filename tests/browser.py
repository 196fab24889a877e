# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium for tests, spoken to over a pair of pipes (DevTools protocol)."""

import base64
import io
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars
    --disable-background-networking --disable-component-update --disable-sync
    --window-size=1360,1000 --remote-debugging-pipe""".split()


def chromium() -> str:
    """The browser's path; without one the test is skipped, or fails if OPSD_REQUIRE_BROWSER=1."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        reason = "no chromium on the PATH (Debian: apt-get install chromium)"
        if os.environ.get("OPSD_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


class Page:
    """One page of a fresh browser; every request it makes is kept in `requests`."""

    def __init__(self, address: str, profile: Path):
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        command = [chromium(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        # The browser reads descriptor 3 and writes 4; the shell puts them there.
        shell = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._number, self._session = b"", 0, None
        self.requests: list[str] = []
        self.errors: list[str] = []
        targets = self.send("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for area in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{area}.enable")
        self.send("Page.navigate", url=address)
        while not self._loaded():
            pass

    def _loaded(self) -> bool:
        return self._next().get("method") == "Page.loadEventFired"

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._read, 1 << 16)
            if not part:
                raise RuntimeError("the browser ended")
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.errors.append(json.dumps(message["params"]))
        return message

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Calls a method of the protocol and waits for its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def evaluate(self, expression: str) -> Any:
        """The json value of a JavaScript expression in the page."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def point_at(self, selector: str, part: float = 0.5) -> None:
        """Moves the mouse onto an element: `part` of its width, half of its height."""
        box = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            "return [r.left, r.top, r.width, r.height]; })()"
        )
        left, top, width, height = box
        for nudge in (0, 1):  # a move from elsewhere, then one inside
            x, y = left + width * part + nudge, top + height / 2
            self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def colours(self, selector: str, least: int) -> int:
        """How many colours an element has on the screen, also one that scripts cannot look into.

        A frame is drawn by a process of its own, at any time after the page has loaded: looks until
        there are `least`, for up to half a minute.
        """
        end = time.monotonic() + 30
        while (found := self._colours(selector)) < least and time.monotonic() < end:
            time.sleep(0.1)
        return found

    def _colours(self, selector: str) -> int:
        corners = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView(); const r = e.getBoundingClientRect();"
            "return [r.left + scrollX, r.top + scrollY, r.width, r.height]; })()"
        )
        clip = dict(zip(("x", "y", "width", "height"), corners, strict=True)) | {"scale": 1}
        shot = self.send("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        from matplotlib.image import imread

        pixels = imread(io.BytesIO(base64.b64decode(shot["data"])))
        return len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)
