"""Do those who ask the same at the same time share one generation, whoever comes late or leaves early?"""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx2
import pytest

from gateway.cache import Cache
from gateway.cache.flights import MAX_BEHIND_BYTES, MAX_KEPT_BYTES
from gateway.cache.question import Fingerprints
from gateway.call import Call
from gateway.errors import Overloaded, UpstreamFailed
from gateway.schema.payload import Parts
from gateway.settings import Caching
from gateway.stores.answers import MemoryAnswers
from tests.cache.conftest import (
    ALL,
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
from tests.cache.direct import a_call, all_of
from tests.house import AUTH, HELLO, House, events_of

pytestmark = pytest.mark.anyio

TEXT = "Hello, 世界!"


class Stepwise(Playing):
    """Says a piece of its text at each step; the first time it is asked, and whole answers ever after."""

    def __init__(self, text: str = TEXT) -> None:
        self.steps = [asyncio.Event() for _ in hello(*text)]

        def write(asked: Any) -> list[Any]:
            if self.calls:
                return both(text).write(asked)  # type: ignore[return-value]
            if not asked.stream:
                return [self.steps[-1], [answer(text)]]
            return [line for step, parts in zip(self.steps, hello(*text), strict=True) for line in (step, parts)]

        super().__init__(write)

    def go(self, to: int | None = None) -> None:
        for step in self.steps[:to]:
            step.set()


class Reader:
    """A client that reads a stream as it comes."""

    def __init__(self, response: httpx2.Response) -> None:
        self.response = response
        self.body = b""
        self._blocks = response.aiter_bytes()

    async def until(self, text: str) -> None:
        while text.encode() not in self.body:
            self.body += await anext(self._blocks)

    async def rest(self) -> list[Any]:
        async for block in self._blocks:
            self.body += block
        return self.events

    @property
    def events(self) -> list[Any]:
        return [event if event == "[DONE]" else without_ids(event) for event in events_of(self.body)]

    @property
    def state(self) -> str:
        return str(self.response.headers["x-suiron-cache"])


def without_ids(event: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name not in ("id", "created")}


@asynccontextmanager
async def reading(house: House, body: Any = STREAM, headers: Any = AUTH) -> AsyncIterator[Reader]:
    url = f"{house.url}/v1/chat/completions"
    async with house.http.stream("POST", url, json=body, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        yield Reader(response)


async def asking(adapter: Playing, times: int = 1) -> None:
    async with asyncio.timeout(20):
        while adapter.calls < times:  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def test_a_hundred_identical_streams_are_one_generation() -> None:
    adapter = Stepwise()
    async with keeping(adapter) as house:
        posts = [asyncio.create_task(house.post(STREAM)) for _ in range(100)]
        await asking(adapter)
        await asyncio.sleep(0.2)
        adapter.go()
        responses = await asyncio.gather(*posts)
    assert adapter.calls == 1
    states = sorted(response.headers["x-suiron-cache"] for response in responses)
    assert states[0] == "miss"
    assert set(states[1:]) <= {"shared", "hit"}
    transcripts = [[e if e == "[DONE]" else without_ids(e) for e in events_of(r.content)] for r in responses]
    assert all(transcript == transcripts[0] for transcript in transcripts)
    assert "".join(c["delta"].get("content") or "" for e in transcripts[0][:-1] for c in e["choices"]) == TEXT
    assert len({events_of(response.content)[0]["id"] for response in responses}) == 100


async def test_who_comes_late_gets_what_was_said_and_then_hears_on() -> None:
    adapter = Stepwise()
    adapter.go(2)
    async with keeping(adapter) as house, reading(house) as first:
        adapter.go(5)
        await first.until('"content":"l"')
        async with reading(house, ASK_USAGE) as second:
            assert (first.state, second.state) == ("miss", "shared")
            await second.until('"content":"e"')
            adapter.go(6)
            await second.until('"content":"o"')
            adapter.go()
            said, heard = await first.rest(), await second.rest()
    assert adapter.calls == 1
    assert heard[-2]["usage"]["completion_tokens"] == 2
    assert [{**event, "usage": None} for event in said[:-1]] == heard[:-2]


async def test_the_first_to_ask_may_leave() -> None:
    adapter = Stepwise()
    adapter.go(2)
    async with keeping(adapter) as house:
        async with AsyncExitStack() as stays:
            async with reading(house) as first:
                second = await stays.enter_async_context(reading(house))
                assert (first.state, second.state) == ("miss", "shared")
            await asyncio.sleep(0.05)
            assert adapter.closed == 0
            adapter.go()
            assert (await second.rest())[-1] == "[DONE]"
        assert (await house.post()).headers["x-suiron-cache"] == "hit"
    assert adapter.calls == 1


async def test_when_the_last_one_leaves_the_generation_is_closed() -> None:
    adapter = Stepwise()
    adapter.go(2)
    async with keeping(adapter) as house:
        async with reading(house) as first, reading(house) as second:
            adapter.go(3)
            await first.until('"content":"e"')
            await second.until('"content":"e"')
        await adapter.until_closed()
        assert (await house.post(STREAM)).headers["x-suiron-cache"] == "miss"
    assert adapter.calls == 2


async def test_a_whole_answer_and_a_stream_share_as_well() -> None:
    for first, second in ((HELLO, STREAM), (STREAM, HELLO)):
        adapter = Stepwise()
        async with keeping(adapter) as house:
            posts = [asyncio.create_task(house.post(first))]
            await asking(adapter)
            posts.append(asyncio.create_task(house.post(second)))
            await asyncio.sleep(0.05)
            adapter.go()
            for response, body in zip(await asyncio.gather(*posts), (first, second), strict=True):
                assert text_of(response, body) == TEXT
        assert adapter.calls == 1


def text_of(response: httpx2.Response, body: Any) -> str:
    if not body.get("stream"):
        text: str = response.json()["choices"][0]["message"]["content"]
        return text
    events = events_of(response.content)
    assert events[-1] == "[DONE]"
    return "".join(c["delta"].get("content") or "" for e in events[:-1] for c in e["choices"])


async def test_only_what_may_be_kept_is_shared() -> None:
    for caching, keys, headers, body in (
        (Caching(), (), AUTH, STREAM),
        (Caching(mode="all", coalesce=False), (), AUTH, STREAM),
        (Caching(mode="deterministic"), (), AUTH, STREAM),
        (ALL, (key("bob"),), bearer("bob"), STREAM),
        (ALL, (), AUTH, STREAM | {"model": "other"}),
        (ALL, (), AUTH, STREAM | {"temperature": 0.5}),
        (ALL, (), {**AUTH, "cache-control": "no-store"}, STREAM),
        (ALL, (), {**AUTH, "cache-control": "no-cache"}, STREAM),
    ):
        adapter = Stepwise()
        async with keeping(adapter, caching, keys) as house:
            first = asyncio.create_task(house.post(STREAM))
            await asking(adapter)
            second = asyncio.create_task(house.post(body, **headers))
            await asking(adapter, 2)
            adapter.go()
            for response in await asyncio.gather(first, second):
                assert response.headers.get("x-suiron-cache") != "shared"


async def test_a_failure_is_told_to_who_began_and_the_others_try_once_more() -> None:
    begun = asyncio.Event()
    adapter = Playing(lambda _: [begun, Overloaded("full")] if not adapter.calls else hello(*TEXT))
    async with keeping(adapter) as house:
        posts = [asyncio.create_task(house.post(STREAM)) for _ in range(5)]
        await asking(adapter)
        await asyncio.sleep(0.1)
        begun.set()
        responses = await asyncio.gather(*posts)
    statuses = sorted(response.status_code for response in responses)
    assert statuses == [200] * 4 + [503]
    assert adapter.calls == 2


async def test_a_failure_that_goes_on_is_told_to_all_after_two_tries() -> None:
    adapter = Playing(lambda _: [UpstreamFailed("down")])
    async with keeping(adapter) as house:
        responses = await asyncio.gather(*(house.post(STREAM) for _ in range(20)))
    assert {response.status_code for response in responses} == {502}
    assert adapter.calls <= 20


async def test_who_has_heard_a_part_hears_of_the_failure() -> None:
    broke = asyncio.Event()
    adapter = Playing(lambda _: [*hello()[:-2], broke, UpstreamFailed("broke off")])
    async with keeping(adapter) as house, reading(house) as first, reading(house) as second:
        await first.until('"content":"lo"')
        await second.until('"content":"lo"')
        broke.set()
        for reader in (first, second):
            assert "error" in (await reader.rest())[-1]
    assert adapter.calls == 1


async def test_clients_that_leave_at_random_moments_spoil_nothing() -> None:
    """Readers of several questions come and go; who stays gets the whole answer to its own."""
    chance = random.Random(7)
    questions = [f"question {number}" for number in range(5)]

    def write(asked: Any) -> list[Any]:
        return hello(*asked.messages[0].content * 3)

    adapter = Slowly(write)

    async def client(house: House) -> None:
        question = chance.choice(questions)
        body = {**STREAM, "messages": [{"role": "user", "content": question}]}
        patience_s = chance.choice([0.0005, 0.005, 0.02, 0.05, 10.0, 10.0])
        await asyncio.sleep(chance.random() * 0.3)
        try:
            async with asyncio.timeout(patience_s):
                response = await house.post(body)
        except TimeoutError:
            return
        assert text_of(response, body) == question * 3

    async with keeping(adapter, Caching(mode="all", ttl_s=0.05)) as house:
        await asyncio.gather(*(client(house) for _ in range(300)))
        await adapter.until_closed(adapter.calls)
    assert adapter.calls < 150


class Slowly(Playing):
    async def chat(self, request: Any, dispatch: Any) -> Any:
        async for parts in super().chat(request, dispatch):
            await asyncio.sleep(0.0005)
            yield parts


# A long answer, and somebody who stops reading.

PIECE = "x" * 65_000


class Long:
    """A stream of *pieces*, each large; `said` are those that were taken from it."""

    def __init__(self, pieces: int) -> None:
        self.pieces = pieces
        self.said = 0

    async def produce(self, call: Call) -> AsyncGenerator[Parts]:
        if not call.streamed:
            yield [answer()]
            return
        yield [delta({"role": "assistant", "content": ""})]
        for number in range(self.pieces):
            self.said += 1
            await asyncio.sleep(0)
            yield [delta({"content": f"{number}-{PIECE}"})]
        yield [delta({}, "stop")]

    def text(self) -> list[str]:
        return [f"{number}-{PIECE}" for number in range(self.pieces)]


def contents(heard: list[Parts]) -> list[str]:
    said = [choice.delta.content for parts in heard for part in parts for choice in part.value.choices]
    return [content for content in said if content]


def a_cache() -> Cache:
    config = settings_with()
    return Cache(config, MemoryAnswers(10**6), Fingerprints(config))


async def test_nobody_waits_for_one_who_stops_reading_a_long_answer() -> None:
    answer, cache = Long(200), a_cache()
    slow, quick = (cache.through(a_call(), answer.produce) for _ in range(2))
    first = await anext(slow)
    plain = asyncio.create_task(all_of(cache.through(a_call(HELLO), answer.produce)))
    async with asyncio.timeout(10):
        assert contents(await all_of(quick)) == answer.text()
        (whole,) = await plain
    assert answer.said == 200
    assert contents([first, *await all_of(slow)]) == answer.text()
    assert whole[0].value.choices[0].message.content == "".join(answer.text())
    await cache.aclose()


async def test_an_answer_that_nobody_reads_is_not_read_from_the_upstream_either() -> None:
    answer, cache = Long(500), a_cache()
    readers = [cache.through(a_call(), answer.produce) for _ in range(2)]
    first = [await anext(reader) for reader in readers]
    for _ in range(1000):
        await asyncio.sleep(0)
    assert answer.said < 2 * MAX_KEPT_BYTES / len(PIECE)
    rest = await asyncio.gather(*map(all_of, readers))
    assert [contents([one, *more]) for one, more in zip(first, rest, strict=True)] == [answer.text()] * 2
    await cache.aclose()


async def test_one_who_is_very_far_behind_is_waited_for() -> None:
    answer, cache = Long(1300), a_cache()
    slow, quick = (cache.through(a_call(), answer.produce) for _ in range(2))
    await anext(slow)
    reading = asyncio.create_task(all_of(quick))
    for _ in range(5000):
        await asyncio.sleep(0)
    assert answer.said > MAX_BEHIND_BYTES / len(PIECE)
    assert answer.said < (MAX_BEHIND_BYTES + 3 * MAX_KEPT_BYTES) / len(PIECE)
    assert not reading.done()
    await slow.aclose()
    assert len(contents(await reading)) == 1300
    await cache.aclose()


async def test_who_wants_whole_what_is_very_long_has_it_generated_and_the_others_do_not_notice() -> None:
    answer, cache = Long(1300), a_cache()
    streaming = asyncio.create_task(all_of(cache.through(a_call(), answer.produce)))
    await asyncio.sleep(0)
    (whole,) = await all_of(cache.through(a_call(HELLO), answer.produce))
    assert whole[0].value.choices[0].message.content == "Hello"
    assert len(contents(await streaming)) == 1300
    assert answer.said == 1300
    await cache.aclose()
