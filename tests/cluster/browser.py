"""A real browser under remote control, by Chromium's DevTools protocol over two pipes."""

from __future__ import annotations

import json
import os
import select
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from tests.waiting import PATIENCE, wait_until

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--window-size=1400,1000", "--remote-debugging-pipe"),
)


class Browser:
    """Context in which a browser runs that types the login into the server's form."""

    def __init__(self, chromium: str, profile: Path, login: Sequence[str] = ()) -> None:
        self.login = login
        self.answers: list[tuple[str, int]] = []
        """Address and status of each answer that its pages got."""
        self.exceptions: list[str] = []
        """Errors of the pages' scripts."""
        commands, self._out = os.pipe()
        self._in, events = os.pipe()
        # Chromium reads commands from descriptor 3 and writes to 4.
        script = f'exec "$@" 3<&{commands} 4>&{events}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "_", chromium, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(commands, events),
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(events)
        self._held, self._sent, self._session = b"", 0, ""
        self._replies: dict[int, Any] = {}

    def __enter__(self) -> Self:
        targets = self._call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self._call(f"{domain}.enable")
        self._call("Fetch.enable", handleAuthRequests=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE)
        os.close(self._in)
        os.close(self._out)

    def open(self, address: str) -> None:
        """Leave the page and load another."""
        self._call("Page.navigate", url="about:blank")
        self._call("Page.navigate", url=address)

    def wait_for(self, *texts: str) -> None:
        """Return when the page shows all the texts."""
        conditions = (f"document.body.innerText.includes({json.dumps(text)})" for text in texts)
        self.wait_until(" && ".join(conditions))

    def wait_until(self, script: str) -> None:
        """Return when a script's value is true; one that fails, as before a page has a body, is tried again."""
        wait_until(lambda: self._call("Runtime.evaluate", expression=script)["result"].get("value"))

    def value(self, script: str) -> Any:
        """Return a script's value, which may be a promise of it."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def resize(self, width: int, height: int) -> None:
        """Give the page a size in pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)

    def _call(self, method: str, **parameters: Any) -> Any:
        number = self._send(method, **parameters)
        while number not in self._replies:
            self._receive()
        reply = self._replies.pop(number)
        assert "error" not in reply, (method, reply)
        return reply["result"]

    def _send(self, method: str, **parameters: Any) -> int:
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        return self._sent

    def _receive(self) -> None:
        assert select.select([self._in], [], [], PATIENCE)[0], "the browser says nothing"
        read = os.read(self._in, 2**20)
        assert read, "the browser has ended"
        *messages, self._held = (self._held + read).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._replies[message["id"]] = message
            else:
                self._notice(message["method"], message["params"])

    def _notice(self, event: str, facts: dict[str, Any]) -> None:
        if event == "Fetch.requestPaused":
            self._send("Fetch.continueRequest", requestId=facts["requestId"])
        elif event == "Fetch.authRequired":
            answer = dict(
                zip(("username", "password"), self.login, strict=True), response="ProvideCredentials"
            )
            self._send("Fetch.continueWithAuth", requestId=facts["requestId"], authChallengeResponse=answer)
        elif event == "Network.responseReceived":
            self.answers.append((facts["response"]["url"], facts["response"]["status"]))
        elif event == "Runtime.exceptionThrown":
            self.exceptions.append(json.dumps(facts["exceptionDetails"]))
