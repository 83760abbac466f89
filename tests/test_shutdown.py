"""How does the gateway end? Each one here is a process of its own, that real signals reach."""

import asyncio
import json
import os
import signal
import time
from pathlib import Path

import httpx2
import pytest

from tests.house import (
    HELLO,
    ROLE,
    Received,
    chunk,
    completion,
    events_of,
    hello_stream,
    json_reply,
    stream_reply,
    upstream,
)
from tests.served import PATIENCE_S, Served, request_bytes, serving, started, until

pytestmark = pytest.mark.anyio

SOON_S = 5.0  # for what happens at once, on a busy machine


def body_of(answer: bytes) -> bytes:
    """What chunks there are, put together."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" not in head:
        return rest
    pieces = []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        pieces.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]
    return b"".join(pieces)


async def rest_of(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(PATIENCE_S):
        return await reader.read()


async def unanswered(received: Received, writer: asyncio.StreamWriter) -> None:
    if received.path.endswith("/models"):
        return await json_reply({})(received, writer)
    await received.gone.wait()
    return None


BEGUN = [chunk(ROLE), chunk({"content": "Hel"})]


async def test_sigterm_turns_readiness_red_and_goes_on_answering_for_the_drain_delay(tmp_path: Path) -> None:
    async with upstream(json_reply(completion())) as server, serving(tmp_path, server, drain_delay_s=60) as served:
        async with httpx2.AsyncClient() as client:
            assert (await client.get(f"{served.url}/health/ready")).json() == {"status": "ready"}
            served.signal()
            async with asyncio.timeout(PATIENCE_S):
                while (ready := await client.get(f"{served.url}/health/ready")).status_code == 200:
                    pass
            assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
            assert (await client.get(f"{served.url}/health/live")).status_code == 200
            answer = await client.post(f"{served.url}/v1/chat/completions", json=HELLO)
            assert answer.status_code == 200
            assert answer.headers["connection"] == "close"
        served.signal()
        await served.ended(SOON_S)


async def test_without_a_load_balancer_there_is_no_drain_delay(tmp_path: Path) -> None:
    async with upstream(json_reply(completion())) as server, serving(tmp_path, server, drain_delay_s=None) as served:
        served.signal()
        await served.ended(SOON_S)


async def test_sigint_does_not_wait_for_the_drain_delay(tmp_path: Path) -> None:
    async with upstream(json_reply(completion())) as server, serving(tmp_path, server, drain_delay_s=60) as served:
        served.signal(signal.SIGINT)
        await served.ended(SOON_S)


@pytest.mark.parametrize("stream", [False, True])
async def test_what_runs_when_the_signal_comes_is_answered_in_full(tmp_path: Path, stream: bool) -> None:
    asked, more = asyncio.Event(), asyncio.Event()

    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        if received.path.endswith("/models"):
            return await json_reply({})(received, writer)
        asked.set()
        if stream:
            return await stream_reply(*BEGUN, more, *hello_stream()[2:])(received, writer)
        await more.wait()
        return await json_reply(completion())(received, writer)

    async with upstream(script) as server, serving(tmp_path, server) as served:
        reader, _ = await served.ask(stream=stream)
        await (reader.readuntil(b"Hel") if stream else asked.wait())
        served.signal()
        await served.until_closed()
        more.set()
        answer = await rest_of(reader)
        assert b"[DONE]" in answer if stream else b'"Hello"' in answer
        assert stream or b"\r\nconnection: close\r\n" in answer
        await served.ended(SOON_S)
        assert "waiting for 1 requests" in served.log


async def test_after_the_grace_each_stream_ends_with_an_error_event(tmp_path: Path) -> None:
    never = asyncio.Event()
    async with upstream(stream_reply(*BEGUN, never)) as server, serving(tmp_path, server, grace_s=0.2) as served:
        clients = [await served.ask(stream=True) for _ in range(20)]
        begun = [await reader.readuntil(b"Hel") for reader, _ in clients]
        served.signal()
        answers = [head + await rest_of(reader) for head, (reader, _) in zip(begun, clients, strict=True)]
        await served.ended(SOON_S)
        for answer in answers:
            events = events_of(body_of(answer))
            assert events[-1]["error"]["code"] == "shutting_down"
            assert events[-1]["error"]["type"] == "server_error"
            assert "[DONE]" not in events
            assert answer.endswith(b"0\r\n\r\n"), "the body has its proper end"
        async with asyncio.timeout(SOON_S):
            await asyncio.gather(*(received.gone.wait() for received in server.requests if received.body))


@pytest.mark.parametrize("stream", [False, True])
async def test_after_the_grace_what_was_not_answered_gets_503(tmp_path: Path, stream: bool) -> None:
    async with upstream(unanswered) as server, serving(tmp_path, server, grace_s=0.2) as served:
        known = len(server.requests)
        reader, _ = await served.ask(stream=stream)
        await until(lambda: len(server.requests) > known)
        served.signal()
        answer = await rest_of(reader)
        await served.ended(SOON_S)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nretry-after: 1\r\n" in answer
    assert json.loads(body_of(answer))["error"]["code"] == "shutting_down"


async def test_after_the_grace_a_half_sent_body_gets_503(tmp_path: Path) -> None:
    async with upstream(unanswered) as server, serving(tmp_path, server, grace_s=0.2) as served:
        reader, _ = await served.connect(request_bytes().replace(b"\r\n\r\n", b"\r\nexpect: 100-continue\r\n\r\n")[:-5])
        await reader.readuntil(b"100 Continue\r\n\r\n")
        served.signal()
        answer = await rest_of(reader)
        await served.ended(SOON_S)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert json.loads(body_of(answer))["error"]["code"] == "shutting_down"


@pytest.mark.parametrize("again", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_streams_at_once_with_an_error_event(tmp_path: Path, again: signal.Signals) -> None:
    never = asyncio.Event()
    async with upstream(stream_reply(*BEGUN, never)) as server, serving(tmp_path, server, grace_s=600) as served:
        reader, _ = await served.ask(stream=True)
        begun = await reader.readuntil(b"Hel")
        served.signal()
        await served.until_closed()
        served.signal(again)
        events = events_of(body_of(begun + await rest_of(reader)))
        await served.ended(SOON_S)
    assert events[-1]["error"]["code"] == "shutting_down"


async def test_half_sent_headers_and_idle_connections_do_not_delay_the_end(tmp_path: Path) -> None:
    async with upstream(json_reply(completion())) as server, serving(tmp_path, server, grace_s=600) as served:
        idle, _ = await served.ask()
        await idle.readuntil(b'"Hello"')
        half, _ = await served.connect(request_bytes()[:50])
        after_an_answer, writer = await served.ask()
        await after_an_answer.readuntil(b'"Hello"')
        writer.write(request_bytes()[:50])
        nothing, _ = await served.connect()
        began = time.monotonic()
        served.signal()
        for reader in (idle, half, after_an_answer, nothing):
            assert b"HTTP/1.1" not in await rest_of(reader)
        await served.ended()
        assert time.monotonic() - began < 3


async def test_a_reader_that_has_stopped_cannot_delay_the_end_beyond_the_grace(tmp_path: Path) -> None:
    async def flood(received: Received, writer: asyncio.StreamWriter) -> None:
        if received.path.endswith("/models"):
            return await json_reply({})(received, writer)
        return await stream_reply(chunk(ROLE), *[chunk({"content": "x" * 60_000})] * 500)(received, writer)

    async with upstream(flood) as server, serving(tmp_path, server, grace_s=0.2) as served:
        reader, writer = await served.ask(stream=True)
        await reader.readuntil(b"xxx")
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        served.signal()
        await served.ended(SOON_S)


def children_of(served: Served) -> list[str]:
    return Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children").read_text().split()


@pytest.mark.slow
async def test_the_child_with_the_local_model_ends_too() -> None:
    async with started() as served:
        children = children_of(served)
        assert children
        body = {"model": "suiron-demo", "stream": True, "max_tokens": 500}
        reader, _ = await served.ask(**body)
        await reader.readuntil(b"data: ")
        served.signal()
        served.signal()
        await served.ended()
        assert not any(os.path.exists(f"/proc/{child}") for child in children)  # noqa: ASYNC240
