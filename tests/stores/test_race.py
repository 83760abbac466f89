"""Several real processes at one Redis, as fast as it lets them: nothing over any limit, and little left unused."""

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from tests.stores.proxy import Proxy, proxy_to
from tests.stores.race import HUGE, Options, Record, read
from tests.stores.servers import RedisServer, redis_server

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

PROCESSES = 4


class Racers:
    """The processes of a race."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.running: list[asyncio.subprocess.Process] = []
        self.started = 0

    async def start(self, seconds: float) -> None:
        self.started += 1
        options = msgspec.structs.replace(self.options, seed=self.options.seed * 1000 + self.started, seconds=seconds)
        command = [sys.executable, "-m", "tests.stores.race", msgspec.json.encode(options).decode()]
        self.running.append(await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL))

    async def kill_one(self, seconds: float) -> None:
        """And start another in its place."""
        victim = self.running.pop(0)
        victim.kill()
        await victim.wait()
        await self.start(seconds)

    async def end(self) -> None:
        for process in self.running:
            assert await process.wait() == 0


@asynccontextmanager
async def racing(options: Options) -> AsyncIterator[Racers]:
    racers = Racers(options)
    for _ in range(PROCESSES):
        await racers.start(options.seconds)
    try:
        yield racers
        await racers.end()
    finally:
        for process in racers.running:
            if process.returncode is None:
                process.kill()


def options(tmp_path: Path, url: str, window_ms: int, seconds: float, **limits: float) -> Options:
    made = {"url": url, "log": str(tmp_path / "race.log"), "seed": 1, "window_ms": window_ms, "seconds": seconds}
    return msgspec.convert({**made, **limits}, Options)


def told(name: str, **figures: object) -> None:
    """For the closing note: `pytest -s` shows it."""
    print(f"\n{name}: " + ", ".join(f"{what} {figure}" for what, figure in figures.items()))  # noqa: T201


async def test_without_faults_a_request_limit_is_used_to_95_percent_and_never_exceeded(tmp_path: Path) -> None:
    with redis_server() as redis:
        race = options(tmp_path, redis.url, window_ms=3_000, seconds=16, requests=600, hold_s=0.02)
        async with racing(race):
            pass
        record = read(Path(race.log))
        most = record.most_requests(race.window_ms)
        used = len(record.admitted) / (race.requests * (record.span_ms() / race.window_ms + 1))
        told("requests", limit=race.requests, most=most, used=round(used, 3), admitted=len(record.admitted))
        assert most <= race.requests
        assert 0.95 * race.requests <= most
        assert steady(record, race.window_ms, race.requests, lambda tokens: 1) >= 0.95


async def test_without_faults_a_token_limit_is_used_to_90_percent_and_never_exceeded(tmp_path: Path) -> None:
    with redis_server() as redis:
        race = options(tmp_path, redis.url, window_ms=6_000, seconds=31, tokens=400_000, hold_s=0.3, workers=12)
        async with racing(race):
            pass
        record = read(Path(race.log))
        most = record.most_tokens(race.window_ms)
        used = steady(record, race.window_ms, race.tokens, lambda tokens: tokens)
        told("tokens", limit=race.tokens, most=most, used=round(used, 3), admitted=len(record.admitted))
        assert most <= race.tokens
        assert used >= 0.90


def steady(record: Record, window_ms: int, limit: int, amount: Callable[[int], int]) -> float:
    """How much of the limit is used over whole windows, after the first burst."""
    moments = [at for at, _ in record.admitted.values()]
    begin = min(moments) + window_ms
    windows = (max(moments) - begin) // window_ms
    end = begin + windows * window_ms
    return sum(amount(tokens) for at, tokens in record.admitted.values() if begin <= at < end) / (limit * windows)


async def test_duplicates_crashes_lost_replies_and_flushed_scripts_let_nothing_over_any_limit(tmp_path: Path) -> None:
    chance = random.Random(4)
    with redis_server() as redis:
        async with proxy_to(redis.port) as proxy:
            url = f"redis://127.0.0.1:{proxy.port}"
            limits = {"requests": 300, "tokens": 150_000, "leases": 24, "crashes": 0.1, "doubles": 0.2, "lease_ms": 600}
            race = options(tmp_path, url, window_ms=2_000, seconds=20, hold_s=0.1, **limits)
            async with racing(race) as racers:
                until = time.monotonic() + race.seconds
                proxy.lose_each = 50
                while (left := until - time.monotonic()) > 2:
                    await asyncio.sleep(chance.uniform(0.1, 0.6))
                    redis.said("SCRIPT", "FLUSH")
                    if chance.random() < 0.3:
                        await racers.kill_one(left)
            record = read(Path(race.log))
            most_requests, most_tokens = record.most_requests(race.window_ms), record.most_tokens(race.window_ms)
            told(
                "faults",
                admitted=len(record.admitted),
                requests=f"{most_requests}/{race.requests}",
                tokens=f"{most_tokens}/{race.tokens}",
                at_once=f"{record.most_at_once(race.lease_ms)}/{race.leases}",
                doubled=record.doubled,
                lost_replies=proxy.lost,
                processes=racers.started,
            )
            assert proxy.lost > 20
            assert record.doubled > 50
            assert most_requests <= race.requests
            assert most_tokens <= race.tokens
            assert record.most_at_once(race.lease_ms) <= race.leases


Fault = Callable[[RedisServer, Proxy], Awaitable[None]]


async def flush(redis: RedisServer, proxy: Proxy) -> None:
    redis.said("FLUSHALL")


async def freeze(redis: RedisServer, proxy: Proxy) -> None:
    redis.freeze()
    await asyncio.sleep(1.5)
    redis.thaw()


async def kill(redis: RedisServer, proxy: Proxy) -> None:
    redis.kill()
    await asyncio.sleep(0.5)
    redis.start()


async def black_hole(redis: RedisServer, proxy: Proxy) -> None:
    proxy.hole = True
    await asyncio.sleep(1.0)
    proxy.hole = False


@pytest.mark.parametrize(("fault", "forgets"), [(flush, True), (kill, True), (freeze, False), (black_hole, False)])
async def test_a_redis_in_trouble_lets_nothing_more_through_and_hardly_more_where_it_forgets(
    tmp_path: Path, fault: Fault, forgets: bool
) -> None:
    with redis_server() as redis:
        async with proxy_to(redis.port) as proxy:
            url = f"redis://127.0.0.1:{proxy.port}"
            limits = {"requests": 300, "leases": 24, "lease_ms": 600}
            race = options(tmp_path, url, window_ms=2_000, seconds=19, hold_s=0.1, timeout_s=0.25, **limits)
            moments = []
            async with racing(race):
                for _ in range(2):
                    await asyncio.sleep(5)
                    moments.append(time.time_ns() // 1_000_000)
                    await fault(redis, proxy)
                    moments.append(time.time_ns() // 1_000_000)
            record = read(Path(race.log))
            across, else_most = record.most_requests(race.window_ms), record.most_requests(race.window_ms, moments)
            told(fault.__name__, limit=race.requests, across=across, otherwise=else_most, admitted=len(record.admitted))
            assert race.requests < HUGE
            assert across <= (1.1 if forgets else 1) * race.requests
            assert else_most <= race.requests
            after = [at for at, _ in record.admitted.values() if at > moments[-1] + 2_500]
            assert len(after) > 50  # and it goes on
