"""What can a server do on a socket? A scripted one, byte by byte, for tests of clients."""

import asyncio
import re
import ssl as tls
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from socket import SO_LINGER, SOL_SOCKET
from typing import NamedTuple

PATIENCE_S = 5.0


class RawRequest(NamedTuple):
    head: bytes
    body: bytes


class Peer:
    """The server's end of one connection."""

    def __init__(self, index: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.index = index
        """0 for the server's first connection."""
        self._reader = reader
        self._writer = writer

    async def request(self) -> RawRequest:
        """The next whole request. Raises IncompleteReadError when the client has closed."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"\r\ncontent-length: (\d+)\r\n", head, re.IGNORECASE)
        return RawRequest(head, await self._reader.readexactly(int(length[1]) if length else 0))

    async def read(self) -> bytes:
        return await self._reader.read(65_536)

    async def send(self, *blocks: bytes) -> None:
        """Each block is a write of its own, with turns of the loop in between for the client to see it alone."""
        for block in blocks:
            if self._writer.is_closing():
                raise ConnectionResetError
            self._writer.write(block)
            await self._writer.drain()
            for _ in range(3):
                await asyncio.sleep(0)

    def reset(self) -> None:
        """Closes with RST instead of FIN."""
        self._writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    def close(self) -> None:
        self._writer.close()

    async def gone(self) -> None:
        """Returns when the client has closed; what it sends until then is dropped."""
        async with asyncio.timeout(PATIENCE_S):
            with suppress(ConnectionError):
                while await self._reader.read(65_536):
                    pass


Script = Callable[[Peer], Awaitable[None]]


class RawServer:
    def __init__(self, script: Script) -> None:
        self.url = ""
        self.port = 0
        self.accepted = 0
        self.script = script
        self.errors: list[BaseException] = []
        self._peers: dict[asyncio.Task[None], Peer] = {}
        self._changed = asyncio.Event()

    @property
    def open(self) -> int:
        return len(self._peers)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for a condition that changes only when connections come or go."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def quiet(self) -> None:
        """Returns when no connection is open."""
        await self.until(lambda: not self._peers)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        peer = self._peers[task] = Peer(self.accepted, reader, writer)
        self.accepted += 1
        self._changed.set()
        try:
            await self.script(peer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        except Exception as exc:
            self.errors.append(exc)
        finally:
            writer.close()
            del self._peers[task]
            self._changed.set()

    async def stop(self) -> None:
        tasks = list(self._peers)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


@asynccontextmanager
async def serving(
    script: Script, *, ssl: tls.SSLContext | None = None, host: str = "127.0.0.1"
) -> AsyncGenerator[RawServer]:
    """Runs `script` for every connection; what it raises is raised at the end, but for a client that went away."""
    server = RawServer(script)
    listener = await asyncio.start_server(server.serve, host, 0, ssl=ssl)
    server.port = listener.sockets[0].getsockname()[1]
    server.url = f"{'https' if ssl else 'http'}://{f'[{host}]' if ':' in host else host}:{server.port}/"
    try:
        yield server
    finally:
        listener.close()
        await server.stop()
    if server.errors:
        raise server.errors[0]
