"""A real engine in processes of its own, which can be killed, frozen and started again."""

import asyncio
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx2

from gateway.adapter import load_adapter
from gateway.errors import UpstreamError
from gateway.ledger import open_ledger
from gateway.settings import Database, Upstream
from tests.house import House, running, settings_for

START_S = 240.0
PATIENCE_S = 20.0
HI: Any = [{"role": "user", "content": "Hi"}]


class Row(NamedTuple):
    """What the ledger says of a request."""

    outcome: str
    usage_source: str
    prompt_tokens: int
    completion_tokens: int


class Engine:
    """Started by *command* in the folder of its log, which listens on *port*; ready when its /health is."""

    def __init__(self, command: Sequence[str], port: int, log: Path, **environment: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._command = list(command)
        self._environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                cwd=self._log.parent,
                env=self._environment,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self._process.poll() is None, self.said
            try:
                if httpx2.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx2.HTTPError:
                pass
            time.sleep(0.2)
        raise AssertionError(f"it did not come up: {self.said}")

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]

    @property
    def pid(self) -> int:
        """Of the server."""
        assert self._process is not None
        return self._process.pid

    @property
    def workers(self) -> list[int]:
        """The processes that the server has started."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [int(child) for child in children]

    def kill(self) -> None:
        """At once, with all its processes."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def kill_workers(self) -> None:
        for pid in self.workers:
            os.kill(pid, signal.SIGKILL)

    @contextmanager
    def frozen(self, *pids: int) -> Iterator[None]:
        """Its processes, or those given, do nothing."""
        stopped = pids or (self.pid, *self.workers)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)


@contextmanager
def started(engine: Engine) -> Iterator[Engine]:
    engine.start()
    try:
        yield engine
    finally:
        said = engine.said
        engine.kill()
        sys.stdout.write(said)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


@dataclass
class Front:
    """A gateway whose model `smart` is an engine's, and its ledger."""

    house: House
    database: Path

    async def chat(self, **changes: Any) -> Any:
        asked: Any = {"model": "smart", "messages": HI, **changes}
        return await self.house.openai.chat.completions.create(**asked)

    async def chunks(self, **changes: Any) -> list[Any]:
        return [chunk async for chunk in await self.chat(stream=True, **changes)]

    async def billed(self, number: int = 1) -> Row:
        """The last of the ledger's rows, once it has so many."""

        async def is_there() -> bool:
            return len(self._rows()) >= number

        await until(is_there)
        return self._rows()[-1]

    async def counted(self, kind: str) -> int:
        """Of the tokens that its metrics tell."""
        return int(await total(self.house.url, "suiron_tokens_total", f'kind="{kind}"'))

    def _rows(self) -> list[Row]:
        with closing(sqlite3.connect(self.database)) as database:
            found = database.execute(
                "select outcome, usage_source, prompt_tokens, completion_tokens from usage order by seq"
            )
            return [Row(*row) for row in found]


@asynccontextmanager
async def in_front_of(upstream: Upstream, folder: Path) -> AsyncIterator[Front]:
    adapter = load_adapter(upstream)
    with suppress(UpstreamError):  # `transformers serve` has no list of models
        await adapter.probe()
    path = folder / "ledger.sqlite"
    ledger = open_ledger(Database(url=f"sqlite:///{path}"))
    async with running(settings_for(upstream), {"upstream-1": adapter}, ledger=ledger) as house:
        yield Front(house, path)


async def exhaust(chunks: AsyncIterator[Any]) -> None:
    async for _ in chunks:
        pass


async def total(url: str, name: str, label: str = "") -> float:
    """The sum of a metric's series that have *label*."""
    async with httpx2.AsyncClient(timeout=PATIENCE_S) as client:
        lines = (await client.get(f"{url}/metrics")).text.splitlines()
    series = [line for line in lines if re.match(rf"{re.escape(name)}[ {{]", line) and label in line]
    return sum(float(line.rpartition(" ")[2]) for line in series)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if await condition():
                return
            await asyncio.sleep(0.02)
