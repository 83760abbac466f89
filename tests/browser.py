"""How do tests drive Chromium? The part of W3C WebDriver they need, over plain HTTP to chromedriver."""

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2

PATIENCE_S = 15
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
FLAGS = """
    --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --disable-default-apps --disable-dev-shm-usage --window-size=1280,860
""".split()


def why_no_browser() -> str | None:
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(missing)} not installed (Debian: chromium chromium-driver)" if missing else None


class Browser:
    """One tab. What is typed and clicked is typed and clicked by the browser, as by a person."""

    def __init__(self, session: httpx2.AsyncClient) -> None:
        self._session = session

    async def open(self, url: str) -> None:
        await self._post("url", url=url)

    async def click(self, css: str) -> None:
        await self._post(f"element/{await self._find(css)}/click")

    async def type(self, css: str, text: str) -> None:
        await self._post(f"element/{await self._find(css)}/value", text=text)

    async def text(self, css: str) -> str:
        return str(await self.run(f"return document.querySelector({json.dumps(css)}).textContent"))

    async def run(self, code: str) -> Any:
        return await self._post("execute/sync", script=code, args=[])

    async def until(self, condition: str) -> None:
        """Waits until an expression of JavaScript is true; it is looked at whenever the browser has a moment."""
        look = f"const done = arguments[0]; (function look() {{ if ({condition}) done(); else setTimeout(look, 5) }})()"
        try:
            await self._post("execute/async", script=look, args=[])
        except AssertionError:
            raise AssertionError(f"not within {PATIENCE_S} s: {condition}\n{await self.text('body')}") from None

    async def devtools(self, command: str, **params: Any) -> Any:
        return await self._post("goog/cdp/execute", cmd=command, params=params)

    async def complaints(self) -> list[str]:
        """What the console has of errors and warnings, violations of the page's policy among them, since last asked."""
        return [entry["message"] for entry in await self._post("se/log", type="browser")]

    async def fetched(self) -> list[str]:
        """The addresses asked for since last asked."""
        entries = [json.loads(entry["message"])["message"] for entry in await self._post("se/log", type="performance")]
        sent = [entry["params"]["request"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]
        return [request["url"] for request in sent]

    async def _find(self, css: str) -> str:
        return str((await self._post("element", using="css selector", value=css))[ELEMENT])

    async def _post(self, path: str, **body: Any) -> Any:
        answer = await self._session.post(path, json=body)
        value = answer.json()["value"]
        assert answer.status_code == 200, value["message"]
        return value


@asynccontextmanager
async def browsing(profile: Path) -> AsyncIterator[Browser]:
    """A fresh Chromium that can reach this machine only."""
    said = profile / "chromedriver.log"
    with said.open("wb") as log:  # no pipe: Chromium's processes would hold it open
        driver = await asyncio.create_subprocess_exec("chromedriver", "--port=0", stdout=log, stderr=log)
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not (port := re.search(r"successfully on port (\d+)", said.read_text())):
                await asyncio.sleep(0.01)
                assert driver.returncode is None, said.read_text()
        url = f"http://127.0.0.1:{port[1]}/session"
        async with httpx2.AsyncClient(timeout=PATIENCE_S * 2) as http:
            opened = (await http.post(url, json={"capabilities": {"alwaysMatch": _capabilities(profile)}})).json()
            http.base_url = httpx2.URL(f"{url}/{opened['value']['sessionId']}/")
            try:
                browser = Browser(http)
                await browser.open("about:blank")  # instead of Chromium's own first page, which loads much
                yield browser
            finally:
                await http.delete(str(http.base_url).rstrip("/"))  # ends Chromium; not found with a slash
    finally:
        driver.terminate()
        await driver.wait()


def _capabilities(profile: Path) -> dict[str, Any]:
    only_here = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost"
    return {
        "timeouts": {"script": PATIENCE_S * 1000},
        "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        "goog:chromeOptions": {"args": [*FLAGS, only_here, f"--user-data-dir={profile / 'profile'}"]},
    }
