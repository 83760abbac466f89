"""Three gateways and a Redis that goes away: by their shares they admit less than a limit once more, all together."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.house import AUTH, HELLO, KEY
from tests.served import Served, started
from tests.stores.servers import RedisServer, redis_server

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

REPLICAS = 3
LIMIT = 240
MEMBERS_ARE_KNOWN_S = 7


@dataclass
class Fleet:
    replicas: list[Served]
    redis: RedisServer
    http: httpx2.AsyncClient

    async def ask(self, number: int) -> httpx2.Response:
        url = f"{self.replicas[number % REPLICAS].url}/v1/chat/completions"
        return await self.http.post(url, json=HELLO, headers=AUTH)

    async def ask_all(self, count: int, at_once: int = 30) -> Counter[int]:
        told: Counter[int] = Counter()
        for begin in range(0, count, at_once):
            answers = await asyncio.gather(*map(self.ask, range(begin, min(begin + at_once, count))))
            told.update(answer.status_code for answer in answers)
        return told

    async def until(self, degraded: bool) -> Counter[int]:
        """What each answers until all find that the store is (not) out of reach."""
        told: Counter[int] = Counter()
        async with asyncio.timeout(20):
            for number in range(REPLICAS):
                while True:
                    answer = await self.ask(number)
                    told[answer.status_code] += 1
                    if ("x-suiron-enforcement" in answer.headers) == degraded:
                        break
                    await asyncio.sleep(0.1)
        return told


@asynccontextmanager
async def fleet(folder: Path, limits: dict[str, Any]) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        redis = stack.enter_context(redis_server())
        replicas = []
        for number in range(REPLICAS):
            document = {
                "server": {"drain_delay_s": 0},
                "auth": {"keys": [{"name": "alice", "sha256": KEY.sha256, "team": "red", "limits": limits}]},
                "upstreams": {"one": {"adapter": "echo"}},
                "models": {"smart": {"targets": [{"upstream": "one"}]}},
                "store": {"url": redis.url},
                "database": {"url": f"sqlite:///{folder}/{number}.db", "journal": str(folder / f"{number}.journal")},
            }
            path = folder / f"{number}.yaml"
            path.write_text(json.dumps(document))
            replicas.append(await stack.enter_async_context(started("--config", str(path))))
        http = await stack.enter_async_context(httpx2.AsyncClient(timeout=60))
        await asyncio.sleep(MEMBERS_ARE_KNOWN_S)
        yield Fleet(replicas, redis, http)


@pytest.mark.parametrize(("used_before", "forgets"), [(0, True), (LIMIT // 2, False), (LIMIT, True)])
async def test_in_the_minute_of_an_outage_less_than_twice_a_limit_is_let_through(
    tmp_path: Path, used_before: int, forgets: bool
) -> None:
    async with fleet(tmp_path, {"requests_per_minute": {"limit": LIMIT, "on_store_loss": "local"}}) as three:
        began = time.monotonic()
        before = (await three.ask_all(used_before))[200]
        if forgets:
            three.redis.kill()
        else:
            three.redis.freeze()
        during = (await three.until(degraded=True) + await three.ask_all(2 * LIMIT))[200]
        if forgets:
            three.redis.start()
        else:
            three.redis.thaw()
        after = (await three.until(degraded=False) + await three.ask_all(2 * LIMIT))[200]
        took = time.monotonic() - began
        print(f"\nlimit {LIMIT}: {before} before, {during} during, {after} after, in {took:.0f} s")  # noqa: T201
        assert took < 55, "more than a window: it says nothing"
        assert before == used_before
        assert during <= (LIMIT if before < LIMIT else LIMIT // 10)  # what each has seen last is not all there was
        assert before + during + after < 2 * LIMIT
        assert before + during + after >= LIMIT
