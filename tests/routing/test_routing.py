"""Which target answers, over real sockets: faults of reliability.md's matrix, and what the client sees of them."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gateway.auth import ANONYMOUS
from gateway.call import Call
from gateway.errors import (
    CredentialRefused,
    InvalidRequest,
    NotServed,
    Overloaded,
    UpstreamError,
    UpstreamFailed,
    UpstreamUnreachable,
)
from gateway.models import Models
from gateway.routing import Router
from gateway.routing.router import MAX_HELD
from gateway.schema.chat import ChatChunk, ChunkChoice, Delta
from gateway.schema.common import Usage
from gateway.schema.endpoint import CHAT
from gateway.schema.payload import Part, Parts
from gateway.schema.reading import read_request
from gateway.settings import Auth, Model, Server, Settings, Target, Timeouts, Upstream
from tests.house import (
    DONE,
    HELLO,
    KEY,
    ROLE,
    USAGE,
    Clock,
    House,
    Received,
    Script,
    ScriptedAdapter,
    UpstreamServer,
    chunk,
    completion,
    event,
    events_of,
    hello_stream,
    json_reply,
    running,
    scripted,
    settings_for,
    stream_reply,
    upstream,
)
from tests.served import until

pytestmark = pytest.mark.anyio

WHOLE: Parts = [
    Part(
        CHAT.answers.decode(json.dumps(completion())),
        json.dumps(completion()).encode(),
        Usage(prompt_tokens=3, completion_tokens=2),
    )
]
QUICK = Timeouts(first_token_s=0.2, idle_s=0.2, connect_s=0.3, total_s=5)
STREAM = HELLO | {"stream": True}
FAILURE = {"error": {"message": "boom", "type": "server_error", "code": None}}


class Pair:
    """A gateway whose model `smart` has two targets, the second of a higher tier; and a model for each alone."""

    def __init__(self, house: House, first: UpstreamServer, second: UpstreamServer, clock: Clock) -> None:
        self.house, self.first, self.second, self.clock = house, first, second, clock

    @property
    def asked(self) -> tuple[int, int]:
        """How often each was asked to generate."""
        counts = [[r for r in up.requests if r.method == "POST"] for up in (self.first, self.second)]
        return len(counts[0]), len(counts[1])


@asynccontextmanager
async def pair(first: Script, second: Script, timeouts: Timeouts = QUICK, **changes: Any) -> AsyncIterator[Pair]:
    async with upstream(first) as one, upstream(second) as two:
        settings = settings_for(one.settings(timeouts=timeouts), two.settings(timeouts=timeouts), **changes)
        clock = Clock()
        async with running(settings, clock=clock) as house:
            yield Pair(house, one, two, clock)


WELL = json_reply(completion("second"))


async def refuses(received: Received, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


def closed_port() -> Upstream:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    return Upstream(adapter="openai", base_url=f"http://127.0.0.1:{port}/v1", timeouts=QUICK)


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(json_reply(FAILURE, 500), id="500"),
        pytest.param(json_reply(FAILURE, 502), id="502"),
        pytest.param(json_reply(FAILURE, 503), id="503"),
        pytest.param(json_reply(FAILURE, 429, retry_after="7"), id="429"),
        pytest.param(json_reply(FAILURE, 401), id="our credential"),
        pytest.param(json_reply(FAILURE, 404), id="no such model there"),
        pytest.param(json_reply({}, 302, location="http://127.0.0.1:1/"), id="a redirect"),
        pytest.param(json_reply(b"<html>"), id="nonsense"),
        pytest.param(refuses, id="a reset"),
    ],
)
async def test_a_failing_target_makes_way_for_the_next(script: Script) -> None:
    async with pair(script, WELL) as both:
        response = await both.house.post()
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["message"]["content"] == "second"
        assert both.asked == (1, 1)


@pytest.mark.parametrize(
    "blocks",
    [
        pytest.param([], id="nothing"),
        pytest.param([event(FAILURE), DONE], id="an error as first event"),
        pytest.param([event({"error": "Model is overloaded", "error_type": "overloaded"})], id="TGI's error"),
        pytest.param([event({"object": "error", "message": "boom", "code": 500})], id="SGLang's error"),
        pytest.param([b": ping\n\n", DONE], id="comments and the end"),
        pytest.param([chunk(ROLE)], id="a role and no more"),
        pytest.param([chunk(ROLE), event(FAILURE)], id="a role, then an error"),
        pytest.param([chunk(ROLE), chunk(None, usage=USAGE), b"data: {oops\n\n"], id="a role, usage, then nonsense"),
        pytest.param([chunk(ROLE), asyncio.Event()], id="a role, then silence"),
        pytest.param([b": ping\n\n", asyncio.Event()], id="comments, then silence"),
    ],
)
async def test_a_stream_that_has_not_said_anything_makes_way_for_another(blocks: list[Any]) -> None:
    async with pair(stream_reply(*blocks), stream_reply(*hello_stream())) as both:
        response = await both.house.post(STREAM)
        assert response.status_code == 200, response.text
        events = events_of(response.content)
        assert [e["choices"][0]["delta"] for e in events[:-1]] == [ROLE, {"content": "Hel"}, {"content": "lo"}, {}]
        assert both.asked == (1, 1)
        if any(isinstance(block, asyncio.Event) for block in blocks):
            async with asyncio.timeout(1):
                await both.first.requests[-1].gone.wait()


async def test_a_role_does_not_stop_the_clock_of_the_first_token() -> None:
    slow = asyncio.Event()
    patient = Timeouts(first_token_s=5, idle_s=0.1)
    async with pair(stream_reply(chunk(ROLE), slow, *hello_stream()[1:]), WELL, patient) as both:
        asyncio.get_running_loop().call_later(0.4, slow.set)
        assert (await both.house.post(STREAM)).status_code == 200
        assert both.asked == (1, 0)


@pytest.mark.parametrize("tail", [[], [event(FAILURE)], [b"data: {oops\n\n"], [asyncio.Event()]])
async def test_nothing_is_retried_after_the_first_content(tail: list[Any]) -> None:
    async with pair(stream_reply(chunk(ROLE), chunk({"content": "Hel"}), *tail), WELL) as both:
        response = await both.house.post(STREAM)
        events = events_of(response.content)
        assert events[1]["choices"][0]["delta"] == {"content": "Hel"}
        assert "error" in events[-1]
        assert both.asked == (1, 0)


@pytest.mark.parametrize(
    "delta", [{"tool_calls": [{"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}]},
              {"reasoning_content": "Hm"}, {"refusal": "No"}],
)  # fmt: skip
async def test_a_call_a_thought_and_a_refusal_are_content(delta: dict[str, Any]) -> None:
    async with pair(stream_reply(chunk(ROLE | delta), cut=True), WELL) as both:
        response = await both.house.post(STREAM)
        assert "error" in events_of(response.content)[-1]
        assert both.asked == (1, 0)


async def test_a_stream_that_was_kept_alive_by_comments_still_moves_on() -> None:
    server = Server(hold_s=0.1, keep_alive_s=0.1)
    silent = stream_reply(chunk(ROLE), asyncio.Event())
    async with pair(silent, stream_reply(*hello_stream()), Timeouts(first_token_s=0.6), server=server) as both:
        response = await both.house.post(STREAM)
        assert response.content.startswith(b": keep-alive")
        assert [e["choices"][0]["delta"] for e in events_of(response.content)[:-1]][1] == {"content": "Hel"}
        assert both.asked == (1, 1)


async def test_a_clients_mistake_is_one_wherever_it_is_sent() -> None:
    wrong = json_reply({"error": {"message": "bad temperature", "type": "invalid_request_error", "code": None}}, 400)
    async with pair(wrong, WELL) as both:
        for _ in range(7):
            assert (await both.house.post()).status_code == 400
        assert both.asked == (7, 0)
        both.first.script = json_reply(completion("first"))
        assert (await both.house.post()).json()["choices"][0]["message"]["content"] == "first"


async def test_a_target_that_keeps_failing_is_left_alone_and_comes_back() -> None:
    async with pair(json_reply(FAILURE, 500), WELL) as both:
        for _ in range(8):
            assert (await both.house.post()).status_code == 200
        assert both.asked == (5, 8)
        both.first.script = json_reply(completion("first"))
        both.clock.now += 11
        assert (await both.house.post()).json()["choices"][0]["message"]["content"] == "first"
        assert (await both.house.post()).json()["choices"][0]["message"]["content"] == "first"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_in_between_forgives_the_failures_before_it(stream: bool) -> None:
    well = stream_reply(*hello_stream()) if stream else WELL
    async with pair(json_reply(FAILURE, 500), well) as both:
        for _ in range(3):
            for _ in range(4):
                assert (await both.house.post(HELLO | {"stream": stream})).status_code == 200
            both.first.script = well
            assert (await both.house.post(HELLO | {"stream": stream})).status_code == 200
            both.first.script = json_reply(FAILURE, 500)
        assert both.asked == (15, 12)


async def test_a_target_whose_streams_never_end_properly_is_left_alone() -> None:
    unfinished = stream_reply(chunk(ROLE), chunk({"content": "Hel"}), DONE)
    async with pair(unfinished, stream_reply(*hello_stream())) as both:
        for _ in range(5):
            assert "error" in events_of((await both.house.post(STREAM)).content)[-1]
        assert events_of((await both.house.post(STREAM)).content)[-1] == "[DONE]"
        assert both.asked == (5, 1)


async def test_a_wrong_credential_is_said_aloud_and_asked_no_more(caplog: pytest.LogCaptureFixture) -> None:
    async with pair(json_reply(FAILURE, 401), WELL) as both:
        for _ in range(3):
            assert (await both.house.post()).status_code == 200
        assert both.asked == (1, 3)
        loud = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert loud == ["upstream upstream-1 refuses this gateway's credential for model-1: mend its api_key"]
        metrics = (await both.house.http.get(f"{both.house.url}/metrics")).text
        assert 'suiron_target_ejections_total{reason="credential",target="upstream-1/model-1"} 1.0' in metrics
        assert 'suiron_retries_total{target="upstream-1/model-1"} 1.0' in metrics
        assert 'suiron_target_up{target="upstream-1/model-1"} 0.0' in metrics
        assert 'suiron_target_up{target="upstream-2/model-2"} 1.0' in metrics


async def test_a_target_that_says_when_to_come_back_is_not_asked_before() -> None:
    async with pair(json_reply(FAILURE, 503, retry_after="9"), WELL) as both:
        for _ in range(3):
            assert (await both.house.post()).status_code == 200
        assert both.asked == (1, 3)
        both.clock.now += 9.1
        await both.house.post()
        assert both.asked == (2, 4)


async def test_where_all_are_busy_the_client_is_told_when_to_come_back() -> None:
    busy = json_reply(FAILURE, 429, retry_after="9")
    async with pair(busy, busy) as both:
        first, second = await both.house.post(), await both.house.post()
        assert (first.status_code, first.json()["error"]["code"]) == (503, "overloaded")
        assert (second.status_code, second.json()["error"]["code"]) == (503, "overloaded")
        assert first.headers["retry-after"] == second.headers["retry-after"] == "9"
        assert both.asked == (1, 1)


async def test_where_nobody_listens_the_error_comes_at_once() -> None:
    settings = settings_for(closed_port(), closed_port(), closed_port())
    async with running(settings) as house, asyncio.timeout(1):
        response = await house.post()
        assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_connect_error")


async def test_all_ejected_one_healed_it_is_found_again_within_a_second() -> None:
    async with pair(json_reply(FAILURE, 500), json_reply(FAILURE, 500)) as both:
        for _ in range(12):
            assert (await both.house.post()).status_code == 502
        both.first.script = json_reply(completion("first"))
        both.clock.now += 1
        assert (await both.house.post()).json()["choices"][0]["message"]["content"] == "first"


async def test_sdks_are_told_not_to_try_again_what_was_tried_everywhere() -> None:
    async with pair(json_reply(FAILURE, 500), json_reply(FAILURE, 500)) as both:
        response = await both.house.post()
        assert (response.status_code, response.headers["x-should-retry"]) == (502, "false")
    async with upstream(json_reply(FAILURE, 500)) as one, running(settings_for(one.settings())) as house:
        assert "x-should-retry" not in (await house.post()).headers
        one.script = json_reply(FAILURE, 403)
        assert (await house.post()).headers["x-should-retry"] == "false"


async def test_a_request_is_begun_three_times_at_most() -> None:
    broken = json_reply(FAILURE, 500)
    async with upstream(broken) as one, running(settings_for(*(one.settings() for _ in range(5)))) as house:
        assert (await house.post()).status_code == 502
        assert len([received for received in one.requests if received.method == "POST"]) == 3


async def test_retries_of_many_failing_requests_are_bounded() -> None:
    """Of 20 that fail at once, a fifth may move on: 24 attempts in all."""
    arrived = 0
    everybody, settled = asyncio.Event(), asyncio.Event()

    async def fail_together(received: Received, writer: asyncio.StreamWriter) -> None:
        nonlocal arrived
        if received.method == "POST":
            arrived += 1
            if arrived == 20:
                everybody.set()
            await everybody.wait()
        await json_reply(FAILURE, 500)(received, writer)

    async def fail_late(received: Received, writer: asyncio.StreamWriter) -> None:
        if received.method == "POST":
            await settled.wait()
        await json_reply(FAILURE, 500)(received, writer)

    async with pair(fail_together, fail_late) as both:
        asking = [asyncio.ensure_future(both.house.post()) for _ in range(20)]
        for first_done in asyncio.as_completed(asking):
            await first_done
            if sum(answer.done() for answer in asking) >= 16:
                settled.set()
        assert {answer.result().status_code for answer in asking} == {502}
        assert both.asked == (20, 4)
        metrics = (await both.house.http.get(f"{both.house.url}/metrics")).text
        assert 'suiron_retries_refused_total{target="upstream-1/model-1"} 16.0' in metrics


async def test_a_target_takes_no_more_than_its_room() -> None:
    go, both_there = asyncio.Event(), asyncio.Event()
    there = 0

    async def wait(received: Received, writer: asyncio.StreamWriter) -> None:
        nonlocal there
        if received.method == "POST":
            there += 1
            if there == 2:
                both_there.set()
            await go.wait()
        await json_reply(completion())(received, writer)

    async with upstream(wait) as one:
        target = Target(upstream="one", max_in_flight=2)
        settings = Settings(
            auth=Auth(keys=[KEY]), upstreams={"one": one.settings()}, models={"smart": Model(targets=[target])}
        )
        async with running(settings) as house:
            asking = [asyncio.ensure_future(house.post()) for _ in range(2)]
            await both_there.wait()
            refused = await house.post()
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
            assert refused.headers["retry-after"] == "1"
            go.set()
            assert [(await answer).status_code for answer in asking] == [200, 200]
            assert (await house.post()).status_code == 200


async def test_the_weights_share_out_the_requests_of_a_tier() -> None:
    async with upstream(json_reply(completion("a"))) as one, upstream(json_reply(completion("b"))) as two:
        targets = [Target(upstream="one", weight=3), Target(upstream="two", weight=1)]
        settings = Settings(
            auth=Auth(keys=[KEY]),
            upstreams={"one": one.settings(), "two": two.settings()},
            models={"smart": Model(targets=targets)},
        )
        async with running(settings) as house:
            for _ in range(60):
                await house.post()
        posts = [len([r for r in up.requests if r.method == "POST"]) for up in (one, two)]
        assert sum(posts) == 60
        assert posts[0] > posts[1] > 0


CANNOT = InvalidRequest("Not here.", param="tools", code="unsupported_parameter")


async def test_who_cannot_do_what_is_asked_is_skipped_and_has_not_failed() -> None:
    unable, able = ScriptedAdapter(CANNOT), ScriptedAdapter(WHOLE)
    async with scripted(unable, able) as house:
        for _ in range(7):
            assert (await house.post()).status_code == 200
    assert (unable.calls, able.calls) == (7, 7)


async def test_what_none_can_do_is_the_clients_mistake_and_named() -> None:
    async with scripted(ScriptedAdapter(CANNOT), ScriptedAdapter(CANNOT)) as house:
        response = await house.post()
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")


async def test_one_that_fails_where_another_cannot_is_the_upstreams_fault() -> None:
    async with scripted(ScriptedAdapter(UpstreamFailed("boom")), ScriptedAdapter(CANNOT)) as house:
        assert (await house.post()).status_code == 502


async def test_connect_errors_are_no_generations() -> None:
    dead = [ScriptedAdapter(UpstreamUnreachable("nobody")) for _ in range(3)]
    alive = ScriptedAdapter(WHOLE)
    async with scripted(*dead, alive) as house:
        assert (await house.post()).status_code == 200
    assert [adapter.calls for adapter in (*dead, alive)] == [1, 1, 1, 1]


async def test_who_cannot_connect_moves_on_however_many_they_are() -> None:
    all_there = asyncio.Event()
    dead, alive = ScriptedAdapter(UpstreamUnreachable("nobody")), ScriptedAdapter(all_there, WHOLE)
    async with scripted(dead, alive) as house:
        asking = [asyncio.ensure_future(house.post()) for _ in range(40)]
        await until(lambda: alive.calls == 40)
        all_there.set()
        assert {(await answer).status_code for answer in asking} == {200}


@pytest.mark.parametrize(
    ("error", "said"), [(CredentialRefused(), "mend its api_key"), (NotServed(), "mend the target's model")]
)
async def test_what_no_waiting_mends_is_an_error_in_the_log_once_a_minute(
    error: UpstreamError, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with scripted(ScriptedAdapter(error)) as house:
        for _ in range(3):
            assert (await house.post()).status_code == 502
    errors = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert said in errors[0]


async def test_the_abandoned_attempt_is_closed_and_on_record_with_what_it_cost() -> None:
    first, second = ScriptedAdapter(role(tokens=4), UpstreamFailed("boom")), ScriptedAdapter(WHOLE)
    call = Call(CHAT, ANONYMOUS, *read_request(CHAT, json.dumps(STREAM).encode()))
    settings = settings_for(Upstream(adapter="scripted"), Upstream(adapter="scripted"))
    model = Models(settings, {"upstream-1": first, "upstream-2": second}).get("smart", ANONYMOUS)
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    router = Router(settings.upstreams, Silent(), draw=lambda: 0.5, sleep=sleep)
    assert [parts async for parts in router.answer(call, model.targets_for(CHAT))] == [WHOLE]
    abandoned, answered = call.attempts
    assert (type(abandoned.error), abandoned.answered, answered.error, answered.answered) == (
        UpstreamFailed,
        False,
        None,
        True,
    )
    assert abandoned.usage is not None
    assert abandoned.usage.completion_tokens == 4
    assert call.started <= abandoned.started <= abandoned.ended <= answered.started <= answered.ended
    assert [dispatch.attempt for dispatch in (*first.dispatches, *second.dispatches)] == [1, 2]
    assert (first.closed, second.closed) == (1, 1)
    assert pauses == [0.025]
    assert (router.in_flight, router.retrying) == (0, 0)
    assert [(standing.state, standing.in_flight) for standing in router.standings()] == [("up", 0), ("up", 0)]


async def test_all_attempts_share_one_deadline() -> None:
    quick, slow = (
        Upstream(adapter="s", timeouts=Timeouts(total_s=5)),
        Upstream(adapter="s", timeouts=Timeouts(total_s=50)),
    )
    first, second = ScriptedAdapter(UpstreamUnreachable("")), ScriptedAdapter(WHOLE)
    settings = settings_for(slow, quick)
    model = Models(settings, {"upstream-1": first, "upstream-2": second}).get("smart", ANONYMOUS)
    call = Call(CHAT, ANONYMOUS, *read_request(CHAT, json.dumps(HELLO).encode()))
    router = Router(settings.upstreams, Silent())
    began = asyncio.get_running_loop().time()
    assert [parts async for parts in router.answer(call, model.targets_for(CHAT))] == [WHOLE]
    deadlines = [dispatch.deadline - began for dispatch in (*first.dispatches, *second.dispatches)]
    assert deadlines == [pytest.approx(50, abs=1), pytest.approx(5, abs=1)]


async def test_a_client_that_leaves_gives_back_all_it_held() -> None:
    call = Call(CHAT, ANONYMOUS, *read_request(CHAT, json.dumps(STREAM).encode()))
    failing, endless = ScriptedAdapter(UpstreamFailed("")), ScriptedAdapter(WHOLE, asyncio.Event())
    settings = settings_for(Upstream(adapter="scripted"), Upstream(adapter="scripted"))
    model = Models(settings, {"upstream-1": failing, "upstream-2": endless}).get("smart", ANONYMOUS)
    router = Router(settings.upstreams, Silent())
    answer = router.answer(call, model.targets_for(CHAT))
    assert await anext(answer) == WHOLE
    assert (router.in_flight, router.retrying, [s.in_flight for s in router.standings()]) == (1, 1, [0, 1])
    await answer.aclose()
    assert (router.in_flight, router.retrying, [s.in_flight for s in router.standings()]) == (0, 0, [0, 0])
    assert endless.closed == 1


async def test_what_is_held_back_is_bounded() -> None:
    endless = ScriptedAdapter(*(role(tokens=1) for _ in range(MAX_HELD + 5)), UpstreamFailed("boom"))
    spare = ScriptedAdapter(WHOLE)
    async with scripted(endless, spare) as house:
        events = events_of((await house.post(STREAM)).content)
    assert "error" in events[-1]
    assert spare.calls == 0


async def test_a_full_target_does_not_eat_the_retries_of_all() -> None:
    full, free = ScriptedAdapter(Overloaded("full")), ScriptedAdapter(WHOLE)
    async with scripted(full, free) as house:
        for _ in range(20):
            assert (await house.post()).status_code == 200
    assert (full.calls, free.calls) == (1, 20)


def test_a_request_takes_its_retries_with_it() -> None:
    router = Router({}, Silent())
    router.in_flight = 10
    assert [router.may_retry() for _ in range(4)] == [True, True, True, False]
    router.in_flight = 100
    assert sum(router.may_retry() for _ in range(100)) == 17


def role(tokens: int) -> Parts:
    chunk = ChatChunk(choices=[ChunkChoice(delta=Delta(role="assistant", content=""))])
    return [Part.encode(chunk, Usage(prompt_tokens=3, completion_tokens=tokens))]


class Silent:
    def retried(self, target: str) -> None: ...

    def no_retry_left(self, target: str) -> None: ...

    def ejected(self, target: str, reason: str) -> None: ...
