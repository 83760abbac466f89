"""Two gateways, one Redis, one PostgreSQL: limits hold over both, and the bill is the upstream's own count."""

import asyncio
import json
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.house import AUTH, DONE, HELLO, KEY, ROLE, TOKEN, Received, UpstreamServer, chunk, completion, head, upstream
from tests.ledger.servers import PASSWORD, Postgres, a_postgres
from tests.served import Served, started, until
from tests.stores.servers import RedisServer, redis_server

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

PROMPT_TOKENS = 10


class Mock:
    """Answers as many tokens as are asked for at most, and counts them; holds answers back while `gate` is closed."""

    def __init__(self) -> None:
        self.given: dict[str, int] = {}
        self.gate = asyncio.Event()
        self.gate.set()

    async def answer(self, received: Received, writer: asyncio.StreamWriter) -> None:
        if received.path.endswith("/models"):
            await self._json(writer, {"object": "list", "data": [{"id": "model-1"}]})
            return
        request_id, tokens = received.headers["x-request-id"], received.json["max_tokens"]
        self.given[request_id] = 0
        waits = [asyncio.ensure_future(event.wait()) for event in (self.gate, received.gone)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": tokens, "total_tokens": PROMPT_TOKENS + tokens}
        self.given[request_id] = tokens
        if not received.json.get("stream"):
            await self._json(writer, {**completion("x"), "usage": usage})
            return
        writer.write(head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"}))
        events = [chunk(ROLE), *(chunk({"content": "x "}) for _ in range(tokens)), chunk({}, "stop")]
        for event in [*events, chunk(None, usage=usage), DONE]:
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
        writer.write(b"0\r\n\r\n")

    async def _json(self, writer: asyncio.StreamWriter, document: Any) -> None:
        body = json.dumps(document).encode()
        writer.write(head(200, {"content-type": "application/json", "content-length": str(len(body))}) + body)


@dataclass
class Pair:
    replicas: list[Served]
    mock: Mock
    redis: RedisServer
    database: Postgres
    http: httpx2.AsyncClient

    async def ask(self, number: int, **changes: Any) -> httpx2.Response:
        body = {**HELLO, "max_tokens": 5, **changes}
        url = f"{self.replicas[number % len(self.replicas)].url}/v1/chat/completions"
        return await self.http.post(url, json=body, headers=AUTH)

    async def ask_all(self, count: int, **changes: Any) -> Counter[int]:
        answers = await asyncio.gather(*(self.ask(number, **changes) for number in range(count)))
        return Counter(answer.status_code for answer in answers)

    async def recovered(self, number: int) -> None:
        """This replica has found Redis again."""
        async with asyncio.timeout(20):
            while "x-suiron-enforcement" in (await self.ask(number)).headers:  # noqa: ASYNC110 - another process decides
                await asyncio.sleep(0.2)

    def outcomes(self) -> Counter[str]:
        return Counter(outcome for _, _, outcome in self.rows())

    def rows(self) -> list[Any]:
        with self.database.connect("postgres") as connection:
            return connection.execute("SELECT prompt_tokens, completion_tokens, outcome FROM usage").fetchall()


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    with a_postgres() as server:
        yield server


@asynccontextmanager
async def pair(folder: Path, database: Postgres, limits: dict[str, Any], **redis_limits: Any) -> AsyncIterator[Pair]:
    mock = Mock()
    with redis_server("--appendonly", "no") as redis, database.connect() as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
        async with upstream(mock.answer) as server:
            path = configured(folder, server, redis, database, limits)
            async with (
                started("--config", str(path)) as first,
                started("--config", str(path)) as second,
                httpx2.AsyncClient(timeout=60, limits=httpx2.Limits(max_connections=None)) as http,
            ):
                yield Pair([first, second], mock, redis, database, http)


def configured(folder: Path, server: UpstreamServer, redis: RedisServer, database: Postgres, limits: Any) -> Path:
    document = {
        "server": {"drain_delay_s": 0},
        "auth": {"keys": [{"name": "alice", "sha256": KEY.sha256, "team": "red", "limits": limits}]},
        "upstreams": {"one": {"adapter": "openai", "base_url": f"http://127.0.0.1:{server.port}/v1"}},
        "models": {"smart": {"targets": [{"upstream": "one", "model": "m"}], "prices": {"input": 1, "output": 2}}},
        "store": {"url": redis.url, "timeout_s": 5},
        "database": {
            "url": f"postgresql://suiron@127.0.0.1:{database.port}/postgres",
            "password": {"file": str(folder / "password")},
            "journal": str(folder / "journal"),
            "journal_mib": 1,
        },
    }
    (folder / "password").write_text(PASSWORD)
    (folder / "gateway.yaml").write_text(json.dumps(document))
    return folder / "gateway.yaml"


async def test_a_rate_holds_over_both(tmp_path: Path, database: Postgres) -> None:
    async with pair(tmp_path, database, {"requests_per_hour": 50}) as both:
        assert await both.ask_all(150) == {200: 50, 429: 100}
        assert len(both.mock.given) == 50


async def test_a_quota_of_tokens_is_used_to_the_last_and_billed_as_the_upstream_counts(
    tmp_path: Path, database: Postgres
) -> None:
    limit = 40 * (PROMPT_TOKENS + 5)
    async with pair(tmp_path, database, {"tokens_per_day": limit}) as both:
        statuses: Counter[int] = Counter()
        for stream in (False, True, False, True, False):  # what is reserved beyond use comes back between
            statuses += await both.ask_all(20, stream=stream)
        given = both.mock.given
        used = sum(given.values()) + PROMPT_TOKENS * len(given)
        assert statuses[200] == len(given)
        assert 0.9 * limit <= used <= limit
        await until(lambda: len(both.rows()) == len(given))
        assert sum(prompt + completion for prompt, completion, _ in both.rows()) == used


async def test_concurrency_holds_over_both_and_comes_back_when_one_is_killed(
    tmp_path: Path, database: Postgres
) -> None:
    async with pair(tmp_path, database, {"concurrent_requests": 6}) as both:
        both.mock.gate.clear()
        asking = [asyncio.create_task(both.ask(number)) for number in range(6)]  # three of each
        await until(lambda: len(both.mock.given) == 6)
        assert await both.ask_all(6) == {429: 6}
        killed, left = both.replicas
        killed.signal(signal.SIGKILL)
        await killed.process.wait()
        both.replicas = [left]
        both.mock.gate.set()
        answers = await asyncio.gather(*asking, return_exceptions=True)
        assert sum(isinstance(answer, Exception) for answer in answers) == 3
        # the leases of the dead lapse after 30 s, and its requests are billed after 45
        await until(lambda: both.outcomes()["abandoned"] == 3, within_s=90)
        assert both.outcomes() == {"completed": 3, "abandoned": 3}
        both.mock.gate.clear()
        again = [asyncio.create_task(both.ask(number)) for number in range(6)]
        await until(lambda: len(both.mock.given) == 12)
        assert await both.ask_all(2) == {429: 2}
        both.mock.gate.set()
        await asyncio.gather(*again)


async def test_a_flushed_redis_gives_nobody_a_new_quota(tmp_path: Path, database: Postgres) -> None:
    async with pair(tmp_path, database, {"requests_per_day": {"limit": 30, "window": "calendar"}}) as both:
        assert await both.ask_all(20) == {200: 20}
        await until(lambda: len(both.rows()) == 20)
        both.redis.said("FLUSHALL")
        assert await both.ask_all(20) == {200: 10, 429: 10}


async def test_while_redis_is_gone_requests_go_on_and_quotas_stay_exact(tmp_path: Path, database: Postgres) -> None:
    async with pair(tmp_path, database, {"requests_per_day": {"limit": 100, "window": "calendar"}}) as both:
        assert await both.ask_all(20) == {200: 20}
        await until(lambda: len(both.rows()) == 20)
        both.redis.kill()
        degraded = await asyncio.gather(*(both.ask(number) for number in range(20)))
        assert {answer.status_code for answer in degraded} == {200}
        assert degraded[-1].headers["x-suiron-enforcement"] == "degraded"
        both.redis.start()
        for number in (0, 1):
            await both.recovered(number)
        done = len(both.mock.given)
        await until(lambda: len(both.rows()) == done)
        statuses = await both.ask_all(100)
        assert statuses == {200: 100 - done, 429: done}


async def test_the_sdk_waits_and_is_admitted(tmp_path: Path, database: Postgres) -> None:
    async with pair(tmp_path, database, {"concurrent_requests": 1}) as both:
        both.mock.gate.clear()
        first = asyncio.create_task(both.ask(0))
        await until(lambda: len(both.mock.given) == 1)
        client = openai.AsyncOpenAI(base_url=f"{both.replicas[1].url}/v1", api_key=TOKEN, max_retries=5)
        second = asyncio.create_task(client.chat.completions.create(**HELLO, max_tokens=5))
        await asyncio.wait([second], timeout=0.5)
        both.mock.gate.set()
        assert (await first).status_code == 200
        assert (await second).choices[0].message.content == "x"
        await client.close()
