"""The gateway itself, killed at random moments under load: is every request that an upstream saw a row, once?"""

import asyncio
import json
import random
import signal
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest

from tests.house import HELLO, Received, chunk, completion, head, hello_stream, upstream
from tests.ledger.calls import DIFFERENCE, ask, rows_at
from tests.ledger.test_serving import ROOT, a_free_port, command
from tests.served import until

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

LIVES = 12
CLIENTS = 6
SEED = 20261127


class Upstream:
    """Answers at its own pace, and counts what it was asked to answer."""

    def __init__(self) -> None:
        self.asked = 0

    async def __call__(self, received: Received, writer: asyncio.StreamWriter) -> None:
        if received.path.endswith("/models"):
            body = b'{"object": "list", "data": []}'
            writer.write(head(200, {"content-length": str(len(body))}) + body)
            return
        self.asked += 1
        await asyncio.sleep(0.02)
        if not received.json.get("stream"):
            body = json.dumps(completion()).encode()
            writer.write(head(200, {"content-type": "application/json", "content-length": str(len(body))}) + body)
            return
        writer.write(head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"}))
        first, *rest = hello_stream()
        for block in (first, *(chunk({"content": "la"}) for _ in range(20)), *rest):
            writer.write(b"%x\r\n%b\r\n" % (len(block), block))
            await writer.drain()
            await asyncio.sleep(0.005)
        writer.write(b"0\r\n\r\n")


async def client(port: int, number: int, answered: set[str]) -> None:
    """Asks again and again, every other time for a stream, until nobody is there."""
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}/v1", timeout=10) as http:
        while True:
            number += 1
            stream = number % 2 == 0
            try:
                reply = await http.post("/chat/completions", json={**HELLO, "stream": stream})
            except httpx2.HTTPError:
                return
            if reply.status_code == 200 and (not stream or reply.text.endswith("[DONE]\n\n")):
                answered.add(reply.headers["x-request-id"])


@asynccontextmanager
async def a_life(config: Path, port: int) -> AsyncIterator[Process]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command(config, port), cwd=ROOT, stdout=pipe, stderr=pipe)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            await process.stdout.readuntil(b"or put a server here")
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_no_request_is_lost_and_none_is_there_twice(tmp_path: Path) -> None:
    chance, answering, answered = random.Random(SEED), Upstream(), set[str]()
    async with upstream(answering) as server:
        config = tmp_path / "gateway.yaml"
        config.write_text(
            json.dumps(
                {
                    "upstreams": {"one": {"adapter": "openai", "base_url": f"http://127.0.0.1:{server.port}/v1"}},
                    "models": {"smart": {"targets": [{"upstream": "one"}], "prices": {"input": 1, "output": 2}}},
                    "database": {"url": f"sqlite:///{tmp_path}/ledger.db", "journal_mib": 1},
                    "telemetry": {"log": "off"},
                }
            )
        )
        for life in range(LIVES):
            port, before = a_free_port(), answering.asked
            async with a_life(config, port) as process:
                clients = [asyncio.create_task(client(port, number, answered)) for number in range(CLIENTS)]
                enough = before + chance.randrange(1, 80)
                await until(lambda enough=enough: answering.asked >= enough)  # type: ignore[misc]
                await asyncio.sleep(chance.random() * 0.15)
                process.send_signal(signal.SIGTERM if life == LIVES - 1 else signal.SIGKILL)
                await process.wait()
                await asyncio.gather(*clients)
        async with a_life(config, a_free_port()) as process:
            process.send_signal(signal.SIGTERM)
            await process.wait()

    rows = rows_at(tmp_path)
    ids = [row["request_id"] for row in rows]
    outcomes = [row["outcome"] for row in rows]
    assert len(ids) == len(set(ids))
    assert answered <= set(ids)
    assert answering.asked <= len(ids) <= answering.asked + CLIENTS * (LIVES - 1)  # those that it had not come to ask
    assert outcomes.count("abandoned") <= CLIENTS * (LIVES - 1)
    assert {"completed", "abandoned"} <= set(outcomes)
    assert all(row["cost_nano"] is not None for row in rows)
    assert ask(tmp_path, DIFFERENCE) == []
