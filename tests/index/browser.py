"""``setemb serve`` as a program, and headless Chromium over the DevTools protocol's pipe: what a page's test needs."""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def chromium() -> str | None:
    """The browser's program, if there is one."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of ``setemb serve``."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    command = [sys.executable, "-m", "setemb", "serve", "--index", str(folder), "--port", address.rpartition(":")[2]]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root)
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert address in line, line + process.stderr.read()
        yield address
    finally:
        process.terminate()
        process.wait(20)


class Browser:
    """One page of a browser. `errors` is what its console complained of."""

    def __init__(self, program: str, profile: Path) -> None:
        self._to, self._from = os.pipe(), os.pipe()
        # the program reads commands from descriptor 3 and writes to 4
        command = f'exec "$0" "$@" 3<&{self._to[0]} 4>&{self._from[1]}'
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
            "about:blank",
        ]
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", command, program, *options],
            pass_fds=(self._to[0], self._from[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(self._to[0])
        os.close(self._from[1])
        self._numbers, self._buffer, self._session = itertools.count(1), b"", ""
        self.errors: list[str] = []
        try:
            target = next(t for t in self._call("Target.getTargets")["targetInfos"] if t["type"] == "page")
            attached = self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log"):
                self._call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to[1])
        os.close(self._from[0])

    def open(self, address: str) -> None:
        self._call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 20) -> None:
        """Until it is true."""
        deadline = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < deadline, (
                f"never true: {expression}; the page: {self.value('document.body.innerText')}"
            )
            time.sleep(0.05)

    def type(self, text: str, selector: str) -> None:
        """As a person does, and Enter."""
        self.value(f"document.querySelector({json.dumps(selector)}).focus()")
        self._call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self._call(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r", windowsVirtualKeyCode=13
            )

    def choose(self, path: Path, selector: str) -> None:
        """A file, in a field for files."""
        root = self._call("DOM.getDocument")["root"]["nodeId"]
        node = self._call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self._call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def _call(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to[1], json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(answer["params"]))
            elif answer.get("method") == "Log.entryAdded" and answer["params"]["entry"]["level"] == "error":
                self.errors.append(json.dumps(answer["params"]["entry"]))

    def _next(self) -> Any:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from[0]], [], [], 60)
            more = os.read(self._from[0], 1 << 16) if ready else b""
            assert more, "the browser does not answer"
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)
