"""A page in headless Chromium, spoken to over a pipe in its DevTools protocol, so that no driver is needed."""

import fcntl
import json
import os
import select
import shutil
import subprocess
import time

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1280,2000"),
    *("--remote-debugging-pipe", "about:blank"),
)
IGNORED = ("chrome://", "about:")  # of the browser itself
PATIENCE = 60
READ, WRITE = 3, 4  # where Chromium reads commands and writes what happens


class ChromiumPage:
    """One page; ``requests`` and ``complaints`` fill up as it is loaded and used."""

    def __init__(self, profile):
        to_browser, self._commands = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in os.pipe())
        self._happened, from_browser = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in os.pipe())

        def place():
            os.dup2(to_browser, READ)
            os.dup2(from_browser, WRITE)

        self._process = subprocess.Popen(
            [PROGRAM, f"--user-data-dir={profile}", *FLAGS],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=place,
            pass_fds=(READ, WRITE),
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._number, self._session = b"", 0, None
        self.requests, self.complaints = [], []
        targets = self._ask("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self._ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")

    def open(self, address):
        """Load a page to its end, also one that differs from the last in what stands behind # alone."""
        for url in ("about:blank", address):
            self._ask("Page.navigate", url=url)
            while self._next().get("method") != "Page.loadEventFired":
                pass

    def run(self, script):
        """Value of an expression in the page."""
        found = self._ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, condition, seconds=60):
        """Wait until an expression in the page is true."""
        end = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < end, f"not within {seconds} s: {condition}"
            time.sleep(0.1)

    def emulate(self, width, height, dark=False):
        """A window of this size in CSS pixels, in light or dark mode."""
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])

    def press(self, key, code):
        """A key of the keyboard, with its number."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            own = {"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code}
            self._ask("Input.dispatchKeyEvent", **own, **(text if kind == "keyDown" else {}))

    def write(self, text):
        """Text into what has the focus."""
        self._ask("Input.insertText", text=text)

    def close(self):
        """End the browser."""
        self._session = None
        self._ask("Browser.close")
        self._process.wait(30)
        os.close(self._commands)
        os.close(self._happened)

    def _ask(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        os.write(
            self._commands,
            json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0",
        )
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self):
        while b"\0" not in self._buffer:
            assert select.select([self._happened], [], [], PATIENCE)[0], f"{PROGRAM} says nothing for {PATIENCE} s"
            read = os.read(self._happened, 1 << 16)
            assert read, f"{PROGRAM} ended with {self._process.wait(30)}"
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        said, method = message.get("params", {}), message.get("method")
        if method == "Network.requestWillBeSent" and not said["request"]["url"].startswith(IGNORED):
            self.requests.append(said["request"]["url"])
        if method in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
            self.complaints.append(said)
        return message
