"""
What can a client do to the gateway, and to the others, that means no good?

The rows are those of the fault matrix. Elsewhere: leaving early (57, 58: api/test_hangups), bodies that are too large,
too deep or wrong (65 to 69: api/test_bad_input), hosts and keys (71: test_auth). Not yet there to be tested: leaving
a queue (56), guessing keys (74) and spread retries (75), which come with limits.
"""

import asyncio
import ipaddress
import json
import os
import re
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from adapters.echo import Adapter as Echo
from gateway.adapter import Adapter, Dispatch
from gateway.api.shutdown import Shutdown
from gateway.auth import client_address
from gateway.connection import LISTEN_AGAIN_S
from gateway.schema.chat import ChatRequest
from gateway.schema.payload import Parts, Payload
from gateway.server import Gateway, listen
from gateway.settings import CORS, Server, Settings, SettingsError, Upstream, parse
from tests.house import (
    AUTH,
    HELLO,
    ROLE,
    TOKEN,
    House,
    Received,
    chunk,
    completion,
    hello_stream,
    json_reply,
    running,
    settings_for,
    stream_reply,
    upstream,
)
from tests.served import Served, serving, until

pytestmark = pytest.mark.anyio

PATIENCE_S = 10.0
HEAD_S = 0.3
KEY_LINE = f"authorization: Bearer {TOKEN}".encode()


@pytest.fixture(scope="module")
async def house() -> AsyncIterator[House]:
    """Its model is an echo; it waits for headers only for a moment."""
    async with running(settings_for(Upstream(adapter="echo"), server=Server(header_timeout_s=HEAD_S))) as house:
        yield house


def post(*lines: bytes, body: bytes = b"", version: bytes = b"1.1", path: bytes = b"/v1/chat/completions") -> bytes:
    first = b"POST " + path + b" HTTP/" + version
    head = [first, b"host: 127.0.0.1", KEY_LINE, b"content-type: application/json", *lines]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def asking(*lines: bytes, **changes: Any) -> bytes:
    body = json.dumps({**HELLO, **changes}).encode()
    return post(*lines, b"content-length: %d" % len(body), body=body)


def get(*lines: bytes, path: bytes = b"/health/live") -> bytes:
    return b"\r\n".join([b"GET " + path + b" HTTP/1.1", b"host: a", *lines]) + b"\r\n\r\n"


LAST = get(b"connection: close")


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def talk(house: House, *blocks: bytes) -> bytes:
    """All that the gateway says to *blocks* until it closes the connection."""
    async with asyncio.timeout(PATIENCE_S), connected(house.port) as (reader, writer):
        for block in blocks:
            writer.write(block)
            await writer.drain()
        return await reader.read()


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", answer)]


def error_of(answer: bytes) -> dict[str, Any]:
    head, _, body = re.split(rb"HTTP/1\.1 (?=\d{3} )", answer)[-1].partition(b"\r\n\r\n")
    assert b"\r\ncontent-type: application/json\r\n" in head
    assert b"\r\nconnection: close" in head
    assert re.search(rb"\r\nx-request-id: req_[0-9a-f]{32}\r\n", head)
    error: dict[str, Any] = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# 70: requests in one packet, and what cannot be told apart.


async def test_pipelined_requests_are_answered_in_order(house: House) -> None:
    contents = ["one", "two", "three"]
    asked = [asking(messages=[{"role": "user", "content": content}]) for content in contents]
    answer = await talk(house, b"".join(asked) + LAST)
    assert statuses(answer) == [200] * 4
    assert re.findall(rb'"content":"(\w+)"', answer) == [b"one", b"two", b"three"]


async def test_a_request_whose_task_was_cancelled_as_it_ended_takes_no_later_one_with_it() -> None:
    class Late(Echo):
        async def chat(self, request: Payload[ChatRequest], dispatch: Dispatch) -> AsyncGenerator[Parts]:
            async for arrived in super().chat(request, dispatch):
                yield arrived
            task = asyncio.current_task()
            assert task is not None
            task.cancel()  # as a timer might that was a moment too late

    settings = settings_for(Upstream(adapter="echo"))
    late: dict[str, Adapter] = {name: Late(upstream) for name, upstream in settings.upstreams.items()}
    async with running(settings, late) as house, connected(house.port) as (reader, writer), asyncio.timeout(PATIENCE_S):
        for _ in range(3):
            writer.write(asking())
            head = await reader.readuntil(b"\r\n\r\n")
            assert statuses(head) == [200]
            await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))  # type: ignore[index]


async def test_what_is_no_http_is_answered_after_the_requests_before_it_and_is_the_last(house: House) -> None:
    answer = await talk(house, asking() + asking() + b"what?\r\n\r\n" + asking())
    assert statuses(answer) == [200, 200, 400]
    assert error_of(answer)["code"] == "malformed_request"


async def test_a_pipelined_client_that_leaves_frees_the_upstream() -> None:
    never = asyncio.Event()
    async with (
        upstream(stream_reply(chunk({**ROLE, "content": "Hi"}), never)) as server,
        running(settings_for(server.settings())) as house,
    ):
        async with connected(house.port) as (reader, writer):
            writer.write(asking(stream=True))
            await reader.readuntil(b"assistant")
            writer.write(asking(stream=True)[:-3])
        async with asyncio.timeout(1):
            await server.requests[-1].gone.wait()


async def test_a_pipelining_client_cannot_fill_the_memory_with_what_waits_in_line() -> None:
    never = asyncio.Event()
    async with (
        upstream(stream_reply(chunk({**ROLE, "content": "Hi"}), never)) as server,
        running(settings_for(server.settings())) as house,
        connected(house.port) as (reader, writer),
    ):
        writer.write(asking(stream=True))
        await reader.readuntil(b"Hi")
        writer.write(get() * 1_000_000)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(4 * LISTEN_AGAIN_S):
                await writer.drain()
        assert writer.transport.get_write_buffer_size() > 20_000_000


async def test_many_pipelined_requests_are_not_taken_for_a_large_one(house: House) -> None:
    answer = await talk(house, get() * 10_000 + LAST)
    assert answer.count(b'{"status":"ok"}') == 10_001


CHUNKED = b"transfer-encoding: chunked"
END = b"0\r\n\r\n"
AMBIGUOUS: dict[str, bytes] = {
    "both lengths": post(CHUNKED, b"content-length: 5", body=END),
    "both lengths, reversed": post(b"content-length: 5", CHUNKED, body=END),
    "two lengths": post(b"content-length: 1", b"content-length: 2", body=b"x"),
    "the same length twice": post(b"content-length: 1", b"content-length: 1", body=b"x"),
    "a list of lengths": post(b"content-length: 1, 1", body=b"x"),
    "a length with a sign": post(b"content-length: +1", body=b"x"),
    "a negative length": post(b"content-length: -1", body=b"x"),
    "a hexadecimal length": post(b"content-length: 0x1", body=b"x"),
    "an empty length": post(b"content-length:"),
    "a length of two numbers": post(b"content-length: 1 1", body=b"x"),
    "a length beyond 64 bits": post(b"content-length: " + b"9" * 30, body=b"x"),
    "a space before the colon": post(b"transfer-encoding : chunked", body=END),
    "identity": post(b"transfer-encoding: identity", body=END),
    "chunked, identity": post(b"transfer-encoding: chunked, identity", body=END),
    "an unknown coding": post(b"transfer-encoding: xchunked", body=END),
    "chunked twice": post(b"transfer-encoding: chunked, chunked", body=END),
    "two codings": post(CHUNKED, CHUNKED, body=END),
    "chunked, then identity": post(CHUNKED, b"transfer-encoding: identity", body=END),
    "an empty coding": post(b"transfer-encoding:", body=END),
    "a control character": post(b"transfer-encoding: \x0bchunked", body=END),
    "a quoted coding": post(b'transfer-encoding: "chunked"', body=END),
    "a coding with a parameter": post(b"transfer-encoding: chunked;a=b", body=END),
    "a carriage return in a value": post(b"transfer-encoding: chun\rked", body=END),
    "a folded coding": post(b"transfer-encoding:\r\n chunked", body=END),
    "a chunk of 0x1": post(CHUNKED, body=b"0x1\r\nx\r\n" + END),
    "a chunk of -1": post(CHUNKED, body=b"-1\r\nx\r\n" + END),
    "a chunk without a length": post(CHUNKED, body=b"\r\nx\r\n" + END),
    "a chunk beyond 64 bits": post(CHUNKED, body=b"F" * 17 + b"\r\nx\r\n" + END),
    "a space behind the chunk's length": post(CHUNKED, body=b"1 \r\nx\r\n" + END),
    "a line feed in a chunk's extension": post(CHUNKED, body=b"1;a\n2\r\nx\r\n" + END),
    "chunks with line feeds": post(CHUNKED, body=b"1\nx\n0\n\n"),
    "a line feed behind a chunk": post(CHUNKED, body=b"1\r\nx\n" + END),
    "a chunk longer than it says": post(CHUNKED, body=b"1\r\nxx\r\n" + END),
    "a length in the trailer": post(CHUNKED, body=b"0\r\ncontent-length: 5\r\n\r\n"),
    "a line feed at the end": post(CHUNKED, body=b"0\r\n\n"),
    "another protocol": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/1.2": get().replace(b"1.1", b"1.2"),
    "a header without a colon": get(b"x"),
    "a space before the first header": get().replace(b"host", b" host"),
    "a header without a name": get(b": a"),
    "a space in a name": get(b"a b: c"),
    "line feeds only": get().replace(b"\r\n", b"\n"),
    "a line feed among others": get(b"x: a\ny: b"),
    "a carriage return in a header": get(b"x: a\rb"),
    "NUL in a header": get(b"x: a\0b"),
    "a folded header": get(b"x: a\r\n b"),
    "tabs between the words": get().replace(b" /health/live ", b"\t/health/live\t"),
    "a space in the path": get(path=b"/health/live x"),
    "8-bit characters in the path": get(path=b"/\xff"),
    "an unknown method": get().replace(b"GET", b"FOO"),
    "a method in lower case": get().replace(b"GET", b"get"),
    "a tunnel": b"CONNECT a:80 HTTP/1.1\r\nhost: a\r\n\r\n",
}
CLEAR: dict[str, bytes] = {
    "a tab before the length": post(b"content-length:\t2", body=b"{}"),
    "capital letters": post(b"Transfer-Encoding: CHUNKED", body=b"2\r\n{}\r\n" + END),
    "an extension": post(CHUNKED, body=b"2;a=b\r\n{}\r\n" + END),
    "a trailer": post(CHUNKED, body=b"2\r\n{}\r\n0\r\nx: y\r\n\r\n"),
    "a body that GET should not have": get(b"content-length: 3").replace(b"\r\n\r\n", b"\r\n\r\nabc"),
    "empty lines before it": b"\r\n\r\n" + get(),
    "the whole address": get(path=b"http://a/health/live"),
    "an 8-bit header": get(b"x: \xff"),
}


@pytest.mark.parametrize("what", AMBIGUOUS)
async def test_what_is_ambiguous_gets_one_400_and_nothing_after_it_an_answer(house: House, what: str) -> None:
    answer = await talk(house, get() + AMBIGUOUS[what] + LAST)
    assert statuses(answer) == [200, 400]
    assert error_of(answer)["code"] == "malformed_request"


@pytest.mark.parametrize("what", CLEAR)
async def test_what_is_clear_gets_one_answer_and_so_does_what_follows(house: House, what: str) -> None:
    answer = await talk(house, CLEAR[what] + LAST)
    assert len(statuses(answer)) == 2
    assert answer.endswith(b'{"status":"ok"}')


async def test_a_bad_chunk_behind_an_answer_closes_without_another(house: House) -> None:
    async with asyncio.timeout(PATIENCE_S), connected(house.port) as (reader, writer):
        writer.write(post(CHUNKED).replace(TOKEN.encode(), b"wrong"))
        await reader.readuntil(b"}}")
        writer.write(b"xx\r\n" + LAST)
        assert await reader.read() == b""


ENDLESS = {
    "trailers": b"0\r\n" + b"x: y\r\n" * 50_000,
    "a trailer": b"0\r\nx: " + b"y" * 300_000,
    "an extension": b"1;" + b"y" * 300_000,
}


@pytest.mark.parametrize("what", ENDLESS)
async def test_what_is_behind_a_body_is_bounded_as_its_head_is(house: House, what: str) -> None:
    try:
        answer = await talk(house, post(CHUNKED, body=ENDLESS[what]))
    except ConnectionError:
        return  # whoever does not stop may miss the answer
    assert statuses(answer) == [431]
    assert error_of(answer)["code"] == "headers_too_large"


async def test_a_trailer_is_no_header(house: House) -> None:
    body = json.dumps(HELLO).encode()
    asked = post(CHUNKED, body=b"%x\r\n%b\r\n0\r\n" % (len(body), body) + KEY_LINE + b"\r\n\r\n")
    answer = await talk(house, asked.replace(KEY_LINE + b"\r\n", b"", 1) + LAST)
    assert statuses(answer) == [401, 200]


async def test_a_body_that_was_announced_and_refused_unread_ends_the_connection(house: House) -> None:
    asked = post(b"content-length: 5", b"expect: 100-continue").replace(b"application/json", b"text/plain")
    answer = await talk(house, asked)
    assert statuses(answer) == [400]
    assert error_of(answer)["code"] == "unsupported_content_type"


async def test_an_upgrade_is_passed_over_and_one_with_a_body_is_refused_with_a_hint(house: House) -> None:
    lines = (b"connection: Upgrade, HTTP2-Settings", b"upgrade: h2c", b"http2-settings: AAMAAABkAARAAAAAAAIAAAAA")
    answer = await talk(house, get(*lines) + LAST)
    assert statuses(answer) == [200]
    answer = await talk(house, asking(*lines) + LAST)
    assert statuses(answer) == [400]
    assert "HTTP/1.1" in error_of(answer)["message"]


# 63 to 65: slow and large.


@pytest.mark.parametrize("before", [b"", asking()], ids=["at first", "after an answer"])
async def test_headers_that_do_not_come_get_408(house: House, before: bytes) -> None:
    answer = await talk(house, before + asking()[:40])
    assert statuses(answer) == [*([200] if before else []), 408]
    assert error_of(answer)["code"] == "request_timeout"


async def test_a_client_that_says_nothing_is_closed_without_a_word(house: House) -> None:
    assert await talk(house) == b""
    assert await talk(house, b"\r\n") == b""


async def test_300_that_dribble_their_headers_are_closed_in_time_and_do_not_slow_down_others(house: House) -> None:
    async def dribble() -> bytes:
        async with connected(house.port) as (reader, writer):
            answer = asyncio.ensure_future(reader.read())
            writer.write(b"GET / HTTP/1.1\r\nx: ")
            while not answer.done():
                writer.write(b"a")
                await asyncio.wait([answer], timeout=0.05)
            return answer.result()

    async with asyncio.timeout(PATIENCE_S):
        slow = [asyncio.ensure_future(dribble()) for _ in range(300)]
        slowest_s = 0.0
        while not all(task.done() for task in slow):
            began = time.monotonic()
            assert (await house.post()).status_code == 200
            slowest_s = max(slowest_s, time.monotonic() - began)
    assert slowest_s < 5
    assert {tuple(statuses(task.result())) for task in slow} == {(408,)}


async def test_a_body_that_dribbles_gets_408() -> None:
    settings = settings_for(Upstream(adapter="echo"), server=Server(body_timeout_s=0.3))
    async with asyncio.timeout(PATIENCE_S), running(settings) as house, connected(house.port) as (reader, writer):
        answer = asyncio.ensure_future(reader.read())
        writer.write(post(b"content-length: 1000"))
        while not answer.done():
            writer.write(b" ")
            await asyncio.wait([answer], timeout=0.05)
    assert statuses(answer.result()) == [408]


async def test_the_rest_of_a_refused_body_is_not_waited_for_forever(house: House) -> None:
    async with asyncio.timeout(PATIENCE_S), connected(house.port) as (reader, writer):
        answer = asyncio.ensure_future(reader.read())
        writer.write(post(b"content-length: 1000000000").replace(TOKEN.encode(), b"wrong"))
        while not answer.done():
            writer.write(b" " * 1000)
            await asyncio.wait([answer], timeout=0.02)
    assert statuses(answer.result()) == [401]


@pytest.mark.parametrize(
    "blocks",
    [
        [get(b"x: " + b"a" * 70_000)],
        [get(*[b"x-%d: %b" % (i, b"a" * 100) for i in range(700)])],
        [get(*[b"x: y"] * 5_000)],
        [get(path=b"/" + b"a" * 70_000)],
        [get()[:-2] + b"x: ", *[b"a" * 50_000] * 20],
    ],
    ids=["a long header", "many headers", "very many", "a long path", "a header without end"],
)
async def test_headers_that_are_too_large_get_431(house: House, blocks: list[bytes]) -> None:
    try:
        answer = await talk(house, *blocks)
    except ConnectionError:
        assert len(blocks) > 2, "whoever does not stop may miss the answer"
        return
    assert statuses(answer) == [431]
    assert error_of(answer)["code"] == "headers_too_large"


async def test_headers_below_the_limit_are_taken_whatever_the_size_of_the_body(house: House) -> None:
    large = asking(b"x: " + b"a" * 60_000, messages=[{"role": "user", "content": "b" * 200_000}])
    assert statuses(await talk(house, asking() + large + LAST)) == [200, 200, 200]


# 59 to 62: clients that do not read, or no longer.


async def test_a_half_closed_connection_counts_as_left() -> None:
    never = asyncio.Event()
    async with (
        upstream(stream_reply(chunk({**ROLE, "content": "Hi"}), never)) as server,
        running(settings_for(server.settings())) as house,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", house.port)
        writer.write(asking(stream=True))
        await reader.readuntil(b"assistant")
        writer.write_eof()
        async with asyncio.timeout(1):
            await server.requests[-1].gone.wait()
        writer.close()


def test_a_client_whose_cable_is_cut_is_noticed() -> None:
    listener = listen(Server(port=0, write_stall_s=7))
    with listener, socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
        assert [accepted.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [15, 15, 3, 7000]


async def flood(received: Received, writer: asyncio.StreamWriter) -> None:
    """A stream without an end, as fast as it is read."""
    if received.path.endswith("/models"):
        return await json_reply({})(received, writer)
    if not received.json.get("stream"):
        return await json_reply(completion())(received, writer)
    block = chunk({"content": "x" * 4000})
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"%x\r\n%b\r\n" % (len(block), block))
        await writer.drain()


@asynccontextmanager
async def deaf(port: int, count: int) -> AsyncIterator[None]:
    """Clients that ask for a stream, and do not read it."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            each.setblocking(False)
            await asyncio.get_running_loop().sock_connect(each, ("127.0.0.1", port))
            await asyncio.get_running_loop().sock_sendall(each, asking(stream=True))
        yield
    finally:
        for each in sockets:
            each.close()


async def test_a_client_that_stops_reading_is_cut_off_and_frees_the_upstream() -> None:
    async with upstream(flood) as server:
        settings = settings_for(server.settings(), server=Server(write_stall_s=0.3))
        async with running(settings) as house, deaf(house.port, 1):
            await until(lambda: bool(server.requests[-1].body))
            await until(lambda: not server.connections)


def resident_mib(served: Served) -> float:
    status = Path(f"/proc/{served.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    assert found is not None
    return int(found[1]) / 1024


async def test_50_clients_that_do_not_read_cost_little_memory_and_nobody_else_anything(tmp_path: Path) -> None:
    async with upstream(flood) as server, serving(tmp_path, server) as served, httpx2.AsyncClient() as client:

        async def ask() -> float:
            began = time.monotonic()
            answer = await client.post(f"{served.url}/v1/chat/completions", json=HELLO)
            assert answer.status_code == 200
            return time.monotonic() - began

        for _ in range(20):
            await ask()
        before = resident_mib(served)
        async with deaf(served.port, 50):
            await until(lambda: server.connections >= 50)
            used_s = -1.0
            while cpu_s(served) - used_s > 0.04:  # until nothing moves any more
                used_s = cpu_s(served)
                await asyncio.sleep(0.2)
                assert await ask() < PATIENCE_S / 2
            assert resident_mib(served) - before < 50


def cpu_s(served: Served) -> float:
    fields = Path(f"/proc/{served.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def test_a_client_that_leaves_at_done_disturbs_nothing() -> None:
    async with upstream(stream_reply(*hello_stream())) as server, running(settings_for(server.settings())) as house:
        for _ in range(20):
            async with asyncio.timeout(PATIENCE_S), connected(house.port) as (reader, writer):
                writer.write(asking(stream=True))
                await reader.readuntil(b"data: [DONE]\n\n")
        assert server.connections == 1, "the upstream's connection is used again: nothing was cut"


# 73 and 92: many connections.


async def test_1000_clients_at_once_are_all_answered(house: House) -> None:
    files = len(os.listdir("/proc/self/fd"))
    async with asyncio.timeout(30):
        answers = await asyncio.gather(*(talk(house, asking(b"connection: close")) for _ in range(1000)))
        assert {tuple(statuses(answer)) for answer in answers} == {(200,)}
        await until(lambda: len(os.listdir("/proc/self/fd")) <= files + 2)
        began = time.monotonic()
        assert (await house.post()).status_code == 200
        assert time.monotonic() - began < PATIENCE_S / 2


async def test_connections_beyond_a_configured_limit_get_503_but_for_health() -> None:
    server = Server(max_connections=3)
    async with running(settings_for(Upstream(adapter="echo"), server=server)) as house, asyncio.timeout(PATIENCE_S):
        async with connected(house.port) as (reader, writer), connected(house.port), connected(house.port):
            writer.write(asking())
            assert b" 200 " in await reader.readuntil(b"}}")
            answer = await talk(house, asking())
            assert statuses(answer) == [503]
            assert error_of_503(answer) == "overloaded"
            assert b"\r\nretry-after: " in answer
            assert statuses(await talk(house, LAST)) == [200]
            writer.write(asking())
            assert b" 200 " in await reader.readuntil(b"}}")
        while (answer := await talk(house, asking(b"connection: close"))).startswith(b"HTTP/1.1 503"):
            pass
        assert statuses(answer) == [200]


def error_of_503(answer: bytes) -> Any:
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"]


async def test_without_file_descriptors_left_connections_wait_and_nothing_spins(tmp_path: Path) -> None:
    under = ["bash", "-c", 'ulimit -n 128; exec "$@"', "bash"]  # room for 32 connections
    async with upstream(json_reply(completion())) as server, serving(tmp_path, server, under=under) as served:
        clients = [await served.ask() for _ in range(60)]
        answers = [asyncio.ensure_future(reader.readuntil(b"}}")) for reader, _ in clients]
        await until(lambda: sum(answer.done() for answer in answers) == 32)
        used_s = cpu_s(served)
        await asyncio.sleep(0.5)
        assert sum(answer.done() for answer in answers) == 32
        assert cpu_s(served) - used_s < 0.1
        for (_, writer), answer in zip(clients, answers, strict=True):
            if answer.done():
                writer.close()
        async with asyncio.timeout(PATIENCE_S):
            assert all(b" 200 " in answer for answer in await asyncio.gather(*answers))
        served.signal()
        await served.ended()
        assert "128 file descriptors do for 32 connections" in served.log


# 71 and 72: what is written into paths and headers.


@pytest.mark.parametrize(
    "path",
    [
        b"//v1/models", b"/v1//models", b"/v1/../v1/models", b"/health/../v1/models", b"/health/live/../../v1/models",
        b"/v1/models/", b"/v1/models;a", b"/V1/MODELS", b"/v1/%6dodels", b"/%76%31/models", b"/v1%2fmodels",
        b"/v1/models%00", b"/v1/models%20", b"/v1/models?x=/health/live", b"/v1/models#/health/live",
        b"/health/live%2f..%2f..%2fv1%2fmodels", b"/health/%2e%2e/v1/models", b"/./v1/models", b"/v1/./models",
        b"http://localhost/v1/models", b"http://health/v1/models", b"/v1/models/smart", b"/v1/models/..%2fsmart",
        b"/v1/models\\smart", b"/v1/%2e%2e/health", b"/health/ready/v1/models", b"*", b"/v1", b"/%", b"/%zz",
    ],
)  # fmt: skip
@pytest.mark.parametrize("lines", [[], [b"x-original-url: /health/live", b"x-rewrite-url: /health/live"]])
async def test_no_spelling_of_a_path_gets_round_the_key(house: House, path: bytes, lines: list[bytes]) -> None:
    answer = await talk(house, get(b"connection: close", *lines, path=path))
    assert statuses(answer)[0] in (400, 401, 404)
    assert b"owned_by" not in answer


@pytest.mark.parametrize("name", ["x-request-id", "x-client-request-id"])
@pytest.mark.parametrize("body", [HELLO, {**HELLO, "stream": True}, {**HELLO, "model": "nope"}, {}])
async def test_a_clean_request_id_is_echoed(house: House, name: str, body: dict[str, Any]) -> None:
    answer = await house.post(body, **{name: "Job-7.a_b"})
    assert answer.headers.get_list("x-request-id") == ["Job-7.a_b"]


async def test_the_models_echo_it_too(house: House) -> None:
    for path in ("models", "models/smart", "models/nope"):
        answer = await house.http.get(f"{house.url}/v1/{path}", headers={**AUTH, "x-request-id": "mine"})
        assert answer.headers["x-request-id"] == "mine"


@pytest.mark.parametrize(
    "given", [b"", b"a" * 65, b"a b", b"a,b", b"a\tb", b"a;b", b"a\xffb", b"<a>", b"a\\r\\nb", b'"a"']
)
async def test_any_other_request_id_is_replaced(house: House, given: bytes) -> None:
    answer = await talk(house, asking(b"x-request-id: " + given, b"connection: close"))
    assert statuses(answer) == [200]
    found = re.findall(rb"\r\nx-request-id: ([^\r]*)\r\n", answer)
    assert len(found) == 1
    assert re.fullmatch(rb"req_[0-9a-f]{32}", found[0])


@pytest.mark.parametrize("field", ["model", "user", "unknown", "top_k\r\nset-cookie: x=1"])
async def test_nothing_in_a_body_becomes_a_header(house: House, field: str) -> None:
    evil = "a\r\nSet-Cookie: x=1\r\n\r\nHTTP/1.1 200 OK"
    answer = await house.post({**HELLO, field: evil})
    assert "set-cookie" not in answer.headers
    assert answer.status_code in (200, 400, 404)


async def test_an_application_that_fails_gets_openais_error_too() -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            raise LookupError("canary")
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": f"{message['type']}.complete"})
        await send({"type": "lifespan.shutdown.complete"})

    gateway = Gateway(fails, Server(), Shutdown())
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    serving = asyncio.create_task(gateway.serve(listener))
    await gateway.started.wait()
    async with httpx2.AsyncClient() as client:
        answer = await client.get(f"http://127.0.0.1:{port}/")
    gateway.stop()
    await serving
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "canary" not in answer.text


# Pages of other sites.

PAGE = "https://app.example.com"
PREFLIGHT = {"origin": PAGE, "access-control-request-method": "POST"}


@pytest.fixture(scope="module")
async def open_to_page() -> AsyncIterator[House]:
    server = Server(cors=CORS(origins=[PAGE, "http://localhost:3000"]))
    async with running(settings_for(Upstream(adapter="echo"), server=server)) as house:
        yield house


async def preflight(house: House, **headers: str) -> httpx2.Response:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return await house.http.options(f"{house.url}/v1/chat/completions", headers={**PREFLIGHT, **sent})


async def test_no_page_may_call_by_default(house: House) -> None:
    assert (await preflight(house)).status_code == 405
    for answer in (await preflight(house), await house.post(origin=PAGE), await house.post({}, origin=PAGE)):
        assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_a_page_that_is_named_may_call_and_read(open_to_page: House) -> None:
    asked = await preflight(open_to_page, access_control_request_headers="authorization,content-type,x-stainless-os")
    assert asked.status_code == 204
    assert asked.headers["access-control-allow-origin"] == PAGE
    assert asked.headers["access-control-allow-headers"] == "authorization,content-type,x-stainless-os"
    assert "POST" in asked.headers["access-control-allow-methods"]
    for body, status in (({**HELLO, "stream": True}, 200), (HELLO, 200), ({}, 400)):
        answer = await open_to_page.post(body, origin=PAGE)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in answer.headers
    refused = await open_to_page.post(origin=PAGE, authorization="Bearer wrong")
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)
    missing = await open_to_page.http.get(f"{open_to_page.url}/nope", headers={"origin": PAGE})
    assert (missing.status_code, missing.headers["access-control-allow-origin"]) == (404, PAGE)


@pytest.mark.parametrize(
    "origin",
    ["https://app.example.com.evil.example", "https://evil.example", "http://app.example.com", "null", "", "*",
     "https://appxexample.com", f"{PAGE}/", f"{PAGE}:8443", f"{PAGE}, https://evil.example", "HTTPS://APP.EXAMPLE.COM"],
)  # fmt: skip
async def test_no_other_page_may_read_and_caches_know_it(open_to_page: House, origin: str) -> None:
    for answer in (await preflight(open_to_page, origin=origin), await open_to_page.post(origin=origin)):
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert "origin" in answer.headers.get_list("vary")
    assert "origin" in (await open_to_page.post()).headers.get_list("vary")


async def test_a_preflight_cannot_write_headers_of_its_own(open_to_page: House) -> None:
    asked = await preflight(open_to_page, access_control_request_headers="a;b<c>")
    assert asked.status_code == 204
    assert "access-control-allow-headers" not in asked.headers


@pytest.mark.parametrize(
    "origin", ["*", "null", "app.example.com", "https://a.example/", "https://*.example", "https://A"]
)
def test_only_exact_origins_can_be_configured(origin: str) -> None:
    with pytest.raises(SettingsError, match=r"cors\.origins\[0\]: expected an origin such as"):
        parse(f"server: {{cors: {{origins: ['{origin}']}}}}", "g.yaml")


# Who is behind a proxy.

PROXIES = [ipaddress.ip_network(network) for network in ("10.0.0.0/8", "::1", "2001:db8::/32")]


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("203.0.113.9", [], "203.0.113.9"),
        ("203.0.113.9", [b"198.51.100.1"], "203.0.113.9"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", [b"198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", [b"127.0.0.1, 198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", [b"127.0.0.1", b"198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", [b"198.51.100.1, 10.0.0.2"], "198.51.100.1"),
        ("10.0.0.1", [b"198.51.100.1 , 10.0.0.2,10.0.0.3 "], "198.51.100.1"),
        ("10.0.0.1", [b"10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ("10.0.0.1", [b"198.51.100.1, what?"], "10.0.0.1"),
        ("10.0.0.1", [b"198.51.100.1, "], "10.0.0.1"),
        ("10.0.0.1", [b"\xff\xfe"], "10.0.0.1"),
        ("10.0.0.1", [b"198.51.100.1:4711"], "198.51.100.1"),
        ("::1", [b"[2001:db8:1::5]:80, [2a00::7]:443"], "2a00::7"),
        ("::1", [b"2a00::7"], "2a00::7"),
        ("::1", [b"::ffff:198.51.100.1"], "198.51.100.1"),
        ("::ffff:10.0.0.1", [b"198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", [b"," * 1000 + b"198.51.100.1"], "198.51.100.1"),
    ],
)
def test_the_last_address_that_is_no_proxy_of_ours_is_the_clients(
    peer: str, forwarded: list[bytes], client: str
) -> None:
    assert client_address(peer, forwarded, PROXIES) == client


@pytest.mark.parametrize("network", ["10.0.0.0/33", "10.0.0.1/8", "proxy.example", ""])
def test_only_networks_can_be_trusted(network: str) -> None:
    with pytest.raises(SettingsError, match=r"server\.trusted_proxies\[0\]: no address and no network such as"):
        parse(f"server: {{trusted_proxies: ['{network}']}}", "g.yaml")


@pytest.mark.parametrize("trusted", [[], ["127.0.0.0/8"]])
async def test_without_keys_nobody_comes_in_through_a_proxy_trusted_or_not(trusted: list[str]) -> None:
    settings = settings_for(Upstream(adapter="echo"), server=Server(trusted_proxies=trusted))
    keyless = Settings(server=settings.server, upstreams=settings.upstreams, models=settings.models)
    async with running(keyless) as house:
        assert statuses(await talk(house, get(b"connection: close", path=b"/v1/models"))) == [401], "host: a"
        local = get(b"connection: close", path=b"/v1/models").replace(b"host: a", b"host: localhost")
        assert statuses(await talk(house, local)) == [200]
        passed_on = local.replace(b"connection", b"x-forwarded-for: 127.0.0.1\r\nconnection")
        assert statuses(await talk(house, passed_on)) == [401]
