"""A gateway in a process of its own, for what needs real signals, limits or figures."""

import asyncio
import json
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.house import HELLO, UpstreamServer

ROOT = Path(__file__).parent.parent
PATIENCE_S = 20.0


@dataclass
class Served:
    process: asyncio.subprocess.Process
    port: int
    log: str = ""
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def signal(self, which: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(which)

    async def ended(self, within_s: float = PATIENCE_S) -> None:
        """It ends by itself, quietly and with 0."""
        async with asyncio.timeout(within_s):
            _, log = await self.process.communicate()
        self.log = log.decode()
        assert self.process.returncode == 0, self.log
        for noise in ("Traceback", "destroyed", "never retrieved", "never awaited", "unexpected"):
            assert noise not in self.log, self.log

    async def connect(self, sent: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        writer.write(sent)
        return reader, writer

    async def ask(self, **changes: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await self.connect(request_bytes(**changes))

    async def until_closed(self) -> None:
        """It has left its port; what had connected goes on."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    await self.connect()
                except ConnectionError:
                    return
                await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(
    folder: Path, server: UpstreamServer, *, under: Sequence[str] = (), **changes: Any
) -> AsyncIterator[Served]:
    """In front of *server*, with *changes* to the configuration of `server`; *under* is a command to start it with."""
    config = {
        "server": {"drain_delay_s": 0, **changes},
        "upstreams": {"one": {"adapter": "openai", "base_url": f"http://127.0.0.1:{server.port}/v1"}},
        "models": {"smart": {"targets": [{"upstream": "one", "model": "model-1"}]}},
    }
    (folder / "gateway.yaml").write_text(json.dumps(config))
    async with started("--config", str(folder / "gateway.yaml"), under=under) as served:
        yield served


@asynccontextmanager
async def started(*args: str, under: Sequence[str] = ()) -> AsyncIterator[Served]:
    command = [*under, sys.executable, "-m", "gateway", "serve", "--port", "0", *args]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=pipe, stderr=pipe)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            said = await process.stdout.readuntil(b"Health")
            await process.stdout.readuntil(b"or put a server here")
        found = re.search(rb"Base URL +http://127.0.0.1:(\d+)/v1", said)
        assert found is not None
        served = Served(process, int(found[1]))
        yield served
        for writer in served.writers:
            writer.transport.abort()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def until(condition: Callable[[], bool], within_s: float = PATIENCE_S) -> None:
    async with asyncio.timeout(within_s):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


def request_bytes(**changes: Any) -> bytes:
    body = json.dumps({**HELLO, **changes}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
