"""Do those who share an answer notice nothing of each other? By a gateway in a process of its own, as people run it."""

import asyncio
import hashlib
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx2
import pytest
from openai import APIStatusError, AsyncOpenAI

from tests.house import (
    HELLO,
    ROLE,
    Received,
    UpstreamServer,
    chunk,
    completion,
    events_of,
    hello_stream,
    json_reply,
    stream_reply,
    upstream,
)
from tests.served import PATIENCE_S, Served, started, until
from tests.stores.servers import redis_server
from tests.test_shutdown import body_of, rest_of

pytestmark = pytest.mark.anyio

KEYS = ("alice", "bob")
BEGUN = [chunk(ROLE), chunk({"content": "Hel"})]
REST = hello_stream()[2:]


def token(name: str) -> str:
    return f"sk-{name}"


class Upstream:
    """Answers when it is told to: a stream after its beginning, or all of it where *silent*; and counts."""

    def __init__(self, *, silent: bool = False) -> None:
        self.silent = silent
        self.more = asyncio.Event()
        self.asked: list[Received] = []

    async def __call__(self, received: Received, writer: asyncio.StreamWriter) -> None:
        if received.path.endswith("/models"):
            return await json_reply({})(received, writer)
        self.asked.append(received)
        if received.json.get("stream"):
            blocks: list[Any] = [self.more, *BEGUN] if self.silent else [*BEGUN, self.more]
            return await stream_reply(*blocks, *REST)(received, writer)
        waits = [asyncio.ensure_future(event.wait()) for event in (self.more, received.gone)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        return await json_reply(completion())(received, writer)

    async def until_asked(self, times: int = 1) -> None:
        await until(lambda: len(self.asked) >= times)


@asynccontextmanager
async def serving(
    folder: Path, server: UpstreamServer, patience: Any = MappingProxyType({}), **changes: Any
) -> AsyncIterator[Served]:
    keys: list[dict[str, Any]] = [
        {"name": name, "team": "red", "sha256": hashlib.sha256(token(name).encode()).hexdigest()} for name in KEYS
    ]
    keys[1]["limits"] = {"requests_per_minute": 1}
    config = {
        "auth": {"keys": keys},
        "upstreams": {"one": {"adapter": "openai", "base_url": f"http://127.0.0.1:{server.port}/v1"}},
        "models": {"smart": {"targets": [{"upstream": "one", "model": "model-1"}], "cache": {"mode": "all"}}},
        "database": {"url": f"sqlite:///{folder}/ledger.db", "journal": str(folder)},
        **changes,
        "server": {"drain_delay_s": 0, **patience},
    }
    (folder / "gateway.yaml").write_text(json.dumps(config))
    async with started("--config", str(folder / "gateway.yaml")) as served:
        async with asyncio.timeout(PATIENCE_S), httpx2.AsyncClient() as client:
            while (await client.get(f"{served.url}/health/ready")).status_code != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        yield served


async def ask(
    served: Served, stream: bool, who: str = "alice", **headers: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    body = json.dumps({**HELLO, "stream": stream}).encode()
    fields = {"host": "x", "authorization": f"Bearer {token(who)}", "content-type": "application/json", **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return await served.connect(
        f"POST /v1/chat/completions HTTP/1.1\r\n{head}content-length: {len(body)}\r\n\r\n".encode() + body
    )


async def head_of(reader: asyncio.StreamReader) -> str:
    async with asyncio.timeout(PATIENCE_S):
        return (await reader.readuntil(b"\r\n\r\n")).decode()


async def metric(served: Served, name: str) -> float:
    async with httpx2.AsyncClient() as client:
        text = (await client.get(f"{served.url}/metrics")).text
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


async def in_flight(served: Served, number: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while await metric(served, "suiron_requests_in_flight") != number:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_sdks_and_curls_that_ask_the_same_share_one_generation(tmp_path: Path) -> None:
    script = Upstream()

    async def by_sdk(client: AsyncOpenAI, stream: bool) -> str:
        if not stream:
            answer = await client.chat.completions.create(**HELLO)
            return answer.choices[0].message.content or ""
        chunks = await client.chat.completions.create(**HELLO, stream=True)
        return "".join([part.choices[0].delta.content or "" async for part in chunks if part.choices])

    async def by_curl(served: Served, stream: bool) -> str:
        body = json.dumps({**HELLO, "stream": stream})
        url = f"{served.url}/v1/chat/completions"
        fields = ("-H", f"authorization: Bearer {token('alice')}", "-H", "content-type: application/json")
        process = await asyncio.create_subprocess_exec(
            "curl", "-sN", url, *fields, "-d", body, stdout=asyncio.subprocess.PIPE
        )
        said, _ = await process.communicate()
        if not stream:
            return str(json.loads(said)["choices"][0]["message"]["content"])
        *events, done = events_of(said)
        assert done == "[DONE]"
        return "".join(event["choices"][0]["delta"].get("content", "") for event in events)

    async with upstream(script) as server, serving(tmp_path, server) as served:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key=token("alice"), max_retries=0) as client:
            asking = [asyncio.create_task(by_sdk(client, stream)) for stream in [True, False] * 10]
            asking += [asyncio.create_task(by_curl(served, stream)) for stream in (True, False)]
            await script.until_asked()
            await in_flight(served, len(asking))
            script.more.set()
            assert set(await asyncio.gather(*asking)) == {"Hello"}
        assert len(script.asked) == 1
        served.signal()
        await served.ended()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["before the first byte", "in the middle", "at the end"])
@pytest.mark.parametrize("leader", [True, False])
async def test_the_first_may_leave_at_any_time_and_the_last_frees_the_upstream(
    tmp_path: Path, stage: str, leader: bool
) -> None:
    script = Upstream(silent=stage == "before the first byte" or not leader)
    async with upstream(script) as server, serving(tmp_path, server) as served:
        first, first_writer = await ask(served, leader)
        await script.until_asked()
        others = [await ask(served, stream) for stream in (True, False)]
        await in_flight(served, 3)
        if stage == "in the middle" and leader:
            await first.readuntil(b"Hel")
        if stage == "at the end":
            script.more.set()
            await first.readuntil(b'"stop"')
        first_writer.transport.abort()
        if stage != "at the end":
            await in_flight(served, 2)
            assert not script.asked[0].gone.is_set()
        script.more.set()
        for reader, _ in others:
            assert b"200 OK" in (await head_of(reader)).encode()
            assert b'"finish_reason"' in await reader.readuntil(b'"stop"')
        await in_flight(served, 0)
        assert len(script.asked) == 1

        script.more.clear()
        again = [await ask(served, stream, **{"cache-control": "no-cache"}) for stream in (leader, leader)]
        await script.until_asked(3)
        for _, writer in again:
            writer.transport.abort()
        async with asyncio.timeout(1):
            await asyncio.gather(*(received.gone.wait() for received in script.asked[1:]))
        served.signal()
        await served.ended()


@pytest.mark.slow
async def test_who_is_over_its_limits_may_not_join(tmp_path: Path) -> None:
    script = Upstream()
    async with upstream(script) as server, serving(tmp_path, server) as served:
        first, _ = await ask(served, True)
        await script.until_asked()
        joined, _ = await ask(served, True, "bob")
        assert "x-suiron-cache: shared" in await head_of(joined)
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key=token("bob"), max_retries=0) as client:
            with pytest.raises(APIStatusError) as refused:
                await client.chat.completions.create(**HELLO, stream=True)
        assert refused.value.status_code == 429
        assert "x-suiron-cache" not in refused.value.response.headers
        script.more.set()
        for reader in (first, joined):
            await reader.readuntil(b"[DONE]")


@pytest.mark.slow
@pytest.mark.parametrize("has_begun", [True, False])
async def test_those_who_share_are_all_answered_before_the_process_ends(tmp_path: Path, has_begun: bool) -> None:
    script = Upstream(silent=not has_begun)
    async with upstream(script) as server, serving(tmp_path, server) as served:
        clients = [await ask(served, True)]
        await script.until_asked()
        clients += [await ask(served, stream) for stream in [True, False] * 5]
        await in_flight(served, len(clients))
        served.signal()
        await served.until_closed()
        script.more.set()
        answers = [await rest_of(reader) for reader, _ in clients]
        assert [b"[DONE]" in answer or b'"Hello"' in answer for answer in answers] == [True] * len(clients)
        assert len(script.asked) == 1
        await served.ended()


async def test_those_who_share_what_does_not_end_are_all_told_when_the_grace_is_over(tmp_path: Path) -> None:
    script = Upstream()
    async with upstream(script) as server, serving(tmp_path, server, patience={"grace_s": 0.2}) as served:
        clients = [await ask(served, True)]
        await script.until_asked()
        clients += [await ask(served, stream) for stream in [True, False] * 5]
        await in_flight(served, len(clients))
        served.signal()
        answers = [await rest_of(reader) for reader, _ in clients]
        for answer in answers:
            head, _, _ = answer.partition(b"\r\n\r\n")
            if b"200 OK" in head:
                *_, last = events_of(body_of(answer))
                assert last["error"]["code"] == "shutting_down"
            else:
                assert b" 503 " in head
        assert len(script.asked) == 1
        await served.ended()


@pytest.mark.slow
async def test_a_replica_that_dies_while_it_generates_is_followed_by_one_that_waits(tmp_path: Path) -> None:
    script = Upstream(silent=True)
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    with redis_server() as redis:
        cache = {"url": redis.url, "wait_s": 60, "timeout_s": 1}
        async with (
            upstream(script) as server,
            serving(folders[0], server, cache=cache) as one,
            serving(folders[1], server, cache=cache) as two,
        ):
            await ask(one, True)
            await script.until_asked()
            waiting = [await ask(two, stream) for stream in (True, False)]
            await in_flight(two, 2)
            one.signal(signal.SIGKILL)
            await script.until_asked(2)
            script.more.set()
            for reader, _ in waiting:
                assert "200 OK" in await head_of(reader)
            assert len(script.asked) == 2


@pytest.mark.slow
@pytest.mark.parametrize("who", ["the first", "another"])
async def test_one_who_stops_reading_holds_up_nobody_and_is_let_go(tmp_path: Path, who: str) -> None:
    more = asyncio.Event()
    pieces = [chunk({"content": "x" * 60_000}) for _ in range(150)]  # twice as much as is kept for late ones
    stream = stream_reply(*BEGUN, more, *pieces, *REST)
    async with upstream(stream) as server, serving(tmp_path, server, {"write_stall_s": 2}) as served:
        first = await ask(served, True)
        await first[0].readuntil(b"Hel")
        second = await ask(served, True)
        await second[0].readuntil(b"Hel")
        reads, stops = (second, first) if who == "the first" else (first, second)
        stops[1].transport.pause_reading()  # type: ignore[attr-defined]
        more.set()
        heard = b""
        async with asyncio.timeout(PATIENCE_S):
            while b"[DONE]" not in heard:
                block = await reads[0].read(2**20)
                assert block
                heard = heard[-10:] + block
        await in_flight(served, 0)
        assert len(server.requests) - sum(request.path.endswith("/models") for request in server.requests) == 1
        served.signal()
        await served.ended()
