"""A client may leave at any time: what it had asked for stops within a second, and nothing stays behind."""

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from gateway.schema.chat import ChatChunk, ChunkChoice, Delta
from gateway.schema.payload import Part
from gateway.settings import Server
from tests.house import (
    HELLO,
    ROLE,
    TOKEN,
    House,
    Received,
    ScriptedAdapter,
    chunk,
    completion,
    hello_stream,
    json_reply,
    running,
    scripted,
    settings_for,
    stream_reply,
    upstream,
)

pytestmark = pytest.mark.anyio

WITHIN_S = 1.0


def request_bytes(**changes: object) -> bytes:
    body = json.dumps({**HELLO, **changes}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer {TOKEN}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@asynccontextmanager
async def asked(house: House, **changes: object) -> AsyncIterator[asyncio.StreamReader]:
    """A raw client that has sent its request, and leaves at the end of the block."""
    reader, writer = await asyncio.open_connection("127.0.0.1", house.port)
    writer.write(request_bytes(**changes))
    try:
        yield reader
    finally:
        writer.transport.abort()


async def eventually(condition: asyncio.Event) -> None:
    async with asyncio.timeout(WITHIN_S):
        await condition.wait()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_before_the_first_token_frees_the_upstream(stream: bool) -> None:
    arrived, freed = asyncio.Event(), asyncio.Event()

    async def silent(received: Received, writer: asyncio.StreamWriter) -> None:
        if received.path.endswith("/models"):
            return await json_reply({})(received, writer)
        arrived.set()
        await received.gone.wait()
        freed.set()
        return None

    async with upstream(silent) as server, running(settings_for(server.settings())) as house:
        async with asked(house, stream=stream):
            await eventually(arrived)
        await eventually(freed)


async def test_a_client_that_leaves_in_mid_stream_frees_the_upstream() -> None:
    never = asyncio.Event()
    script = stream_reply(chunk(ROLE), chunk({"content": "Hel"}), never)

    async with upstream(script) as server, running(settings_for(server.settings())) as house:
        async with asked(house, stream=True) as reader:
            await reader.readuntil(b"Hel")
        await eventually(server.requests[-1].gone)


async def test_a_client_that_leaves_while_it_is_kept_waiting_frees_the_upstream() -> None:
    never = asyncio.Event()
    server_settings = Server(hold_s=0.05, keep_alive_s=0.05)

    async with (
        upstream(stream_reply(never)) as server,
        running(settings_for(server.settings(), server=server_settings)) as house,
    ):
        async with asked(house, stream=True) as reader:
            await reader.readuntil(b": keep-alive")
        await eventually(server.requests[-1].gone)


async def test_a_generation_is_closed_when_its_client_leaves() -> None:
    hello = Part.encode(ChatChunk(choices=[ChunkChoice(delta=Delta(content="Hel"), finish_reason=None)]))
    adapter = ScriptedAdapter([hello], asyncio.Event())

    async with scripted(adapter) as house:
        async with asked(house, stream=True) as reader:
            await reader.readuntil(b"Hel")
        async with asyncio.timeout(WITHIN_S):
            while not adapter.closed:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_3000_clients_that_hang_up_at_random_leave_nothing_behind() -> None:
    chance = random.Random(7)

    async def slowly(received: Received, writer: asyncio.StreamWriter) -> None:
        if b'"stream": true' not in received.body and b'"stream":true' not in received.body:
            await asyncio.sleep(0.002)
            return await json_reply(completion())(received, writer)
        pause = asyncio.Event()
        asyncio.get_running_loop().call_later(0.01, pause.set)
        return await stream_reply(*hello_stream()[:3], pause, *hello_stream()[3:])(received, writer)

    async def leave(house: House) -> None:
        async with asked(house, stream=chance.random() < 0.7) as reader:
            try:
                async with asyncio.timeout(chance.random() * 0.03):
                    await reader.read()
            except TimeoutError:
                pass

    async with upstream(slowly) as server, running(settings_for(server.settings())) as house:
        await house.openai.chat.completions.create(**HELLO)
        await asyncio.sleep(0.1)
        files, tasks = open_files(), len(asyncio.all_tasks())

        for _ in range(30):
            await asyncio.gather(*(leave(house) for _ in range(100)))

        async with asyncio.timeout(30):  # for those that left before they were even accepted to be seen as gone
            while len(asyncio.all_tasks()) > tasks + server.connections or open_files() > files + 2:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        for _ in range(50):
            reply = await house.openai.chat.completions.create(**HELLO)
            assert reply.choices[0].message.content == "Hello"
