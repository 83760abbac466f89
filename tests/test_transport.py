"""Does the transport keep its promises to httpx2, whatever the server does?"""

import asyncio
import gc
import gzip
import os
import random
import shutil
import socket
import ssl
import subprocess
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from typing import Any, NamedTuple

import httpx2
import pytest

from gateway.transport import Transport
from gateway.transport.asking import Preamble, Request
from tests.rawserver import PATIENCE_S, Peer, RawRequest, RawServer, Script, serving

pytestmark = pytest.mark.anyio

OK = b"HTTP/1.1 200 OK\r\n"
HELLO = OK + b"content-length: 5\r\n\r\nhello"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"
MEGABYTE = 1_048_576


@pytest.fixture(params=[("asyncio", {}), ("asyncio", {"use_uvloop": True})], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
async def transport() -> AsyncGenerator[Transport]:
    async with Transport() as transport:
        yield transport


class Answer(NamedTuple):
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


def request_to(
    server: RawServer | str,
    method: str = "GET",
    content: bytes | None = None,
    headers: Any = None,
    **timeouts: float,
) -> httpx2.Request:
    url = server if isinstance(server, str) else server.url
    everything = {"connect": PATIENCE_S, "read": PATIENCE_S, "write": PATIENCE_S, "pool": PATIENCE_S}
    return httpx2.Request(
        method, url, content=content, headers=headers, extensions={"timeout": {**everything, **timeouts}}
    )


async def read(response: httpx2.Response) -> bytes:
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    return b"".join([block async for block in response.stream])


async def fetch(transport: Transport, server: RawServer | str, *args: Any, **kwargs: Any) -> Answer:
    response = await transport.handle_async_request(request_to(server, *args, **kwargs))
    return Answer(response.status_code, response.headers.raw, await read(response))


async def next_block(response: httpx2.Response) -> bytes:
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    return await anext(aiter(response.stream))


def answering(*blocks: bytes, then: Callable[[Peer], Any] | None = None) -> Script:
    """Answers every request with `blocks`; `then` is done after the first answer, and ends the connection."""

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(*blocks)
            if then is not None:
                done = then(peer)
                if done is not None:
                    await done
                return

    return script


async def hang(peer: Peer) -> None:
    await peer.gone()


def close(peer: Peer) -> None:
    peer.close()


def reset(peer: Peer) -> None:
    peer.reset()


async def test_an_answer_has_the_status_the_headers_as_sent_and_the_body(transport: Transport) -> None:
    script = answering(
        b"HTTP/1.1 418 I'm a teapot\r\nX-Tea: Earl Grey\r\nx-tea: Assam\r\nContent-Length: 5\r\n\r\nhello"
    )
    async with serving(script) as server:
        response = await transport.handle_async_request(request_to(server))
        assert response.status_code == 418
        assert response.headers.raw == [(b"X-Tea", b"Earl Grey"), (b"x-tea", b"Assam"), (b"Content-Length", b"5")]
        assert response.http_version == "HTTP/1.1"
        assert response.request.method == "GET"
        assert await response.aread() == b"hello"


async def test_a_request_is_sent_with_its_target_headers_and_body_framed_by_us(transport: Transport) -> None:
    seen: list[RawRequest] = []

    async def script(peer: Peer) -> None:
        while True:
            seen.append(await peer.request())
            await peer.send(HELLO)

    async with serving(script) as server:
        host = f"127.0.0.1:{server.port}".encode()
        await fetch(transport, server.url + "a%20b?c=d#e", headers={"X-A": "1"})
        await fetch(transport, server, "POST", b"12345", headers={"content-length": "2"})
        await fetch(transport, server, "POST", b"12345", headers={"Transfer-Encoding": "chunked"})
        await fetch(transport, server, "POST")
        bare = httpx2.Request("PUT", server.url, stream=httpx2.ByteStream(b"12"))
        await read(await transport.handle_async_request(bare))
    assert seen[0] == (b"GET /a%20b?c=d HTTP/1.1\r\nHost: " + host + b"\r\nX-A: 1\r\n\r\n", b"")
    framed = b"POST / HTTP/1.1\r\nHost: " + host + b"\r\ncontent-length: 5\r\n\r\n"
    assert seen[1:3] == [(framed, b"12345"), (framed, b"12345")]
    assert seen[3] == (framed.replace(b"5\r\n\r\n", b"0\r\n\r\n"), b"")
    assert seen[4] == (b"PUT / HTTP/1.1\r\nhost: " + host + b"\r\ncontent-length: 2\r\n\r\n", b"12")


async def test_a_streamed_request_body_is_sent_whole(transport: Transport) -> None:
    async def parts() -> AsyncIterator[bytes]:
        yield b"one "
        yield b"two"

    async def script(peer: Peer) -> None:
        assert (await peer.request()).body == b"one two"
        await peer.send(HELLO)

    async with serving(script) as server:
        request = httpx2.Request("POST", server.url, content=parts())
        assert await read(await transport.handle_async_request(request)) == b"hello"


async def test_a_small_request_leaves_in_one_write(transport: Transport) -> None:
    async def script(peer: Peer) -> None:
        first = await peer.read()
        await peer.send(OK + b"content-length: %d\r\n\r\n" % len(first) + first)

    async with serving(script) as server:
        assert (await fetch(transport, server, "POST", b"the body")).body.endswith(b"\r\n\r\nthe body")


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        ("GET", [(b"x-a", b"1\r\nx-b: 2")]),
        ("GET", [(b"x-a", b"1\nx-b: 2")]),
        ("GET", [(b"x-a", b"1\rx-b: 2")]),
        ("GET", [(b"x-a", b"1\0")]),
        ("GET", [(b"x-a: 1\r\nx-b", b"2")]),
        ("GET", [(b"x a", b"2")]),
        ("GET", [(b"transfer-encoding ", b"chunked")]),
        ("GET", [(b"", b"2")]),
        ("GET / HTTP/1.1\r\nx-a: b\r\n\r\nGET", []),
        ("GET /", []),
        ("GÉT", []),
    ],
)
async def test_nothing_can_be_injected_into_the_head(
    transport: Transport, method: str, headers: list[tuple[bytes, bytes]]
) -> None:
    async with serving(answering(HELLO)) as server:
        with pytest.raises(httpx2.LocalProtocolError) as raised:
            await fetch(transport, server, method, headers=headers)
        assert raised.value.request.method == method.upper()
        assert server.accepted == 0


async def test_a_request_with_a_preamble_leaves_as_one_without(transport: Transport) -> None:
    async def script(peer: Peer) -> None:
        while True:
            first = await peer.read()
            await peer.send(OK + b"content-length: %d\r\n\r\n" % len(first) + first)

    shared, own = [(b"host", b"here"), (b"content-length", b"7"), (b"x-a", b"1")], [(b"x-b", b"2")]
    async with serving(script) as server:
        preamble = Preamble("POST", httpx2.URL(server.url), shared)
        request = Request(preamble, own, b"the body", {})
        assert request.headers.raw == [*shared, *own, (b"content-length", b"8")]
        echoed = await read(await transport.handle_async_request(request))
        assert echoed == (await fetch(transport, server, "POST", b"the body", [*shared, *own])).body
        assert echoed.count(b"content-length: 8\r\n") == 1


@pytest.mark.parametrize("header", [(b"x-a", b"1\r\nx-b: 2"), (b"x a", b"2"), (b"x-a: 1\r\nx-b", b"2")])
async def test_nothing_can_be_injected_beside_a_preamble(transport: Transport, header: tuple[bytes, bytes]) -> None:
    async with serving(answering(HELLO)) as server:
        url = httpx2.URL(server.url)
        with pytest.raises(httpx2.LocalProtocolError):
            Preamble("GET", url, [header])
        with pytest.raises(httpx2.LocalProtocolError):
            await transport.handle_async_request(Request(Preamble("GET", url, []), [header], b"", {}))
        assert server.accepted == 0


class Framed(NamedTuple):
    sent: bytes
    body: bytes = b"hello"
    status: int = 200
    method: str = "GET"
    reused: bool = True
    closes: bool = False
    surplus: int = 0
    """How many of the last bytes are not of the answer; they are never cut from it."""


GOOD = {
    "content-length": Framed(HELLO),
    "empty": Framed(OK + b"content-length: 0\r\n\r\n", b""),
    "no reason": Framed(b"HTTP/1.1 200\r\ncontent-length: 5\r\n\r\nhello"),
    "chunked": Framed(CHUNKED + b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"),
    "chunked in capitals": Framed(OK + b"Transfer-Encoding: Chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
    "chunk extensions and trailers": Framed(
        CHUNKED + b'2;a=b\r\nhe\r\n003;c="d"\r\nllo\r\n0;e\r\nx-t: 1\r\ny: 2\r\n\r\n'
    ),
    "until close": Framed(OK + b"x: y\r\n\r\nhello", reused=False, closes=True),
    "until close, empty": Framed(OK + b"\r\n", b"", reused=False, closes=True),
    "connection: close": Framed(OK + b"connection: close\r\ncontent-length: 5\r\n\r\nhello", reused=False),
    "chunked, connection: close": Framed(
        OK + b"connection: Close\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", reused=False
    ),
    "HTTP/1.0": Framed(b"HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\nhello", reused=False),
    "HTTP/1.0 kept alive": Framed(b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 5\r\n\r\nhello"),
    "HTTP/1.0 until close": Framed(b"HTTP/1.0 200 OK\r\n\r\nhello", reused=False, closes=True),
    "100 and 103": Framed(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" + HELLO),
    "204": Framed(b"HTTP/1.1 204 No Content\r\n\r\n", b"", 204),
    "304 with a length": Framed(b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n", b"", 304),
    "302": Framed(b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 5\r\n\r\nhello", status=302),
    "HEAD": Framed(OK + b"content-length: 5\r\n\r\n", b"", method="HEAD", reused=False),
    "HEAD, chunked": Framed(CHUNKED, b"", method="HEAD", reused=False),
    "HEAD, with a body nonetheless": Framed(HELLO, b"", method="HEAD", reused=False, surplus=5),
    "a second answer": Framed(HELLO + HELLO, reused=False, surplus=len(HELLO)),
    "garbage behind": Framed(HELLO + b"garbage", reused=False, surplus=7),
    "a body behind a 204": Framed(b"HTTP/1.1 204 No Content\r\n\r\nhello", b"", 204, reused=False, surplus=5),
}


def cut(sent: bytes, places: Iterable[int]) -> list[bytes]:
    return [sent[start:end] for start, end in pairwise([0, *places, len(sent)])]


@pytest.mark.parametrize("framed", GOOD.values(), ids=GOOD.keys())
async def test_every_framing_gives_the_same_answer_wherever_it_is_cut(transport: Transport, framed: Framed) -> None:
    chance = random.Random(0)
    last = len(framed.sent) - framed.surplus - 1
    cuts = [[], list(range(1, last + 1)), *([at] for at in range(1, last + 1))]
    cuts += [sorted(chance.sample(range(1, last + 1), 4)) for _ in range(20)]
    pieces = [cut(framed.sent, places) for places in cuts]
    plan = iter(pieces)

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(*next(plan))
            if framed.closes:
                return

    async with serving(script) as server:
        for _ in pieces:
            answer = await fetch(transport, server, framed.method)
            assert (answer.status, answer.body) == (framed.status, framed.body)
            assert not any(name in (b"link", b"x-t") for name, _ in answer.headers)
        if framed.reused:
            assert server.accepted == 1
        else:
            assert server.accepted == len(pieces)
            await server.quiet()
            assert transport.open_connections == 0


BAD_HEADS = {
    "garbage": b"garbage\r\n\r\n",
    "a request": b"GET / HTTP/1.1\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "HTTP/2": b"HTTP/2.0 200 OK\r\ncontent-length: 5\r\n\r\nhello",
    "HTTP/0.9": b"HTTP/0.9 200 OK\r\ncontent-length: 5\r\n\r\nhello",
    "HTTP/1.9": b"HTTP/1.9 200 OK\r\ncontent-length: 5\r\n\r\nhello",
    "status of two digits": b"HTTP/1.1 20 OK\r\ncontent-length: 5\r\n\r\nhello",
    "status of four digits": b"HTTP/1.1 2000 OK\r\ncontent-length: 5\r\n\r\nhello",
    "status 099": b"HTTP/1.1 099 OK\r\ncontent-length: 5\r\n\r\nhello",
    "101": b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    "101 with upgrade": b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nframe",
    "length and chunked": OK + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "chunked and length": OK + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "two lengths": OK + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello",
    "the same length twice": OK + b"content-length: 5\r\ncontent-length: 5\r\n\r\nhello",
    "a list of lengths": OK + b"content-length: 5, 5\r\n\r\nhello",
    "negative length": OK + b"content-length: -5\r\n\r\nhello",
    "signed length": OK + b"content-length: +5\r\n\r\nhello",
    "hexadecimal length": OK + b"content-length: 0x5\r\n\r\nhello",
    "empty length": OK + b"content-length:\r\n\r\nhello",
    "absurd length": OK + b"content-length: 99999999999999999999999\r\n\r\nhello",
    "folded header": OK + b"x: a\r\n b\r\ncontent-length: 5\r\n\r\nhello",
    "folded length": OK + b"content-length: 5\r\n 5\r\n\r\nhello",
    "gzip coding": OK + b"transfer-encoding: gzip\r\n\r\nhello",
    "gzip, chunked coding": OK + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked, identity coding": OK + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "xchunked coding": OK + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked twice": OK + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "space before the colon": OK + b"transfer-encoding : chunked\r\n\r\n0\r\n\r\n",
    "no colon": OK + b"header\r\n\r\n",
    "no name": OK + b": value\r\n\r\n",
    "bare LF": b"HTTP/1.1 200 OK\ncontent-length: 5\n\nhello",
    "bare CR": OK + b"x: a\rb\r\ncontent-length: 5\r\n\r\nhello",
    "NUL": OK + b"x: a\0b\r\ncontent-length: 5\r\n\r\nhello",
    "control character": OK + b"x: a\x01b\r\ncontent-length: 5\r\n\r\nhello",
}


@pytest.mark.parametrize("sent", BAD_HEADS.values(), ids=BAD_HEADS.keys())
async def test_a_bad_head_is_refused_wherever_it_is_cut(transport: Transport, sent: bytes) -> None:
    plan = iter([cut(sent, places) for places in ([], range(1, len(sent)), *([at] for at in range(1, 14)))])

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(*next(plan))
        await peer.gone()

    async with serving(script) as server:
        for _ in range(15):
            with pytest.raises(httpx2.RemoteProtocolError) as raised:
                await fetch(transport, server)
            assert raised.value.request.url == server.url
        await server.quiet()
        assert transport.open_connections == 0


BAD_BODIES = {
    "bad chunk end": CHUNKED + b"5\r\nhelloX\r\n0\r\n\r\n",
    "chunk with LF": CHUNKED + b"5\r\nhello\r\n1\nx\r\n0\r\n\r\n",
    "negative chunk": CHUNKED + b"5\r\nhello\r\n-1\r\nx\r\n0\r\n\r\n",
    "0x chunk": CHUNKED + b"5\r\nhello\r\n0x1\r\nx\r\n0\r\n\r\n",
    "absurd chunk": CHUNKED + b"5\r\nhello\r\nfffffffffffffffff\r\nx\r\n",
    "empty chunk size": CHUNKED + b"5\r\nhello\r\n\r\nx\r\n",
    "bad extension": CHUNKED + b"5\r\nhello\r\n1;a=\0b\r\nx\r\n",
    "length in the trailers": CHUNKED + b"5\r\nhello\r\n0\r\ncontent-length: 5\r\n\r\n",
    "endless trailer": CHUNKED + b"5\r\nhello\r\n0\r\nx: " + b"y" * 400_000,
    "endless trailers": CHUNKED + b"5\r\nhello\r\n0\r\n" + b"x: y\r\n" * 70_000,
    "endless extension": CHUNKED + b"5\r\nhello\r\n1;a=" + b"y" * 400_000,
}


@pytest.mark.parametrize("sent", BAD_BODIES.values(), ids=BAD_BODIES.keys())
async def test_a_bad_body_gives_what_came_before_and_then_the_error(transport: Transport, sent: bytes) -> None:
    async with serving(answering(sent, then=hang)) as server:
        response = await transport.handle_async_request(request_to(server))
        assert await next_block(response) == b"hello"
        with pytest.raises(httpx2.RemoteProtocolError) as raised:
            await next_block(response)
        assert raised.value.request is response.request
        await server.quiet()
        assert transport.open_connections == 0


@pytest.mark.parametrize(
    "sent",
    [
        OK + b"x: y\r\n" * 257 + b"\r\n",
        OK + b"x: " + b"y" * 70_000,
        OK + b"x: " + b"y" * 70_000 + b"\r\ncontent-length: 1\r\n\r\nx",
        OK + b"".join(b"x: %b\r\n" % (b"y" * 1000) for _ in range(70)) + b"\r\n",
        b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" * 3000,
        b"\r\n" * 40_000,
    ],
    ids=["too many", "endless", "too long", "too long together", "endless hints", "endless line ends"],
)
async def test_headers_beyond_the_bounds_are_refused(transport: Transport, sent: bytes) -> None:
    async with serving(answering(sent, then=hang)) as server:
        with pytest.raises(httpx2.RemoteProtocolError):
            await fetch(transport, server)
        await server.quiet()


async def test_headers_within_the_bounds_pass(transport: Transport) -> None:
    many = OK + b"".join(b"x: %b\r\n" % (b"y" * 240) for _ in range(255)) + b"content-length: 100000\r\n\r\n"
    async with serving(answering(many + b"z" * 100_000)) as server:
        answer = await fetch(transport, server)
        assert len(answer.headers) == 256
        assert len(answer.body) == 100_000


@pytest.mark.parametrize(
    ("sent", "then", "came", "error"),
    [
        (b"", close, None, httpx2.RemoteProtocolError),
        (b"HTTP/1.1 200", close, None, httpx2.RemoteProtocolError),
        (b"HTTP/1.1 100 Continue\r\n\r\n", close, None, httpx2.RemoteProtocolError),
        (OK + b"content-length: 9\r\n\r\nhello", close, b"hello", httpx2.RemoteProtocolError),
        (CHUNKED + b"9\r\nhello", close, b"hello", httpx2.RemoteProtocolError),
        (CHUNKED + b"5\r\nhello\r\n", close, b"hello", httpx2.RemoteProtocolError),
        (CHUNKED + b"5\r\nhello\r\n0\r\n", close, b"hello", httpx2.RemoteProtocolError),
        (OK + b"\r\nhello", reset, b"hello", httpx2.ReadError),
        (CHUNKED + b"5\r\nhello\r\n", reset, b"hello", httpx2.ReadError),
        (b"", reset, None, httpx2.ReadError),
    ],
)
async def test_an_answer_cut_short_is_never_taken_for_whole(
    transport: Transport, sent: bytes, then: Callable[[Peer], Any], came: bytes | None, error: type[Exception]
) -> None:
    read_so_far = asyncio.Event()

    async def after(peer: Peer) -> None:
        await read_so_far.wait()
        then(peer)

    async with serving(answering(sent, then=after)) as server:
        if came is None:
            read_so_far.set()
            with pytest.raises(error):
                await fetch(transport, server)
        else:
            response = await transport.handle_async_request(request_to(server))
            assert await next_block(response) == came
            read_so_far.set()
            with pytest.raises(error):
                await next_block(response)
        assert server.accepted == 1
        await server.quiet()
        assert transport.open_connections == 0


async def test_a_connection_is_used_again_and_the_last_used_first(transport: Transport) -> None:
    served: list[int] = []
    both_here = asyncio.Barrier(2)

    async def script(peer: Peer) -> None:
        await peer.request()
        await both_here.wait()
        await peer.send(HELLO)
        while True:
            await peer.request()
            served.append(peer.index)
            await peer.send(HELLO)

    async with serving(script) as server:
        first, second = await asyncio.gather(fetch(transport, server), fetch(transport, server))
        assert first.body == second.body == b"hello"
        for _ in range(5):
            await fetch(transport, server)
        assert len(set(served)) == 1
        assert server.accepted == 2


async def test_a_connection_is_free_when_the_last_byte_has_arrived_not_when_it_is_read(transport: Transport) -> None:
    async with serving(answering(HELLO)) as server:
        unread = await transport.handle_async_request(request_to(server))
        assert (await fetch(transport, server)).body == b"hello"
        assert await read(unread) == b"hello"
        await unread.aclose()
        assert server.accepted == transport.open_connections == 1


async def test_idle_connections_are_bounded() -> None:
    all_here = asyncio.Barrier(5)

    async def script(peer: Peer) -> None:
        await peer.request()
        await all_here.wait()
        await peer.send(HELLO)
        await peer.gone()

    async with Transport(max_idle=2, keepalive_s=60.0) as transport, serving(script) as server:
        await asyncio.gather(*(fetch(transport, server) for _ in range(5)))
        assert server.accepted == 5
        await server.until(lambda: server.open == 2)
        assert transport.open_connections == 2


async def test_idle_connections_expire_by_themselves() -> None:
    async with Transport(keepalive_s=0.05) as transport, serving(answering(HELLO)) as server:
        for _ in range(3):
            await asyncio.gather(*(fetch(transport, server) for _ in range(3)))
            await server.quiet()
            assert transport.open_connections == 0


async def test_an_expired_connection_is_not_used_even_if_it_is_still_open() -> None:
    async with Transport(keepalive_s=0.0) as transport, serving(answering(HELLO)) as server:
        for count in range(1, 4):
            await fetch(transport, server)
            assert server.accepted == count


@pytest.mark.parametrize("then", [close, reset, lambda peer: peer.send(b"HTTP/1.1 408 Too slow\r\n\r\n")])
async def test_an_idle_connection_whose_peer_says_anything_is_closed(then: Callable[[Peer], Any]) -> None:
    answered = asyncio.Event()

    async def after(peer: Peer) -> None:
        await answered.wait()
        done = then(peer)
        if done is not None:
            await done
        await peer.gone()

    async with Transport(keepalive_s=60.0) as transport, serving(answering(HELLO, then=after)) as server:
        await fetch(transport, server)
        answered.set()
        await server.quiet()
        server.script = answering(HELLO)
        assert (await fetch(transport, server)).body == b"hello"
        assert server.accepted == 2
        assert transport.open_connections == 1


@pytest.mark.parametrize("first", [lambda peer: peer.send(b"220 smtp.example ESMTP\r\n"), close, reset])
async def test_a_server_that_speaks_or_closes_first_is_noticed(
    transport: Transport, first: Callable[[Peer], Any]
) -> None:
    async def script(peer: Peer) -> None:
        done = first(peer)
        if done is not None:
            await done
        await peer.gone()

    async with serving(script) as server:
        for _ in range(30):
            with pytest.raises((httpx2.ConnectError, httpx2.ReadError, httpx2.RemoteProtocolError)):
                await fetch(transport, server)
        await server.quiet()
        assert transport.open_connections == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
async def test_addresses_and_names_are_reached(transport: Transport, host: str) -> None:
    try:
        async with serving(answering(HELLO), host=host) as server:
            assert (await fetch(transport, server)).body == b"hello"
    except OSError:
        pytest.skip(f"no {host} on this machine")


async def test_origins_do_not_share_connections(transport: Transport) -> None:
    async with serving(answering(HELLO)) as one, serving(answering(HELLO)) as other:
        for server in (one, other, one, other):
            await fetch(transport, server)
        assert (one.accepted, other.accepted) == (1, 1)


@pytest.mark.parametrize("then", [close, reset])
@pytest.mark.parametrize("content", [None, b"body", b"x" * MEGABYTE], ids=["GET", "POST", "large POST"])
async def test_a_request_on_a_stale_connection_is_sent_once_more(
    transport: Transport, then: Callable[[Peer], Any], content: bytes | None
) -> None:
    bodies: list[bytes] = []

    async def script(peer: Peer) -> None:
        bodies.append((await peer.request()).body)
        await peer.send(HELLO)
        await peer.request()
        then(peer)

    async with serving(script) as server:
        for _ in range(10):
            assert (await fetch(transport, server, "POST" if content else "GET", content)).body == b"hello"
        assert server.accepted == 10
        assert bodies == [content or b""] * 10


async def test_a_request_is_not_sent_a_third_time(transport: Transport) -> None:
    requests = 0

    async def script(peer: Peer) -> None:
        nonlocal requests
        await peer.request()
        requests += 1
        if peer.index == 0:
            await peer.send(HELLO)
            await peer.request()
            requests += 1

    async with serving(script) as server:
        await fetch(transport, server)
        with pytest.raises(httpx2.RemoteProtocolError):
            await fetch(transport, server)
        assert (requests, server.accepted) == (3, 2)
        await server.quiet()
        assert transport.open_connections == 0


@pytest.mark.parametrize("sent", [b"H", b"HTTP/1.1 100 Continue\r\n\r\n", OK + b"content-length: 5\r\n\r\n"])
async def test_a_request_is_not_repeated_once_the_server_has_said_anything(transport: Transport, sent: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(HELLO)
        await peer.request()
        await peer.send(sent)

    async with serving(script) as server:
        await fetch(transport, server)
        with pytest.raises(httpx2.RemoteProtocolError):
            await fetch(transport, server)
        assert server.accepted == 1


async def test_silence_on_a_reused_connection_is_a_timeout_and_not_repeated(transport: Transport) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(HELLO)
        await peer.gone()

    async with serving(script) as server:
        await fetch(transport, server, read=60.0)  # its alarm is late for the next request, and has to be moved
        with pytest.raises(httpx2.ReadTimeout) as raised:
            await fetch(transport, server, read=0.05)
        assert raised.value.request.url == server.url
        await server.quiet()
        assert server.accepted == 1


async def test_a_server_that_hangs_before_the_head_is_left(transport: Transport) -> None:
    async with serving(answering(then=hang)) as server:
        with pytest.raises(httpx2.ReadTimeout):
            await fetch(transport, server, read=0.05)
        await server.quiet()
        assert transport.open_connections == 0


async def test_a_server_that_hangs_in_the_body_is_left_after_what_came(transport: Transport) -> None:
    async with serving(answering(CHUNKED + b"5\r\nhello\r\n", then=hang)) as server:
        response = await transport.handle_async_request(request_to(server, read=0.2))
        assert await next_block(response) == b"hello"
        with pytest.raises(httpx2.ReadTimeout):
            await next_block(response)
        await server.quiet()


async def test_what_arrived_before_a_timeout_can_still_be_read(transport: Transport) -> None:
    async with serving(answering(CHUNKED + b"5\r\nhello\r\n", then=hang)) as server:
        response = await transport.handle_async_request(request_to(server, read=0.2))
        await server.quiet()
        assert await next_block(response) == b"hello"
        with pytest.raises(httpx2.ReadTimeout):
            await next_block(response)


async def test_a_slow_answer_is_no_silence(transport: Transport) -> None:
    async def drip(peer: Peer) -> None:
        await peer.request()
        for byte in HELLO:
            await asyncio.sleep(0.015)
            await peer.send(bytes([byte]))
        await peer.gone()

    async with serving(drip) as server:
        assert (await fetch(transport, server, read=0.5)).body == b"hello"


async def test_a_reader_who_takes_long_is_not_the_servers_silence(transport: Transport) -> None:
    body = b"x" * (32 * MEGABYTE)
    async with serving(answering(OK + b"content-length: %d\r\n\r\n" % len(body) + body)) as server:
        response = await transport.handle_async_request(request_to(server, read=0.3))
        await asyncio.sleep(0.7)
        assert await read(response) == body


async def test_no_timeouts_given_means_none(transport: Transport) -> None:
    async with serving(answering(HELLO)) as server:
        none: list[dict[str, Any]] = [{}, {"timeout": {}}, {"timeout": httpx2.Timeout(None).as_dict()}]
        for extensions in none:
            request = httpx2.Request("GET", server.url, extensions=extensions)
            assert await read(await transport.handle_async_request(request)) == b"hello"


async def test_connecting_to_a_black_hole_times_out(transport: Transport) -> None:
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        filling = [socket.socket() for _ in range(4)]
        for filler in filling:
            filler.setblocking(False)
            filler.connect_ex(hole.getsockname())
        with pytest.raises(httpx2.ConnectTimeout) as raised:
            await fetch(transport, f"http://127.0.0.1:{hole.getsockname()[1]}/", connect=0.05)
        for filler in filling:
            filler.close()
    assert raised.value.request is not None
    assert transport.open_connections == 0


@pytest.mark.parametrize("host", ["x.invalid", "a..b", "a" * 64 + ".example"])
async def test_a_name_that_does_not_resolve_is_a_connect_error(transport: Transport, host: str) -> None:
    with pytest.raises(httpx2.ConnectError) as raised:
        await fetch(transport, f"http://{host}/")
    assert raised.value.request.url.host == host


async def test_a_closed_port_is_a_connect_error(transport: Transport) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(httpx2.ConnectError):
            await fetch(transport, f"http://127.0.0.1:{free.getsockname()[1]}/")


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/", "//127.0.0.1/", "/path"])
async def test_a_url_that_is_not_http_is_refused(transport: Transport, url: str) -> None:
    with pytest.raises(httpx2.UnsupportedProtocol):
        await fetch(transport, url)


async def test_a_large_body_is_sent_whole(transport: Transport) -> None:
    body = random.Random(0).randbytes(10 * MEGABYTE)

    async def script(peer: Peer) -> None:
        while True:
            intact = (await peer.request()).body == body
            await peer.send(HELLO if intact else OK + b"content-length: 0\r\n\r\n")

    async with serving(script) as server:
        for _ in range(2):
            assert (await fetch(transport, server, "POST", body)).body == b"hello"
        assert server.accepted == 1


async def test_a_server_that_does_not_take_the_body_is_left(transport: Transport) -> None:
    never = asyncio.Event()

    async def script(peer: Peer) -> None:
        await never.wait()

    async with serving(script) as server:
        with pytest.raises(httpx2.WriteTimeout):
            await fetch(transport, server, "POST", bytes(20 * MEGABYTE), write=0.05)
        assert transport.open_connections == 0
        never.set()


async def test_an_early_answer_to_a_large_body_is_delivered(transport: Transport) -> None:
    async def script(peer: Peer) -> None:
        await peer.read()
        await peer.send(b"HTTP/1.1 413 Too large\r\ncontent-length: 5\r\n\r\nhello")
        if peer.index % 2:
            await peer.gone()

    async with serving(script) as server:
        for _ in range(4):
            answer = await fetch(transport, server, "POST", bytes(10 * MEGABYTE))
            assert (answer.status, answer.body) == (413, b"hello")
        assert server.accepted == 4
        await server.quiet()
        assert transport.open_connections == 0


async def test_silence_after_an_early_answer_is_a_read_timeout(transport: Transport) -> None:
    async def script(peer: Peer) -> None:
        await peer.read()
        await peer.send(OK + b"content-length: 5\r\n\r\n")
        await peer.gone()

    async with serving(script) as server:
        response = await transport.handle_async_request(
            request_to(server, "POST", bytes(10 * MEGABYTE), read=0.05, write=60.0)
        )
        with pytest.raises(httpx2.ReadTimeout):
            await read(response)


async def test_a_connection_broken_while_the_body_is_sent_is_a_write_error(transport: Transport) -> None:
    async def script(peer: Peer) -> None:
        await peer.read()
        peer.reset()

    async with serving(script) as server:
        with pytest.raises(httpx2.WriteError):
            await fetch(transport, server, "POST", bytes(20 * MEGABYTE))
        assert transport.open_connections == 0


async def test_what_arrives_together_leaves_together_and_nothing_is_held_back(transport: Transport) -> None:
    go_on = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED + b"1\r\na\r\n1\r\nb\r\n", b"1\r\nc\r\n")
        await go_on.wait()
        await peer.send(b"1\r\nd\r\n", b"0\r\n\r\n")

    async with serving(script) as server:
        response = await transport.handle_async_request(request_to(server))
        blocks = await next_block(response)
        while blocks != b"abc":
            blocks += await next_block(response)
        go_on.set()
        assert await read(response) == b"d"


async def test_an_answer_that_is_not_read_is_not_taken_from_the_socket() -> None:
    sent_bytes = 0
    block = b"x" * 65_536

    async def script(peer: Peer) -> None:
        nonlocal sent_bytes
        await peer.request()
        await peer.send(OK + b"content-length: %d\r\n\r\n" % (512 * len(block)))
        for _ in range(512):
            await peer.send(block)
            sent_bytes += len(block)

    async with Transport(max_buffer_bytes=MEGABYTE) as transport, serving(script) as server:
        response = await transport.handle_async_request(request_to(server))
        before = -1
        while sent_bytes != before:
            before = sent_bytes
            await asyncio.sleep(0.05)
        assert sent_bytes < 16 * MEGABYTE
        first = await next_block(response)
        assert len(first) < 2 * MEGABYTE
        assert len(first) + len(await read(response)) == 32 * MEGABYTE


async def test_closing_an_answer_before_its_end_closes_the_connection_at_once(transport: Transport) -> None:
    async with serving(answering(CHUNKED + b"5\r\nhello\r\n", then=hang)) as server:
        response = await transport.handle_async_request(request_to(server))
        assert await next_block(response) == b"hello"
        await response.aclose()
        await server.quiet()
        assert transport.open_connections == 0
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        await response.stream.aclose()
        with pytest.raises(httpx2.StreamClosed):
            await next_block(response)


async def test_what_was_not_read_before_closing_is_gone(transport: Transport) -> None:
    async with serving(answering(CHUNKED + b"5\r\nhello\r\n", then=hang)) as server:
        response = await transport.handle_async_request(request_to(server))
        await turns()
        await response.aclose()
        with pytest.raises(httpx2.StreamClosed):
            await next_block(response)


async def test_closing_an_answer_wakes_who_reads_it(transport: Transport) -> None:
    async with serving(answering(CHUNKED, then=hang)) as server:
        response = await transport.handle_async_request(request_to(server))
        reader = asyncio.create_task(next_block(response))
        await turns()
        await response.aclose()
        with pytest.raises(httpx2.StreamClosed):
            await reader


async def test_an_answer_that_was_read_is_freed_without_the_garbage_collector(transport: Transport) -> None:
    async with serving(answering(HELLO)) as server:
        gc.disable()
        try:
            response = await transport.handle_async_request(request_to(server))
            assert await read(response) == b"hello"
            stream = weakref.ref(response.stream)
            del response
            assert stream() is None
        finally:
            gc.enable()


async def test_the_transport_serves_an_httpx2_client(transport: Transport) -> None:
    body = gzip.compress(b"hello" * 1000)
    head = OK + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with serving(answering(head + body)) as server, httpx2.AsyncClient(transport=transport) as client:
        assert (await client.get(server.url)).text == "hello" * 1000
        async with client.stream("GET", server.url) as response:
            async for _ in response.aiter_bytes(10):
                break
        await client.post(server.url, json={})
        assert server.accepted == 1


async def turns(count: int = 20) -> None:
    """Lets everyone else on the loop go as far as they can without new events from outside."""
    for _ in range(count):
        await asyncio.sleep(0)


@asynccontextmanager
async def occupied(transport: Transport) -> AsyncGenerator[httpx2.Response]:
    """An answer that goes on while the block runs."""
    async with serving(answering(CHUNKED, then=hang)) as server:
        response = await transport.handle_async_request(request_to(server))
        try:
            yield response
        finally:
            await response.aclose()


async def test_beyond_the_bound_requests_wait_their_turn() -> None:
    order: list[int] = []

    async def numbered(number: int) -> None:
        await fetch(full, server)
        order.append(number)

    async with (
        Transport(max_connections=1) as full,
        serving(answering(HELLO)) as server,
        occupied(full) as held,
        asyncio.TaskGroup() as group,
    ):
        tasks = []
        for number in range(5):
            tasks.append(group.create_task(numbered(number)))
            await turns()
        assert server.accepted == 0
        tasks[2].cancel()
        await held.aclose()
    assert order == [0, 1, 3, 4]
    assert server.accepted == 1


async def test_a_wait_for_a_connection_is_bounded() -> None:
    async with (
        Transport(max_connections=1) as transport,
        serving(answering(HELLO)) as server,
        occupied(transport) as held,
    ):
        for _ in range(3):
            with pytest.raises(httpx2.PoolTimeout) as raised:
                await fetch(transport, server, pool=0.02)
            assert raised.value.request.url == server.url
        await held.aclose()
        assert (await fetch(transport, server)).body == b"hello"


async def test_a_turn_granted_to_someone_who_left_in_that_moment_is_passed_on() -> None:
    async with (
        Transport(max_connections=1) as transport,
        serving(answering(HELLO)) as server,
        occupied(transport) as held,
    ):
        leaver, stayer = (asyncio.create_task(fetch(transport, server)) for _ in range(2))
        await turns()
        await held.aclose()  # grants
        leaver.cancel()
        assert (await stayer).body == b"hello"
        assert leaver.cancelled()


async def test_an_idle_connection_of_another_origin_makes_room() -> None:
    async with (
        Transport(max_connections=2) as transport,
        serving(answering(HELLO)) as one,
        serving(answering(HELLO)) as two,
        serving(answering(HELLO)) as three,
    ):
        await fetch(transport, one)
        await fetch(transport, two)
        await fetch(transport, three)
        await one.quiet()
        assert transport.open_connections == 2
        await fetch(transport, two)
        assert two.accepted == 1


async def waiting_for_a_slot(transport: Transport, server: RawServer) -> None:
    async with occupied(transport):
        await cancelled(fetch(transport, server))


async def connecting(transport: Transport, _: RawServer) -> None:
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        filling = [socket.socket() for _ in range(4)]
        for filler in filling:
            filler.setblocking(False)
            filler.connect_ex(hole.getsockname())
        await cancelled(fetch(transport, f"http://127.0.0.1:{hole.getsockname()[1]}/"))
        for filler in filling:
            filler.close()


async def shaking_hands(transport: Transport, _: RawServer) -> None:
    async with serving(hang) as deaf:
        await cancelled(fetch(transport, deaf.url.replace("http:", "https:")), lambda: deaf.open == 1, deaf)
        await deaf.quiet()


async def sending_the_body(transport: Transport, _: RawServer) -> None:
    never = asyncio.Event()

    async def script(peer: Peer) -> None:
        await never.wait()

    async with serving(script) as deaf:
        await cancelled(fetch(transport, deaf, "POST", bytes(20 * MEGABYTE)), lambda: deaf.open == 1, deaf)


async def waiting_for_the_head(transport: Transport, _: RawServer) -> None:
    async with serving(hang) as mute:
        await cancelled(fetch(transport, mute), lambda: mute.open == 1, mute)
        await mute.quiet()


async def waiting_for_the_head_on_a_reused_connection(transport: Transport, _: RawServer) -> None:
    async with serving(answering(HELLO, then=hang)) as mute:
        await fetch(transport, mute)
        await cancelled(fetch(transport, mute))
        await mute.quiet()


async def reading_the_body(transport: Transport, _: RawServer) -> None:
    async with serving(answering(CHUNKED, then=hang)) as slow:
        response = await transport.handle_async_request(request_to(slow))
        await cancelled(read(response))
        await slow.quiet()


async def cancelled(
    work: Coroutine[Any, Any, Any], reached: Callable[[], bool] | None = None, server: RawServer | None = None
) -> None:
    task = asyncio.create_task(work)
    if server is not None and reached is not None:
        await server.until(reached)
    await turns()
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    "place",
    [
        waiting_for_a_slot,
        connecting,
        shaking_hands,
        sending_the_body,
        waiting_for_the_head,
        waiting_for_the_head_on_a_reused_connection,
        reading_the_body,
    ],
    ids=lambda place: place.__name__.replace("_", " "),
)
async def test_a_request_cancelled_anywhere_leaves_nothing(
    place: Callable[[Transport, RawServer], Awaitable[None]],
) -> None:
    async with Transport(max_connections=1) as transport, serving(answering(HELLO)) as server:
        for _ in range(3):
            await place(transport, server)
        await turns()
        assert transport.open_connections == 0
        for _ in range(3):
            assert (await fetch(transport, server)).body == b"hello"
        assert server.accepted == 1


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "reused"])
async def test_a_request_cancelled_at_any_turn_of_the_loop_leaves_nothing(fresh: bool) -> None:
    sent = [HELLO[:20], HELLO[20:-3], HELLO[-3:]]
    async with Transport(max_connections=1) as transport, serving(answering(*sent)) as server:
        finished = 0
        for count in range(60):
            if not fresh:
                await fetch(transport, server)
            task = asyncio.create_task(fetch(transport, server))
            await turns(count)
            task.cancel()
            with suppress(asyncio.CancelledError):
                assert (await task).body == b"hello"
                finished += 1
            await turns()
            assert transport.open_connections <= 1
            if fresh:
                server.script = answering(*sent, then=close)
        assert 0 < finished < 60
        assert (await fetch(transport, server)).body == b"hello"


async def test_cancellation_under_contention_leaves_every_connection_usable() -> None:
    chance = random.Random(0)
    all_here = asyncio.Barrier(10)

    async def streaming(peer: Peer) -> None:
        while True:
            await peer.request()
            await asyncio.sleep(chance.random() * 0.005)
            await peer.send(CHUNKED, *[b"5\r\nhello\r\n"] * 5)
            await asyncio.sleep(chance.random() * 0.005)
            await peer.send(b"0\r\n\r\n")

    async def together(peer: Peer) -> None:
        while True:
            await peer.request()
            await all_here.wait()
            await peer.send(HELLO)

    async def worker() -> None:
        while loop.time() < end:
            with suppress(TimeoutError):
                async with asyncio.timeout(chance.random() * 0.03):
                    assert (await fetch(transport, server)).body == b"hello" * 5
                    done.append(True)
            assert transport.open_connections <= 11  # one may be in the middle of closing
            attempts.append(True)

    loop = asyncio.get_running_loop()
    end = loop.time() + 0.8
    done: list[bool] = []
    attempts: list[bool] = []
    async with Transport(max_connections=10) as transport, serving(streaming) as server:
        await asyncio.gather(*(worker() for _ in range(20)))
        assert 0 < len(done) < len(attempts)
        await turns()
        assert transport.open_connections <= 10
        async with serving(together) as patient:
            answers = await asyncio.gather(*(fetch(transport, patient) for _ in range(10)))
        assert [answer.body for answer in answers] == [b"hello"] * 10


async def test_file_descriptors_are_given_back() -> None:
    def open_files() -> int:
        return len(os.listdir("/dev/fd"))

    async with serving(answering(HELLO)) as server, Transport() as transport:
        await fetch(transport, server)  # the loop opens some of its own at the first need
    await turns()
    before = open_files()
    async with serving(answering(HELLO)) as server, Transport() as transport:
        await asyncio.gather(*(fetch(transport, server) for _ in range(20)))
        for _ in range(5):
            await cancelled(fetch(transport, server, "POST", bytes(20 * MEGABYTE)))
        assert open_files() > before
    async with asyncio.timeout(PATIENCE_S):
        while open_files() > before:  # noqa: ASYNC110 - nobody tells when a file is closed
            await asyncio.sleep(0.005)


async def test_closing_the_transport_ends_everything() -> None:
    transport = Transport(max_connections=2)
    async with serving(answering(CHUNKED, then=hang)) as server, serving(hang) as mute:
        response = await transport.handle_async_request(request_to(server))
        reader = asyncio.create_task(next_block(response))
        asker = asyncio.create_task(fetch(transport, mute))
        waiter = asyncio.create_task(fetch(transport, mute))
        await mute.until(lambda: mute.open == 1)
        await turns()
        await transport.aclose()
        assert transport.open_connections == 0
        for task, error in ((reader, httpx2.ReadError), (asker, httpx2.ReadError), (waiter, httpx2.ConnectError)):
            with pytest.raises(error):
                await task
        await server.quiet()
        await mute.quiet()
        with pytest.raises(httpx2.ConnectError):
            await fetch(transport, server)
        await transport.aclose()


async def test_closing_the_transport_while_it_connects_leaves_no_connection() -> None:
    async with serving(answering(HELLO)) as server:
        for count in range(12):
            transport = Transport()
            asker = asyncio.create_task(fetch(transport, server))
            await turns(count)
            await transport.aclose()
            with suppress(httpx2.TransportError):
                await asker
            await server.quiet()
            await turns()
            assert transport.open_connections == 0


class Authority(NamedTuple):
    """A certificate authority of our own, and servers' TLS contexts by what is right or wrong with them."""

    trusting: ssl.SSLContext
    servers: dict[str, ssl.SSLContext]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    if shutil.which("openssl") is None:
        assert not os.environ.get("CI"), "CI must test TLS, which needs the openssl command"
        pytest.skip("no openssl command")
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    def certify(name: str, hosts: str, days: int, *signed_by: str) -> ssl.SSLContext:
        (folder / "extensions").write_text(f"subjectAltName={hosts}\nbasicConstraints=CA:FALSE\n")
        signing = ["-extfile", "extensions", "-days", str(days), *signed_by]
        openssl("x509", "-req", "-in", "server.csr", "-out", f"{name}.pem", *signing)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / f"{name}.pem", folder / "server.key")
        return context

    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl("req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=Test authority", "-days", "2")
    openssl("req", "-new", *curve, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=Test server")
    by_authority = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"]
    here = "DNS:localhost,IP:127.0.0.1"
    servers = {
        "good": certify("good", here, 2, *by_authority),
        "wrong host": certify("wrong", "DNS:elsewhere.example,IP:127.0.0.2", 2, *by_authority),
        "expired": certify("expired", here, -1, *by_authority),
        "self-signed": certify("self", here, 2, "-signkey", "server.key"),
    }
    return Authority(ssl.create_default_context(cafile=str(folder / "ca.pem")), servers)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_tls_works_and_connections_are_reused(authority: Authority, host: str) -> None:
    body = b"x" * MEGABYTE
    script = answering(CHUNKED + b"%x\r\n" % len(body), body, b"\r\n0\r\n\r\n")
    async with (
        Transport(ssl_context=authority.trusting) as transport,
        serving(script, ssl=authority.servers["good"]) as server,
    ):
        url = f"https://{host}:{server.port}/"
        for _ in range(3):
            assert (await fetch(transport, url, "POST", body)).body == body
        assert server.accepted == 1
        response = await transport.handle_async_request(request_to(url))
        await response.aclose()
        await server.quiet()


@pytest.mark.parametrize("fault", ["wrong host", "expired", "self-signed"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_certificate_that_does_not_hold_is_a_connect_error_and_nothing_is_sent(
    authority: Authority, fault: str, host: str
) -> None:
    async def script(peer: Peer) -> None:
        assert not await peer.read()

    async with (
        Transport(ssl_context=authority.trusting) as transport,
        serving(script, ssl=authority.servers[fault]) as server,
    ):
        with pytest.raises(httpx2.ConnectError):
            await fetch(transport, f"https://{host}:{server.port}/", "POST", b"secret")
        await server.quiet()
        assert transport.open_connections == 0


async def test_certificates_are_verified_without_being_asked(transport: Transport, authority: Authority) -> None:
    async with serving(hang, ssl=authority.servers["good"]) as server:
        with pytest.raises(httpx2.ConnectError):
            await fetch(transport, server)


async def test_plain_http_on_a_tls_port_is_a_connect_error_and_nothing_is_sent(
    transport: Transport, authority: Authority
) -> None:
    seen: list[bytes] = []

    async def script(peer: Peer) -> None:
        seen.append(await peer.read())
        await peer.send(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")

    async with serving(script) as server:
        with pytest.raises(httpx2.ConnectError):
            await fetch(transport, server.url.replace("http:", "https:"), "POST", b"secret")
        await server.quiet()
    assert b"secret" not in b"".join(seen)
    assert b"HTTP" not in b"".join(seen)


async def test_an_answer_cut_short_under_tls_is_never_taken_for_whole(authority: Authority) -> None:
    async with (
        Transport(ssl_context=authority.trusting) as transport,
        serving(answering(OK + b"content-length: 9\r\n\r\nhello", then=close), ssl=authority.servers["good"]) as server,
    ):
        response = await transport.handle_async_request(request_to(server))
        assert await next_block(response) == b"hello"
        with pytest.raises(httpx2.RemoteProtocolError):
            await next_block(response)
