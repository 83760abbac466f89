"""A gateway that is killed at any point leaves each request it dispatched one row, and each quota what its rows say."""

import asyncio
import contextlib
import json
import random
import signal
import sqlite3
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.house import DONE, ROLE, Received, UpstreamServer, chunk, completion, head, upstream
from tests.served import Served, request_bytes, started, until
from tests.stores.servers import RedisServer, redis_server

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

PIECES = 8
BEFORE = [("early", ms) for ms in (0, 1, 2, 3, 4, 6)]
AT_UPSTREAM = [("asked", 0), ("answering", 0)] + [("piece", piece) for piece in range(PIECES)]
AFTER = [("after", ms) for ms in (0, 1, 2, 4, 8, 16, 30, 60, 90, 120, 180)]
DRAINING = [("drain", ms) for ms in (0, 5, 20, 50, 100)]
POINTS = [(kind, *point) for kind in ("plain", "stream") for point in (*BEFORE, *AT_UPSTREAM, *AFTER, *DRAINING)]


class Mock:
    """An upstream that counts what it was asked for, and what it gave, and says when a point is reached."""

    def __init__(self) -> None:
        self.asked: dict[str, int] = {}
        """How many tokens each request was given, by the gateway's id for it."""
        self.whole: set[str] = set()
        self.reached = asyncio.Event()
        self.stop_at: tuple[str, int] = ("", 0)

    async def answer(self, received: Received, writer: asyncio.StreamWriter) -> None:
        if received.path.endswith("/models"):
            body = json.dumps({"object": "list", "data": [{"id": "model-1"}]}).encode()
            writer.write(head(200, {"content-type": "application/json", "content-length": str(len(body))}) + body)
            return
        request_id = f"req_{received.headers['x-request-id'].rpartition('-')[0]}"
        self.asked[request_id] = 0
        await self._pass(received, "asked", 0)
        if received.json.get("stream"):
            await self._stream(request_id, received, writer)
        else:
            await self._whole(request_id, received, writer)
        self.whole.add(request_id)

    async def _whole(self, request_id: str, received: Received, writer: asyncio.StreamWriter) -> None:
        usage = {"prompt_tokens": 10, "completion_tokens": PIECES, "total_tokens": 10 + PIECES}
        body = json.dumps({**completion("x" * PIECES), "usage": usage}).encode()
        writer.write(head(200, {"content-type": "application/json", "content-length": str(len(body))}))
        await self._pass(received, "answering", 0)
        for piece in range(PIECES):
            writer.write(body[piece * len(body) // PIECES : (piece + 1) * len(body) // PIECES])
            self.asked[request_id] = PIECES * (piece == PIECES - 1)  # with the last byte all of it is given
            await self._pass(received, "piece", piece)

    async def _stream(self, request_id: str, received: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"}))
        await self._pass(received, "answering", 0)
        usage = {"prompt_tokens": 10, "completion_tokens": PIECES, "total_tokens": 10 + PIECES}
        events = [chunk(ROLE), *(chunk({"content": "x "}) for _ in range(PIECES)), chunk({}, "stop")]
        for piece, event in enumerate([*events, chunk(None, usage=usage), DONE]):
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            self.asked[request_id] = min(max(piece, 0), PIECES)
            await self._pass(received, "piece", piece - 1)
        writer.write(b"0\r\n\r\n")

    async def _pass(self, received: Received, *point: Any) -> None:
        if point == self.stop_at:
            self.reached.set()
            await received.gone.wait()
            raise ConnectionResetError
        await asyncio.sleep(0)


def config(folder: Path, server: UpstreamServer, redis: RedisServer | None) -> Path:
    limits = {
        "requests_per_minute": 100_000,
        "tokens_per_day": 10**9,
        "usd_per_month": 1000,
        "concurrent_requests": 999,
    }
    document = {
        "server": {"drain_delay_s": 0, "grace_s": 0.05},
        "upstreams": {"one": {"adapter": "openai", "base_url": f"http://127.0.0.1:{server.port}/v1"}},
        "models": {
            "smart": {"targets": [{"upstream": "one", "model": "model-1"}], "prices": {"input": 1, "output": 2}}
        },
        "limits": limits,
        "database": {"url": f"sqlite:///{folder}/ledger.db", "journal": f"{folder}/journal", "journal_mib": 1},
        **({} if redis is None else {"store": {"url": redis.url, "timeout_s": 2}}),
    }
    path = folder / "gateway.yaml"
    path.write_text(json.dumps(document))
    return path


@asynccontextmanager
async def killed_at(path: Path, mock: Mock, kind: str, where: str, how: int) -> AsyncIterator[None]:
    """A gateway's life that ends at a point: with *kind* of request under way, and four others beside it."""
    mock.reached.clear()
    at_upstream = where in ("asked", "answering", "piece")
    mock.stop_at = (where, how) if at_upstream else ("", 0)
    async with started("--config", str(path)) as served:
        asking = request_bytes(stream=kind == "stream", max_tokens=20)
        readers = [(await served.connect(asking))[0] for _ in range(5)]
        if at_upstream:
            await _within(mock.reached.wait())
        elif where in ("after", "drain"):
            await _within(asyncio.gather(*(_read(reader) for reader in readers)))
        if where == "drain":
            mock.stop_at = ("piece", 3)
            await served.ask(stream=True)
            await _within(mock.reached.wait())
            served.signal(signal.SIGTERM)
        if not at_upstream:
            await asyncio.sleep(how / 1000)
        yield
        with contextlib.suppress(ProcessLookupError):  # it had ended by itself just now
            served.signal(signal.SIGKILL)
        await served.process.wait()


async def _within(waiting: Awaitable[object]) -> None:
    async with asyncio.timeout(20):
        await waiting


async def _read(reader: asyncio.StreamReader) -> bytes:
    """Until the answer is there."""
    first = await reader.readuntil(b"\r\n\r\n")
    ends = b"[DONE]" if b"event-stream" in first else b"}]"
    return await reader.readuntil(ends)


def rows(folder: Path) -> dict[str, sqlite3.Row]:
    connection = sqlite3.connect(folder / "ledger.db")
    connection.row_factory = sqlite3.Row
    try:
        found = connection.execute("SELECT * FROM usage").fetchall()
    finally:
        connection.close()
    assert len(found) == len({row["request_id"] for row in found})
    return {row["request_id"]: row for row in found}


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "redis"])
async def test_killed_at_any_point_each_dispatched_request_has_one_row(shared: bool, tmp_path: Path) -> None:
    mock = Mock()
    points = POINTS if not shared else POINTS[::3]
    random.Random(7).shuffle(points := list(points))
    async with upstream(mock.answer) as server:
        with redis_server() as redis:
            path = config(tmp_path, server, redis if shared else None)
            for kind, where, how in points:
                async with killed_at(path, mock, kind, where, how):
                    pass
            mock.stop_at = ("", 0)
            async with started("--config", str(path)) as served:
                await settled(tmp_path, mock, served)
                served.signal()
                await served.ended()
    written = rows(tmp_path)
    assert set(mock.asked) - set(written) == set(), "no dispatched request is without a row"
    unasked = [row for request_id, row in written.items() if request_id not in mock.asked]
    assert {row["outcome"] for row in unasked} <= {"abandoned"}, "what was only about to be dispatched is said so"
    for request_id, given in mock.asked.items():
        row = written[request_id]
        assert row["completion_tokens"] <= given, "nobody pays for what was not generated"
        if row["outcome"] == "completed":
            assert (row["prompt_tokens"], row["completion_tokens"]) == (10, PIECES)


async def settled(folder: Path, mock: Mock, served: Served) -> None:
    """The last gateway has written what the others left behind."""
    await until(lambda: set(mock.asked) <= set(rows(folder)))


async def test_a_stream_that_a_crash_cut_is_billed_for_what_had_come(tmp_path: Path) -> None:
    mock = Mock()
    async with upstream(mock.answer) as server:
        path = config(tmp_path, server, None)
        async with killed_at(path, mock, "stream", "piece", 5):
            await asyncio.sleep(2.5)  # progress is noted every second
        async with started("--config", str(path)) as served:
            await settled(tmp_path, mock, served)
    billed = [row["completion_tokens"] for row in rows(tmp_path).values()]
    assert billed == [6] * 5
