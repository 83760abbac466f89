"""What becomes of an answer whose engine fails, stutters or falls silent? All of it comes, or the SDK raises."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import httpx2
import openai
import pytest

from gateway.settings import Auth, Model, Settings, Target, Timeouts
from tests.conformance.conftest import DIALECTS, Contestant
from tests.house import KEY, Clock, Received, events_of, running
from tests.replay import Faults, Player, playing

pytestmark = pytest.mark.anyio

TEXT = "推論 👋🏽 it is."
HASTY = Timeouts(first_token_s=0.3, idle_s=0.15, total_s=5)
ENDPOINTS = ["chat/completions", "completions"]
AT_ONCE = 40

both = pytest.mark.parametrize("path", ENDPOINTS)


@pytest.fixture(scope="module")
async def engines() -> AsyncIterator[dict[str, Contestant]]:
    """Under its own name an engine is waited for; under `hasty-` and that, not for long."""
    async with AsyncExitStack() as stack:
        players = {name: await stack.enter_async_context(playing(kind())) for name, kind in DIALECTS.items()}
        players |= {f"hasty-{name}": player for name, player in players.items()}
        upstreams = {
            name: player.settings(HASTY if name.startswith("hasty-") else None) for name, player in players.items()
        }
        models = {name: Model(targets=[Target(upstream=name, model="model-1")]) for name in upstreams}
        settings = Settings(auth=Auth(keys=[KEY]), upstreams=upstreams, models=models)
        clock = Clock()
        house = await stack.enter_async_context(running(settings, clock=clock))
        yield {name: Contestant(name, house, player, clock) for name, player in players.items()}


@pytest.fixture(params=list(DIALECTS))
def engine(request: pytest.FixtureRequest, engines: dict[str, Contestant]) -> Contestant:
    engines[request.param].clock.now += 1000  # what it did in an earlier test is forgotten
    return engines[request.param]


@pytest.fixture
def hasty(engine: Contestant, engines: dict[str, Contestant]) -> Contestant:
    return engines[f"hasty-{engine.name}"]


@pytest.fixture
def player(engine: Contestant) -> Player:
    assert engine.player is not None
    engine.player.forget()
    return engine.player


def asks(engine: Contestant, path: str, text: str = TEXT, **changes: Any) -> Any:
    if path == "completions":
        return {"model": engine.name, "prompt": text, "max_tokens": 60, "temperature": 0, **changes}
    return engine.asks(text, **changes)


async def post(engine: Contestant, path: str, text: str = TEXT, **changes: Any) -> httpx2.Response:
    return await engine.house.post(asks(engine, path, text, **changes), path)


class Transcript:
    """What a client read: its text, and how that ended."""

    def __init__(self, response: httpx2.Response) -> None:
        self.status = response.status_code
        self.error: Any = None
        self.text, self.finish = "", None
        if self.status != 200:
            self.error = json.loads(response.content)["error"]
            return
        events = events_of(response.content)
        self.is_done = events[-1] == "[DONE]"
        for event in events:
            if event != "[DONE]" and "error" in event:
                self.error = event["error"]
            elif event != "[DONE]":
                for choice in event["choices"]:
                    self.text += (choice["delta"].get("content") or "") if "delta" in choice else choice["text"]
                    self.finish = choice["finish_reason"] or self.finish
        assert self.is_done == (self.error is None)

    @property
    def is_whole(self) -> bool:
        return self.error is None and (self.text, self.finish) == (TEXT, "stop")


async def transcripts(
    engine: Contestant, path: str, orders: list[Faults], text: str = TEXT, **changes: Any
) -> list[Transcript]:
    """One for each of *orders*, many at a time: each request says which is its own, by its number as the seed."""

    def faults_of(received: Received) -> Faults | None:
        number = re.search(rb'"seed":(\d+)', received.body)
        return orders[int(number[1])] if number else None

    assert engine.player is not None
    engine.player.faults_of = faults_of
    numbers = range(len(orders))
    found = []
    for start in range(0, len(orders), AT_ONCE):
        batch = numbers[start : start + AT_ONCE]
        responses = await asyncio.gather(
            *(post(engine, path, text, stream=True, seed=each, **changes) for each in batch)
        )
        found += [Transcript(response) for response in responses]
    return found


async def length_of_an_answer(engine: Contestant, path: str) -> int:
    """In bytes on the wire, head and framing too."""
    await post(engine, path, stream=True)
    assert engine.player is not None
    return engine.player.length


def check_error(error: Any) -> None:
    assert set(error) == {"message", "type", "param", "code"}
    assert not re.search(r"127\.0\.0\.1|Traceback|CUDA|EngineCore", error["message"])


every = pytest.mark.parametrize(
    "step", [17, pytest.param(1, marks=pytest.mark.slow)], ids=["every 17th byte", "every byte"]
)


@both
@every
async def test_an_answer_may_be_split_anywhere(engine: Contestant, player: Player, path: str, step: int) -> None:
    length = await length_of_an_answer(engine, path)
    orders = [Faults(split_at=at) for at in range(1, length, step)]
    orders += [Faults(split=1), Faults(split=2), Faults(split=7)]
    for transcript in await transcripts(engine, path, orders):
        assert transcript.is_whole


@both
@every
@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
async def test_a_stream_that_is_cut_off_is_an_error(
    engine: Contestant, player: Player, path: str, reset: bool, step: int
) -> None:
    """A status before the first token, an error event after; the whole only where all of it had come."""
    length = await length_of_an_answer(engine, path)
    orders = [Faults(cut_at=at, reset=reset) for at in range(0, length, step)]
    cut = await transcripts(engine, path, orders)
    for transcript in cut:
        assert TEXT.startswith(transcript.text)
        if not transcript.is_whole:
            assert transcript.status in (200, 502)
            assert transcript.error["type"] == "server_error"
            check_error(transcript.error)
    assert {transcript.status for transcript in cut} == {200, 502}
    assert sum(transcript.is_whole for transcript in cut) < len(cut) / 3


@both
async def test_a_generation_that_fails_on_the_way_ends_in_an_error_event(
    engine: Contestant, player: Player, path: str
) -> None:
    orders = [Faults(fail_after=tokens) for tokens in range(6)]
    for transcript in await transcripts(engine, path, orders):
        assert TEXT.startswith(transcript.text)
        assert not transcript.is_whole
        check_error(transcript.error)


async def test_the_sdk_raises_at_the_end_of_a_cut_stream(engine: Contestant, player: Player) -> None:
    for faults in (Faults(cut_at=await length_of_an_answer(engine, ENDPOINTS[0]) // 2), Faults(fail_after=4)):
        player.faults = faults
        with pytest.raises(openai.APIError) as caught:
            await engine.chunks(TEXT)
        assert caught.value.code == "upstream_error"
        with pytest.raises(openai.APIError):
            async with engine.house.openai.chat.completions.stream(**engine.asks(TEXT)) as helper:
                await helper.get_final_completion()


@both
@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_engine_is_a_503_that_says_when_to_come_back(
    engine: Contestant, player: Player, path: str, stream: bool
) -> None:
    player.faults = Faults(busy=True)
    response = await post(engine, path, stream=stream)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
    said = engine.name in ("openai", "transformers")
    assert response.headers["retry-after"] == ("2" if said else "1")
    check_error(response.json()["error"])


@both
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("faults", "status"),
    [
        (Faults(freeze="head"), 504),
        (Faults(freeze="body"), 504),
        (Faults(comments=True), 504),
        (Faults(status=502), 502),
        (Faults(garbage=b"data: {\xff\n\n"), 502),
        (Faults(garbage=b"data: [1, 2]\n\n"), 502),
        (Faults(cut_at=0), 502),
    ],
    ids=["frozen", "frozen behind its head", "comments only", "502", "no JSON", "not an object", "closed at once"],
)
async def test_before_the_first_token_a_failure_is_a_status(
    hasty: Contestant, player: Player, path: str, stream: bool, faults: Faults, status: int
) -> None:
    if status == 504 and not stream:
        return  # only the whole answer has a deadline then
    player.faults = faults
    response = await post(hasty, path, stream=stream)
    assert response.status_code == status
    check_error(response.json()["error"])
    if status == 504:
        async with asyncio.timeout(5):
            await player.requests[-1].gone.wait()


@both
@pytest.mark.parametrize("tokens", [1, 5])
async def test_an_engine_that_falls_silent_ends_the_stream_with_an_error_event(
    hasty: Contestant, player: Player, path: str, tokens: int
) -> None:
    player.faults = Faults(freeze_after=tokens)
    transcript = Transcript(await post(hasty, path, stream=True))
    assert transcript.error["code"] == "upstream_timeout"
    assert TEXT.startswith(transcript.text)
    async with asyncio.timeout(5):
        await player.requests[-1].gone.wait()


@both
async def test_a_stream_without_a_finish_reason_is_not_taken_for_whole(
    engine: Contestant, player: Player, path: str
) -> None:
    player.faults = Faults(without=frozenset({"finish"}))
    transcript = Transcript(await post(engine, path, stream=True))
    assert transcript.error["code"] == "upstream_error"
    response = await post(engine, path)
    assert response.status_code == 502


@both
async def test_a_stream_that_was_finished_needs_no_done(engine: Contestant, player: Player, path: str) -> None:
    player.faults = Faults(without=frozenset({"done"}))
    assert Transcript(await post(engine, path, stream=True)).is_whole


@both
@pytest.mark.parametrize(
    "faults", [Faults(without=frozenset({"usage"})), Faults(usage="negative"), Faults(usage="everywhere")]
)
async def test_whatever_usage_an_engine_tells_the_text_is_whole_and_the_usage_adds_up(
    engine: Contestant, player: Player, path: str, faults: Faults
) -> None:
    player.faults = faults
    assert Transcript(await post(engine, path, stream=True)).is_whole
    *unasked, _ = events_of((await post(engine, path, stream=True)).content)
    assert not any("usage" in event for event in unasked)
    asked = events_of((await post(engine, path, stream=True, stream_options={"include_usage": True})).content)
    told = [event["usage"] for event in asked[:-1] if event["usage"] is not None]
    for usage in [*told, *filter(None, [(await post(engine, path)).json().get("usage")])]:
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert min(usage["prompt_tokens"], usage["completion_tokens"]) >= 0
    assert len(told) <= 1


async def test_a_slow_engine_is_waited_for(engine: Contestant, player: Player) -> None:
    player.faults = Faults(delay_s=0.01)
    assert Transcript(await post(engine, ENDPOINTS[0], stream=True)).is_whole


async def test_an_engine_is_asked_again_after_it_has_failed(engine: Contestant, player: Player) -> None:
    player.faults = Faults(cut_at=0, reset=True)
    for _ in range(3):
        assert (await post(engine, ENDPOINTS[0])).status_code == 502
    player.forget()
    assert (await post(engine, ENDPOINTS[0])).status_code == 200
