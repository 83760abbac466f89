"""A TCP proxy that loses what it is told to lose."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass
class Proxy:
    """Between a store and its Redis. What it is told holds for connections that are open, too."""

    target: int
    port: int = 0
    lose_replies: int = 0
    """So many of the next replies do not arrive: the connection is closed instead."""
    lose_each: int = 0
    """Every so many-th reply is lost likewise; 0 for none."""
    delay_s: float = 0.0
    hole: bool = False
    """Takes everything, answers nothing."""
    replies: int = 0
    lost: int = 0
    connections: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        tasks = [
            asyncio.ensure_future(self._up(reader, up_writer)),
            asyncio.ensure_future(self._down(up_reader, writer)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            writer.transport.abort()
            up_writer.transport.abort()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()

    async def _down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await asyncio.sleep(self.delay_s)
            self.replies += 1
            if self.hole:
                continue
            if self.lose_replies or (self.lose_each and self.replies % self.lose_each == 0):
                self.lose_replies = max(0, self.lose_replies - 1)
                self.lost += 1
                return
            writer.write(data)
            await writer.drain()


@asynccontextmanager
async def proxy_to(target: int) -> AsyncIterator[Proxy]:
    proxy = Proxy(target)
    serving: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(proxy.serve(reader, writer))
        serving.add(task)
        task.add_done_callback(serving.discard)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
