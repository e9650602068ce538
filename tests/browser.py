"""A headless Chromium, driven by the DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import itertools
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
#: without scroll bars: a screenshot of more than is in sight takes theirs away, and the page moves
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
    "--remote-debugging-port=0",
)  # fmt: skip


class BrowserPage:
    """One page."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._numbers = socket, itertools.count()

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while (message := await self._socket.receive_json(timeout=60)).get("id") != number:
            pass
        assert "error" not in message, message
        return message["result"]

    async def evaluate(self, expression: str) -> Any:
        """The value of JavaScript, awaited where it is a promise."""
        reply = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    async def wait(self, condition: str, seconds: float = 60) -> None:
        """Until JavaScript is true."""
        for _ in range(int(seconds / 0.05)):
            if await self.evaluate(f"Boolean({condition})"):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"{condition} stayed false")

    async def open(self, address: str) -> None:
        """Load a page."""
        await self._leave("Page.navigate", url=address)

    async def reload(self) -> None:
        await self._leave("Page.reload")

    async def _leave(self, method: str, **parameters: Any) -> None:
        """Until the new document is there: for a while, questions are still answered by the old one."""
        await self.evaluate("window.isOld = true")
        await self.call(method, **parameters)
        await self.wait("!window.isOld && document.readyState === 'complete'")

    async def key(self, key: str, repeats: int = 0) -> None:
        """Press a key; `repeats` more events come while it is held."""
        code = {" ": "Space", "Enter": "Enter"}.get(key, f"Digit{key}" if key.isdigit() else f"Key{key.upper()}")
        for repeat in range(repeats + 1):
            await self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=code, autoRepeat=repeat > 0)
        await self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=code)

    async def choose_file(self, path: Path) -> None:
        """In the first field for files."""
        document = await self.call("DOM.getDocument")
        field = await self.call("DOM.querySelector", nodeId=document["root"]["nodeId"], selector="input[type=file]")
        await self.call("DOM.setFileInputFiles", nodeId=field["nodeId"], files=[str(path)])

    async def download_to(self, folder: Path) -> None:
        """Files that links give from here on."""
        await self.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    async def screenshot(self, path: Path, selector: str = "html") -> None:
        """A PNG of an element, in sight or not."""
        box = await self.evaluate(f"document.querySelector('{selector}').getBoundingClientRect().toJSON()")
        clip = {name: round(box[name]) for name in ("x", "y", "width", "height")} | {"scale": 1}
        reply = await self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(reply["data"]))


@asynccontextmanager
async def browser_page(profile: Path, size: tuple[int, int] = (1600, 1000)) -> AsyncIterator[BrowserPage]:
    """A page of a new Chromium whose profile lies in `profile`."""
    assert CHROMIUM
    command = (CHROMIUM, *OPTIONS, f"--window-size={size[0]},{size[1]}", f"--user-data-dir={profile}", "about:blank")
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet)
    try:
        port = profile / "DevToolsActivePort"
        while not (port.exists() and port.read_text().count("\n")):
            assert process.returncode is None, "chromium ended"
            await asyncio.sleep(0.05)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port.read_text().split()[0]}/json/list") as reply:
                address = next(tab["webSocketDebuggerUrl"] for tab in await reply.json() if tab["type"] == "page")
            async with session.ws_connect(address, max_msg_size=0) as socket:
                yield BrowserPage(socket)
    finally:
        process.kill()
        await process.wait()
