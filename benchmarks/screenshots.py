"""Screenshots of a report in headless Chromium: light, dark, and as on a phone.

    python benchmarks/screenshots.py my-study-report.html --out docs

The browser is spoken to through a pipe (--remote-debugging-pipe), so nothing listens on a port and no package is
needed beside Debian's chromium.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "headless_shell")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
    *("--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe", "about:blank"),
)


def find_browser() -> str | None:
    """The path of a Chromium; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """A headless Chromium with one page, closed at the end of a ``with`` block.

    Attributes
    ----------
    events: what the page reported since it was opened, as the DevTools protocol has it.
    """

    def __init__(self, path: str, patience: float = 60.0) -> None:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._patience = patience
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()

        def take_pipes() -> None:  # Chromium reads commands from 3 and writes answers to 4
            spare = [os.dup(to_read), os.dup(to_write)]
            os.dup2(spare[0], 3)
            os.dup2(spare[1], 4)

        command = [path, f"--user-data-dir={self._profile.name}", *OPTIONS]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=take_pipes,
            close_fds=False,
        )
        os.close(to_read)
        os.close(to_write)
        self._buffer, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its answer; what happens meanwhile goes to ``events``."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") != self._number:
                self.events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']}")
            else:
                result: dict[str, Any] = answer["result"]
                return result

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + self._patience
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, until - time.monotonic()))
            found = os.read(self._read, 1 << 20) if ready else b""
            if not found:
                raise RuntimeError("Chromium gave no answer")
            self._buffer += found
        first, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(first)
        return answer

    def open(self, page: Path, width: int, height: int, dark: bool = False) -> None:
        """Show a file in a window of that size, to a reader who prefers light or dark; a narrow one is a phone's."""
        self.events.clear()
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self, path: Path, top: float, height: float, width: float) -> None:
        """Part of the page as a PNG: full width, from ``top`` down."""
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="what longrope report wrote")
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--name", default="report", help="what the files are named by")
    parser.add_argument("--section", help="id of the section or figure to begin at; the top if not given")
    parser.add_argument("--height", type=int, default=1000, help="of the part that is shown; twice that on a phone")
    args = parser.parse_args()
    path = find_browser()
    if path is None:
        raise SystemExit(f"There is no Chromium here: looked for {', '.join(NAMES)}.")
    with Browser(path) as browser:
        for kind, width, dark in (("light", 1100, False), ("dark", 1100, True), ("phone", 390, False)):
            height = args.height * (2 if kind == "phone" else 1)
            browser.open(args.page, width, height, dark)
            place = f"document.getElementById({json.dumps(args.section)}).getBoundingClientRect().top + scrollY"
            top = browser.evaluate(place) - 10 if args.section else 0
            tall = browser.evaluate("document.documentElement.scrollHeight")
            target = args.out / f"{args.name}-{kind}.png"
            browser.screenshot(target, top, min(height, tall - top), width)
            print(f"{target}: {target.stat().st_size >> 10} KiB")


if __name__ == "__main__":
    main()
