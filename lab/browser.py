"""A real headless Chromium, driven by its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = "chromium"
_OPTIONS = (
    "--headless", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--remote-debugging-port=0",
)  # fmt: skip


class Tab:
    """A page in the browser, and all that it said and asked for."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._loaded = asyncio.Event()
        self.said: list[str] = []
        """Errors and warnings of the console, refused loads, and exceptions."""
        self.asked: list[str] = []
        """URLs that were requested."""

    async def listen(self) -> None:
        """Take what the browser says, until it hangs up."""
        async for frame in self._socket:
            message = json.loads(frame.data)
            if (number := message.get("id")) is not None:
                if not (answer := self._answers.pop(number)).done():
                    answer.set_result(message)
                continue
            self._on_event(message["method"], message["params"])

    def _on_event(self, method: str, params: dict[str, Any]) -> None:
        match method:
            case "Page.loadEventFired":
                self._loaded.set()
            case "Network.requestWillBeSent":
                self.asked.append(params["request"]["url"])
            case "Runtime.exceptionThrown":
                self.said.append(json.dumps(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.said.append(json.dumps(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.said.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    async def do(self, method: str, **params: Any) -> dict[str, Any]:
        """Give a command of the protocol; return its result."""
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_str(json.dumps({"id": number, "method": method, "params": params}))
        answer = await asyncio.wait_for(self._answers[number], 60)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    async def open(self, url: str, width: int = 1280, height: int = 900, *, dark: bool = False) -> None:
        """Go somewhere, and wait until everything is loaded."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        await self.do("Emulation.setDeviceMetricsOverride", **size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.do("Emulation.setEmulatedMedia", features=scheme)
        self._loaded.clear()
        await self.do("Page.navigate", url=url)
        await asyncio.wait_for(self._loaded.wait(), 60)

    async def get(self, expression: str) -> Any:
        """Return the value of an expression in JavaScript; promises are awaited."""
        answer = await self.do("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, expression: str) -> Any:
        """Wait until an expression is true."""
        async with asyncio.timeout(60):
            while not (value := await self.get(expression)):
                await asyncio.sleep(0.05)
        return value

    async def picture(self, path: Path, height: int | None = None) -> None:
        """Write what is seen, or the page down to a height, as PNG."""
        clip: dict[str, Any] = {}
        if height is not None:
            width = await self.get("innerWidth")
            box = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
            clip = {"clip": box, "captureBeyondViewport": True}
        answer = await self.do("Page.captureScreenshot", format="png", **clip)
        path.write_bytes(base64.b64decode(answer["data"]))


class Browser:
    """The running browser."""

    def __init__(self, http: aiohttp.ClientSession, origin: str) -> None:
        self._http = http
        self._origin = origin

    @contextlib.asynccontextmanager
    async def tab(self, *, script: bool = True) -> AsyncIterator[Tab]:
        """
        Open a tab.

        :param script: Whether pages may run scripts.
        """
        async with self._http.put(f"{self._origin}/json/new?about:blank") as answer:
            target = json.loads(await answer.text())
        async with self._http.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            tab = Tab(socket)
            listening = asyncio.create_task(tab.listen())
            for domain in ("Page", "Runtime", "Log", "Network"):
                await tab.do(f"{domain}.enable")
            await tab.do("Emulation.setScriptExecutionDisabled", value=not script)
            try:
                yield tab
            finally:
                await tab.do("Page.close")
                listening.cancel()
                await asyncio.gather(listening, return_exceptions=True)


@contextlib.asynccontextmanager
async def running(*options: str) -> AsyncIterator[Browser]:
    """Run a browser with an empty profile of its own."""
    with tempfile.TemporaryDirectory(prefix="vpt-chromium-", ignore_cleanup_errors=True) as profile:
        # Its sandbox does not work as root, nor in most containers; what it is shown here is our own.
        sandbox = ("--no-sandbox",) if os.geteuid() == 0 else ()
        process = await asyncio.create_subprocess_exec(
            CHROMIUM, *_OPTIONS, *sandbox, *options, f"--user-data-dir={profile}", "about:blank",
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL, env={**os.environ, "HOME": profile},
            start_new_session=True,
        )  # fmt: skip
        try:
            port = await _port(Path(profile) / "DevToolsActivePort")
            async with aiohttp.ClientSession() as http:
                yield Browser(http, f"http://127.0.0.1:{port}")
        finally:
            process.terminate()
            await process.wait()
            # Its helpers may live for a moment longer, and would write into the profile while it is removed.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


async def _port(path: Path) -> int:
    async with asyncio.timeout(60):
        while True:
            if path.exists() and (lines := path.read_text().splitlines()):
                return int(lines[0])
            await asyncio.sleep(0.05)
