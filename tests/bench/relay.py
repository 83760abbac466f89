"""
A bare relay of forty lines, for comparison: what Litestar, uvicorn and httptools cost by themselves.

It reads the request's `stream`, passes its bytes on and the answer's bytes back. No keys, checks, timeouts or limits.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httptools
import msgspec
import uvicorn
from litestar import Litestar, Request, Response, post
from litestar.response import Stream

from tests.bench.mock_upstream import Asked

HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: mock\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
)


class Upstream(asyncio.Protocol):
    def __init__(self) -> None:
        self.blocks: list[bytes] = []
        self._news = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def ask(self, body: bytes) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._whole = False
        self._transport.write(HEAD % len(body) + body)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)
        self._news.set()

    def on_body(self, block: bytes) -> None:
        self.blocks.append(block)

    def on_message_complete(self) -> None:
        self._whole = True

    async def answer(self) -> AsyncIterator[bytes]:
        while not self._whole or self.blocks:
            if self.blocks:
                block = b"".join(self.blocks)
                self.blocks.clear()
                yield block
            else:
                self._news.clear()
                await self._news.wait()


def relay(port: int) -> Litestar:
    idle: list[Upstream] = []
    decode = msgspec.json.Decoder(Asked).decode

    async def passed_back(upstream: Upstream) -> AsyncIterator[bytes]:
        async for block in upstream.answer():
            yield block
        idle.append(upstream)

    @post("/v1/chat/completions", status_code=200)
    async def chat(request: Request[Any, Any, Any]) -> Response[Any]:
        body = await request.body()
        connect = asyncio.get_running_loop().create_connection
        upstream = idle.pop() if idle else (await connect(Upstream, "127.0.0.1", port))[1]
        upstream.ask(body)
        if decode(body).stream:
            return Stream(passed_back(upstream), media_type="text/event-stream")
        return Response(b"".join([block async for block in passed_back(upstream)]), media_type="application/json")

    return Litestar([chat], openapi_config=None, logging_config=None)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--port", type=int, required=True)
    options.add_argument("--upstream", type=int, required=True)
    chosen = options.parse_args()
    uvicorn.run(relay(chosen.upstream), port=chosen.port, log_level="error", access_log=False)


if __name__ == "__main__":
    main()
