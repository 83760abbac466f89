"""What does an answer cost that was not generated for who gets it, and who is told?"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.adapter import Features
from gateway.errors import Overloaded
from gateway.ledger import open_ledger
from gateway.settings import Caching, Database, Limits, Model, Prices, Settings, Target, Upstream
from tests.cache.conftest import STREAM, Playing, answer, both, hello, probed, settings_with
from tests.cache.test_flights import TEXT, Stepwise, reading
from tests.house import HELLO, House, ScriptedAdapter, running
from tests.served import until

pytestmark = pytest.mark.anyio

PRICES = Prices(input=1.0, cached_input=0.1, output=2.0)
FULL, CACHED = 3 * 1000 + 2 * 2000, 3 * 100
"""Of three tokens asked and two said, in billionths of a dollar."""


def priced(caching: Caching, **limits: Any) -> Settings:
    model = Model(
        targets=[Target(upstream="one", model="model-1")], cache=caching, prices=PRICES, limits=Limits(**limits)
    )
    base = settings_with()
    return Settings(auth=base.auth, upstreams=base.upstreams, models={"smart": model})


@asynccontextmanager
async def billing(settings: Settings, folder: Path, adapter: ScriptedAdapter) -> AsyncIterator[House]:
    ledger = await asyncio.to_thread(open_ledger, Database(url=f"sqlite:///{folder}/ledger.db", journal=str(folder)))
    async with running(settings, {"one": adapter}, ledger=ledger) as house:
        await probed(house)
        yield house


def rows(folder: Path, columns: str = "cache, outcome, charged_tokens, cost_nano, saved_nano") -> list[Any]:
    with sqlite3.connect(folder / "ledger.db") as database:
        return database.execute(f"SELECT {columns} FROM usage ORDER BY started_ms, seq").fetchall()


@pytest.mark.parametrize(("share", "charged", "cost"), [("full", 5, FULL), ("cached", 3, CACHED), ("free", 0, 0)])
async def test_a_hit_costs_all_the_price_of_cached_input_or_nothing(
    tmp_path: Path, share: Any, charged: int, cost: int
) -> None:
    async with billing(priced(Caching(mode="all", hits_cost=share)), tmp_path, both()) as house:
        for _ in range(2):
            assert (await house.post(STREAM)).status_code == 200
        text = (await house.http.get(f"{house.url}/metrics")).text
    assert rows(tmp_path) == [
        ("miss", "completed", 5, FULL, 0),
        ("hit", "cached", charged, cost, FULL - cost),
    ]
    assert rows(tmp_path, "prompt_tokens, completion_tokens") == [(3, 2), (3, 2)]
    with sqlite3.connect(tmp_path / "ledger.db") as database:
        sums = database.execute("SELECT sum(requests), sum(hits), sum(saved_nano) FROM usage_hour").fetchone()
    assert sums == (2, 1, FULL - cost)
    for result in ("miss", "hit"):
        assert f'suiron_cache_requests_total{{key="alice",model="smart",result="{result}"}} 1.0' in text
    if saved := FULL - cost:
        assert f'suiron_cache_saved_usd_total{{key="alice",model="smart"}} {saved / 1e9}' in text


async def test_what_no_upstream_has_counted_is_counted_for_a_hit_as_well(tmp_path: Path) -> None:
    adapter = Playing(lambda _: hello(*"Hello, you there")[:-1])
    async with billing(priced(Caching(mode="all", hits_cost="full")), tmp_path, adapter) as house:
        for body in (STREAM, STREAM, HELLO):
            assert (await house.post(body)).status_code == 200
    miss, *hits = rows(tmp_path, "usage_source, completion_tokens, cost_nano")
    assert miss[0] == "counted"
    assert miss[1] >= 16
    assert [hit[0] for hit in hits] == ["counted"] * 2
    assert hits[0] == miss
    assert hits[1][2] > 0


async def test_who_waits_for_the_whole_of_a_stream_pays_for_it_when_those_before_have_left(tmp_path: Path) -> None:
    adapter = Stepwise()
    adapter.go(2)
    async with billing(priced(Caching(mode="all")), tmp_path, adapter) as house:
        async with reading(house) as first:
            await first.until('"content":"H"')
            whole = asyncio.create_task(house.post(HELLO))
            await asyncio.sleep(0.2)
        await until(lambda: len(rows(tmp_path)) == 1)
        adapter.go(6)
        await asyncio.sleep(0.1)
        whole.cancel()
        await adapter.until_closed()
        await until(lambda: len(rows(tmp_path)) == 2)
    told = rows(tmp_path, "outcome, cache, completion_tokens")
    assert [row[:2] for row in told] == [("client_gone", "miss")] * 2
    assert 1 <= min(row[2] for row in told) < max(row[2] for row in told)


async def test_of_those_who_share_one_pays_and_another_when_that_one_leaves(tmp_path: Path) -> None:
    adapter = Stepwise()
    adapter.go(2)
    async with billing(priced(Caching(mode="all")), tmp_path, adapter) as house, AsyncExitStack() as stay:
        async with reading(house):
            others = [await stay.enter_async_context(reading(house)) for _ in range(2)]
            assert [other.state for other in others] == ["shared", "shared"]
        await until(lambda: len(rows(tmp_path)) == 1)
        adapter.go()
        for other in others:
            assert (await other.rest())[-1] == "[DONE]"
    assert adapter.calls == 1
    told = rows(tmp_path, "outcome, cache, target, cost_nano")
    left = [row for row in told if row[0] == "client_gone"]
    assert [row[1:3] for row in left] == [("miss", "one/model-1")]
    assert sorted(row[1:] for row in told if row[0] != "client_gone") == [
        ("miss", "one/model-1", FULL),
        ("shared", "", 0),
    ]


@pytest.mark.parametrize(("share", "cost"), [("full", 5 * 1000 + 2000), ("cached", 5 * 100), ("free", 0)])
async def test_who_shares_and_leaves_is_billed_its_share_of_what_it_was_given(
    tmp_path: Path, share: Any, cost: int
) -> None:
    adapter = Stepwise()
    adapter.go(2)
    settings = priced(Caching(mode="all", hits_cost=share), tokens_per_day=10_000)
    async with billing(settings, tmp_path, adapter) as house, reading(house) as first:
        async with reading(house) as other:
            await other.until(TEXT[0])
        await until(lambda: len(rows(tmp_path)) == 1)
        adapter.go()
        assert (await first.rest())[-1] == "[DONE]"
        again = await house.post(HELLO)
    told = rows(tmp_path, "cache, outcome, usage_source, prompt_tokens, completion_tokens, cost_nano")
    assert told[1] == ("shared", "client_gone", "counted", 5, 1, cost)
    if share == "free":  # what it had reserved has been given back
        assert again.headers["x-ratelimit-remaining-tokens"] == str(10_000 - 5 - (3 + 512))


async def test_hits_count_against_limits_of_requests(tmp_path: Path) -> None:
    settings = priced(Caching(mode="all"), requests_per_minute=3)
    async with billing(settings, tmp_path, both()) as house:
        statuses = [(await house.post(HELLO)).status_code for _ in range(4)]
    assert statuses == [200, 200, 200, 429]


def tiered() -> Settings:
    targets = [Target(upstream="one"), Target(upstream="two", tier=1)]
    return Settings(
        auth=settings_with().auth,
        upstreams={name: Upstream(adapter="scripted") for name in ("one", "two")},
        models={"smart": Model(targets=targets, cache=Caching(mode="all"))},
    )


class Blind(Playing):
    """Sees no pictures."""

    def features(self, model: str) -> Features:
        return Features(vision=False)


async def test_what_only_a_target_of_a_higher_tier_can_do_is_kept() -> None:
    first, second = Blind(lambda _: [[answer()]]), both()
    picture = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
    body = HELLO | {"messages": [{"role": "user", "content": picture}]}
    async with running(tiered(), {"one": first, "two": second}) as house:
        await probed(house)
        states = [(await house.post(body)).headers["x-suiron-cache"] for _ in range(2)]
    assert states == ["miss", "hit"]
    assert (first.calls, second.calls) == (0, 1)


async def test_what_stands_in_for_another_target_is_not_kept() -> None:
    first, second = ScriptedAdapter(Overloaded("full")), both()
    async with running(tiered(), {"one": first, "two": second}) as house:
        for _ in range(2):
            assert (await house.post(HELLO)).headers["x-suiron-cache"] == "miss"
    assert second.calls == 2
