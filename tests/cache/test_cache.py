"""Is a question that was answered before answered from the cache, and only then?"""

import asyncio
import random
from typing import Any

import httpx2
import pytest

from gateway.errors import UpstreamFailed
from gateway.settings import Caching, LimitsByModel
from tests.cache.conftest import (
    ASK_USAGE,
    STREAM,
    Playing,
    answer,
    bearer,
    both,
    delta,
    hello,
    keeping,
    key,
    settings_with,
)
from tests.house import AUTH, HELLO, House, ScriptedAdapter, events_of, running

pytestmark = pytest.mark.anyio

DETERMINISTIC = Caching(mode="deterministic")


def state(response: httpx2.Response) -> str | None:
    assert response.status_code == 200, response.text
    found: str | None = response.headers.get("x-suiron-cache")
    return found


async def asked(house: House, body: Any = None, **headers: str) -> str | None:
    return state(await house.post(body, **headers))


async def test_the_second_time_it_is_a_hit_and_costs_no_generation() -> None:
    adapter = both()
    async with keeping(adapter) as house:
        first, second = await house.post(), await house.post()
    assert (state(first), state(second)) == ("miss", "hit")
    assert "age" not in first.headers
    assert {response.headers["cache-control"] for response in (first, second)} == {"no-store"}
    assert second.headers["age"] == "0"
    assert adapter.calls == 1
    given = [response.json() for response in (first, second)]
    assert given[0].pop("id") != given[1].pop("id")
    assert given[0].pop("created") <= given[1].pop("created")
    assert given[0] == given[1]


async def test_off_by_default_and_then_says_nothing() -> None:
    adapter = both()
    async with keeping(adapter, Caching()) as house:
        assert [await asked(house) for _ in range(2)] == [None, None]
    assert adapter.calls == 2


async def test_deterministic_means_temperature_0_or_a_seed() -> None:
    adapter = both()
    async with keeping(adapter, DETERMINISTIC) as house:
        for body in (HELLO, HELLO | {"temperature": 0.1}, HELLO | {"seed": None}):
            assert [await asked(house, body) for _ in range(2)] == ["bypass", "bypass"]
        for body in (HELLO | {"temperature": 0}, HELLO | {"seed": 0}, HELLO | {"seed": 7, "temperature": 1}):
            assert [await asked(house, body) for _ in range(2)] == ["miss", "hit"]


async def test_what_looks_outside_is_not_deterministic() -> None:
    def picture(url: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}

    fixed = HELLO | {"seed": 1}
    async with keeping(both(), DETERMINISTIC) as house:
        for body in (fixed | {"web_search_options": {}}, fixed | picture("https://example.com/now.png")):
            assert [await asked(house, body) for _ in range(2)] == ["bypass", "bypass"]
        for body in (fixed | picture("data:image/png;base64,AA=="), fixed | picture("data:image/png;base64,AQ==")):
            assert [await asked(house, body) for _ in range(2)] == ["miss", "hit"]
    async with keeping(both()) as house:  # who says all says these
        assert [await asked(house, fixed | picture("https://example.com/now.png")) for _ in range(2)] == ["miss", "hit"]


async def test_a_keys_own_policy_goes_before_the_models() -> None:
    keys = (key("on", cache=Caching(mode="all")), key("off", cache=Caching(mode="off")))
    async with keeping(both(), Caching(), keys) as house:
        assert [await asked(house, **bearer("on")) for _ in range(2)] == ["miss", "hit"]
    async with keeping(both(), Caching(mode="all"), keys) as house:
        assert [await asked(house, **bearer("off")) for _ in range(2)] == [None, None]


async def test_tenants_never_share_and_the_keys_of_a_team_do() -> None:
    keys = (key("bob"), key("carol", team="red"), key("dave", team="red"), key("red"), key("erin", team="bob"))
    async with keeping(both(), keys=keys) as house:
        assert await asked(house) == "miss"
        assert await asked(house, **bearer("bob")) == "miss"
        assert await asked(house, **bearer("carol")) == "miss"
        assert await asked(house, **bearer("dave")) == "hit"
        assert await asked(house, **bearer("red")) == "miss"
        assert await asked(house, **bearer("erin")) == "miss"


# What may be kept.


@pytest.mark.parametrize("finish", ["length", "content_filter", "anything"])
@pytest.mark.parametrize("stream", [False, True])
async def test_what_was_cut_or_filtered_is_not_kept(finish: str, stream: bool) -> None:
    adapter = Playing(lambda _: hello(finish=finish) if stream else [[answer(finish=finish)]])
    async with keeping(adapter) as house:
        assert [await asked(house, HELLO | {"stream": stream}) for _ in range(2)] == ["miss", "miss"]


async def test_one_choice_that_was_cut_spoils_the_others() -> None:
    def script() -> list[Any]:
        return [[delta({"content": "a"})], [delta({"content": "b"}, "length", 1)], [delta({}, "stop")]]

    async with keeping(Playing(lambda _: script())) as house:
        assert [await asked(house, STREAM | {"n": 2}) for _ in range(2)] == ["miss", "miss"]


async def test_a_failure_is_not_kept() -> None:
    adapter = ScriptedAdapter(UpstreamFailed("no"))
    async with keeping(adapter) as house:
        assert (await house.post()).status_code == 502
        adapter.script = ([answer()],)
        assert await asked(house) == "miss"


async def test_a_stream_that_breaks_off_is_not_kept() -> None:
    adapter = Playing(lambda _: [*hello()[:-2], UpstreamFailed("broke off")])
    async with keeping(adapter) as house:
        for _ in range(2):
            response = await house.post(STREAM)
            assert state(response) == "miss"
            assert "error" in events_of(response.content)[-1]


async def test_a_stream_that_ends_too_early_is_not_kept() -> None:
    async with keeping(Playing(lambda _: hello()[:-2])) as house:
        for _ in range(2):
            assert state(await house.post(STREAM)) == "miss"


async def test_a_stream_whose_client_leaves_is_not_kept() -> None:
    stuck = asyncio.Event()
    adapter = Playing(lambda _: [*hello()[:-2], stuck])
    async with keeping(adapter) as house:
        url = f"{house.url}/v1/chat/completions"
        async with house.http.stream("POST", url, json=STREAM, headers=AUTH) as response:
            async for line in response.aiter_lines():
                if "lo" in line:
                    break
        await adapter.until_closed()
        adapter.write = lambda _: hello()
        assert state(await house.post(STREAM)) == "miss"


async def test_what_is_larger_than_an_entry_may_be_is_not_kept() -> None:
    text = random.Random(2).randbytes(4000).hex()
    async with keeping(both(text), Caching(mode="all", max_entry_bytes=2048)) as house:
        assert [await asked(house) for _ in range(2)] == ["miss", "miss"]


# What the client says.


async def test_no_store_neither_takes_nor_gives() -> None:
    adapter = both()
    async with keeping(adapter) as house:
        assert await asked(house, **{"cache-control": "no-store"}) == "bypass"
        assert await asked(house) == "miss"
        assert await asked(house, **{"cache-control": "no-store"}) == "bypass"
    assert adapter.calls == 3


async def test_no_cache_generates_and_keeps_the_new_one() -> None:
    adapter = both("old")
    async with keeping(adapter) as house:
        assert await asked(house) == "miss"
        adapter.write = lambda _: [[answer("new")]]
        assert await asked(house, **{"cache-control": "No-Cache"}) == "miss"
        response = await house.post()
        assert state(response) == "hit"
        assert response.json()["choices"][0]["message"]["content"] == "new"


async def test_only_if_cached_generates_nothing() -> None:
    adapter = both()
    async with keeping(adapter) as house:
        response = await house.post(**{"cache-control": "only-if-cached"})
        assert (response.status_code, response.json()["error"]["code"]) == (504, "not_cached")
        assert response.headers["x-suiron-cache"] == "miss"
        assert adapter.calls == 0
        await house.post()
        assert await asked(house, **{"cache-control": "only-if-cached, max-age=60"}) == "hit"
    async with keeping(adapter, Caching()) as house:
        assert (await house.post(**{"cache-control": "only-if-cached"})).status_code == 504


async def test_an_error_and_a_refusal_say_what_they_have_to_do_with_the_cache() -> None:
    adapter = Playing(lambda _: [UpstreamFailed("no")])
    keys = (key("poor", limits=LimitsByModel(requests_per_minute=1)),)
    async with keeping(adapter, DETERMINISTIC, keys) as house:
        for body, said in ((HELLO, "bypass"), (HELLO | {"seed": 1}, "miss"), (STREAM | {"seed": 1}, "miss")):
            response = await house.post(body)
            assert (response.status_code, response.headers["x-suiron-cache"]) == (502, said)
        answers = [await house.post(HELLO | {"seed": 1}, **bearer("poor")) for _ in range(2)]
        assert [response.status_code for response in answers] == [502, 429]
        assert "x-suiron-cache" not in answers[1].headers  # it never came so far
        text = (await house.http.get(f"{house.url}/metrics")).text
    assert 'suiron_cache_requests_total{key="poor",model="smart",result="miss"} 1.0' in text


async def test_max_age_0_is_no_cache() -> None:
    async with keeping(both()) as house:
        assert await asked(house) == "miss"
        assert await asked(house, **{"cache-control": "max-age=0"}) == "miss"
        assert await asked(house, **{"cache-control": "max-age=100"}) == "hit"


# Forms.


@pytest.mark.parametrize("body", [STREAM, ASK_USAGE])
async def test_a_stream_comes_again_in_its_pieces(body: dict[str, Any]) -> None:
    adapter = both("Hello 世界 👩‍👩‍👧")
    async with keeping(adapter) as house:
        first, second = [await house.post(body) for _ in range(2)]
    assert (state(first), state(second)) == ("miss", "hit")
    assert plain(first) == plain(second)
    assert adapter.calls == 1
    assert [event.get("usage") for event in plain(second)[:-1]] == (
        [None] * (len(plain(second)) - 2) + [{"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}]
        if body is ASK_USAGE
        else [None] * (len(plain(second)) - 1)
    )


def plain(response: httpx2.Response) -> list[Any]:
    """The events, without what is minted for each answer."""
    events = events_of(response.content)
    ids = {(event.pop("id"), event.pop("created")) for event in events if isinstance(event, dict)}
    assert len(ids) == 1
    return events


async def test_a_plain_answer_serves_a_stream_and_a_stream_a_plain_one() -> None:
    for first, second in ((HELLO, STREAM), (STREAM, HELLO), (ASK_USAGE, HELLO), (HELLO, ASK_USAGE)):
        adapter = both("Hello, you there")
        async with keeping(adapter) as house:
            await house.post(first)
            response = await house.post(second)
            assert state(response) == "hit"
            if second is HELLO:
                given = response.json()
                assert given["choices"][0]["message"]["content"] == "Hello, you there"
                assert given["choices"][0]["finish_reason"] == "stop"
                assert given["usage"]["total_tokens"] == 5
            else:
                said = "".join(c["delta"].get("content") or "" for e in plain(response)[:-1] for c in e["choices"])
                assert said == "Hello, you there"
                usage = [event["usage"] for event in plain_again(response) if event.get("usage")]
                assert len(usage) == (second is ASK_USAGE)
        assert adapter.calls == 1


def plain_again(response: httpx2.Response) -> list[Any]:
    return [event for event in events_of(response.content) if isinstance(event, dict)]


async def test_another_model_is_another_question() -> None:
    async with keeping(both()) as house:
        assert await asked(house) == "miss"
        assert await asked(house, HELLO | {"model": "other"}) == "miss"
        assert await asked(house, HELLO | {"model": "other"}) == "hit"


async def test_a_restart_forgets_what_was_kept_in_the_process() -> None:
    adapter = both()
    for _ in range(2):
        async with running(settings_with(), {"one": adapter}) as house:
            assert await asked(house) == "miss"
