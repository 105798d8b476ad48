"""A headless Chromium, spoken to over the pipes of its debugging protocol: what a page looks like to a reader."""

from __future__ import annotations

import base64
import fcntl
import functools
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SECONDS = 60  # a command that takes longer fails


@functools.cache
def find() -> str | None:
    """The path of a Chromium that starts; None where there is none."""
    for path in filter(None, map(shutil.which, NAMES)):
        if subprocess.run([path, "--version"], capture_output=True, timeout=SECONDS).returncode == 0:
            return path
    return None


class Browser:
    """One tab. `with Browser() as browser: browser.open(path); browser.value("document.title")`."""

    def __init__(self):
        self._profile = tempfile.TemporaryDirectory(prefix="chromium")
        reading, theirs_out = os.pipe()
        theirs_in, writing = os.pipe()
        arguments = [
            "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}", "--no-first-run",
            "--disable-background-networking", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars",
        ]  # fmt: skip
        if os.geteuid() == 0:
            arguments.append("--no-sandbox")

        def pipes() -> None:  # the protocol reads descriptor 3 and writes descriptor 4
            high = [fcntl.fcntl(each, fcntl.F_DUPFD, 10) for each in (theirs_in, theirs_out)]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        path = find()
        assert path is not None
        self._process = subprocess.Popen(
            [path, *arguments, "about:blank"], preexec_fn=pipes, close_fds=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._out, self._in, self._unread = os.fdopen(writing, "wb"), os.fdopen(reading, "rb"), b""
        self._number = 0
        self._session: str | None = None
        self.messages: list[str] = []
        """What the page wrote to the console, exceptions and requests that failed, since `open`."""

    def __enter__(self) -> Browser:
        page = next(each for each in self._call("Target.getTargets")["targetInfos"] if each["type"] == "page")
        attached = self._call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        return self

    def __exit__(self, *_: Any) -> None:
        self._out.close()
        self._process.terminate()
        self._process.wait(SECONDS)
        self._in.close()
        self._profile.cleanup()

    def open(self, path: Path, width: int = 1200, height: int = 900, dark: bool = False, script: bool = True) -> None:
        """Load a file, and wait until it is complete."""
        self._call("Emulation.setScriptExecutionDisabled", value=not script)
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self.messages.clear()
        self._call("Page.navigate", url=path.absolute().as_uri())
        while self._message().get("method") != "Page.loadEventFired":
            pass

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript is worth."""
        result = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def picture(self, path: Path, whole: bool = True) -> None:
        """Save a screenshot as PNG: of the whole page, or of the window."""
        shot = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()
        while (answer := self._message()).get("id") != self._number:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _message(self) -> dict[str, Any]:
        parts = [self._unread]
        while b"\0" not in parts[-1]:
            parts.append(self._in.read1(1 << 16))
            assert parts[-1], "the browser has ended"
        data, _, self._unread = b"".join(parts).partition(b"\0")
        message = json.loads(data)
        parameters = message.get("params", {})
        match message.get("method"):
            case "Runtime.consoleAPICalled":
                self.messages.append(f"{parameters['type']}: {[each.get('value') for each in parameters['args']]}")
            case "Runtime.exceptionThrown":
                self.messages.append(json.dumps(parameters["exceptionDetails"]))
            case "Log.entryAdded":
                self.messages.append(parameters["entry"]["text"])
            case "Network.requestWillBeSent":
                url = parameters["request"]["url"]
                if not url.startswith(("file:", "data:")):
                    self.messages.append(f"request: {url}")
        return message
