"""A headless Chromium, spoken to over its DevTools protocol: no driver and no package between."""

import asyncio
import base64
import contextlib
import itertools
import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

_NAMES = ("chromium", "chromium-browser", "google-chrome")


class Tab:
    """One page. `requests`: every URL it asked for."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._loads = 0
        self._changed = asyncio.Condition()

    async def listen(self) -> None:
        """Read what Chromium says, until the socket closes."""
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                self._answers.pop(said["id"]).set_result(said)
            elif said["method"] == "Network.requestWillBeSent":
                self.requests.append(said["params"]["request"]["url"])
            elif said["method"] == "Log.entryAdded":
                self.complaints.append(said["params"]["entry"]["text"])
            elif said["method"] == "Page.loadEventFired":
                async with self._changed:
                    self._loads += 1
                    self._changed.notify_all()

    async def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_str(json.dumps({"id": number, "method": method, "params": parameters}))
        async with asyncio.timeout(30):
            said = await answer
        assert "error" not in said, said
        result: dict[str, Any] = said["result"]
        return result

    async def open(self, url: str) -> None:
        """Go there and wait until it is loaded."""
        seen = self._loads
        await self.ask("Page.navigate", url=url)
        await self.loaded(seen)

    async def loaded(self, seen: int | None = None) -> None:
        """Wait for the next load, or the one after `seen`."""
        seen = self._loads if seen is None else seen
        async with asyncio.timeout(30), self._changed:
            await self._changed.wait_for(lambda: self._loads > seen)

    async def look(self, script: str) -> Any:
        """The value of a JavaScript expression, for looking at the page from outside its own policy."""
        answer = await self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def show(self, width: int, height: int, scheme: str = "light", *, phone: bool = False) -> None:
        """The size of the window and the colour scheme that the person prefers."""
        scale = 2 if phone else 1
        await self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        await self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def picture(self, *, whole: bool = False) -> bytes:
        """A PNG of what is seen, or of the whole page."""
        answer = await self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(answer["data"])


@contextlib.asynccontextmanager
async def browsing() -> AsyncIterator[Tab]:
    """A tab of a browser of its own, which ends with it."""
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    assert program, f"none of {', '.join(_NAMES)} is installed: apt-get install chromium"
    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as home:
        process = await asyncio.create_subprocess_exec(
            program,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            "--remote-debugging-port=0",
            f"--user-data-dir={home}",
            "about:blank",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            assert process.stderr is not None
            async with asyncio.timeout(60):
                while b"DevTools listening on" not in (line := await process.stderr.readline()):
                    assert line, "Chromium ended before it listened"
            port = line.split(b"127.0.0.1:")[1].split(b"/")[0].decode()
            async with aiohttp.ClientSession() as http, asyncio.TaskGroup() as tasks:
                drain = tasks.create_task(_drain(process.stderr))
                async with http.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    pages = [one for one in await answer.json() if one["type"] == "page"]
                async with http.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    tab = Tab(socket)
                    listener = tasks.create_task(tab.listen())
                    for domain in ("Page", "Network", "Log", "Runtime"):
                        await tab.ask(f"{domain}.enable")
                    try:
                        yield tab
                    finally:
                        listener.cancel()
                drain.cancel()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()


async def _drain(stream: asyncio.StreamReader) -> None:
    """A full pipe would stop the browser."""
    while await stream.readline():
        pass
