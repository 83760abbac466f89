"""Does a streamed chat completion through the gateway look to the OpenAI SDK as one from OpenAI does?"""

import asyncio
import json
from typing import Any

import anyio.to_thread
import openai
import pytest
from openai import OpenAI

from gateway.settings import Server, Timeouts
from tests.api.conftest import Stage
from tests.api.test_chat import CALL, HERE, TEXTS, Weather, error
from tests.house import (
    DONE,
    HELLO,
    ROLE,
    TOKEN,
    USAGE,
    Received,
    Script,
    chunk,
    completion,
    event,
    events_of,
    head,
    hello_stream,
    json_reply,
    running,
    settings_for,
    stream_reply,
    upstream,
)

pytestmark = pytest.mark.anyio

STREAM: Any = HELLO | {"stream": True}
ASK_USAGE: dict[str, Any] = {"stream_options": {"include_usage": True}}
STOP = chunk({}, "stop")


def said(events: list[Any], index: int = 0) -> str:
    """The text of a choice."""
    chunks = [event for event in events if isinstance(event, dict)]
    found = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content") or "" for choice in found)


# The SDK.


async def test_the_async_sdk_reads_a_stream_chunk_by_chunk(stage: Stage) -> None:
    stage.first.script = stream_reply(*hello_stream())
    stream = await stage.house.openai.chat.completions.create(**STREAM)
    assert stream.response.headers["x-request-id"].startswith("req_")
    assert stream.response.headers["openai-version"] == "2020-10-01"
    assert int(stream.response.headers["openai-processing-ms"]) >= 0
    assert stream.response.headers["cache-control"] == "no-cache"
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "Hello"


async def test_the_sync_sdk_reads_a_stream_and_a_raw_one(stage: Stage) -> None:
    stage.first.script = stream_reply(*hello_stream())

    def ask() -> tuple[str, str]:
        with OpenAI(base_url=f"{stage.house.url}/v1", api_key=TOKEN, max_retries=0) as client:
            plain = "".join(chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**STREAM))
            with client.chat.completions.with_streaming_response.create(**STREAM) as response:
                return plain, "".join(line for line in response.iter_lines() if '"content":"lo"' in line)

    plain, line = await anyio.to_thread.run_sync(ask)
    assert plain == "Hello"
    assert line.startswith("data: {")


async def test_the_stream_helper_accumulates_interleaved_choices_in_any_order(stage: Stage) -> None:
    stage.first.script = stream_reply(
        chunk({"role": "assistant", "content": "b"}, index=1),
        chunk(ROLE, index=2),
        chunk(ROLE),
        chunk({"content": "a"}),
        chunk({"content": "B"}, index=1),
        chunk({}, "stop", index=1),
        chunk({"content": "A"}),
        chunk({}, "stop", index=2),
        STOP,
        chunk(None, usage=USAGE),
        DONE,
    )
    async with stage.house.openai.chat.completions.stream(**HELLO, n=3, stream_options={"include_usage": True}) as s:
        final = await s.get_final_completion()
    assert [choice.message.content for choice in final.choices] == ["aA", "bB", ""]
    assert [choice.finish_reason for choice in final.choices] == ["stop"] * 3
    assert [choice.message.role for choice in final.choices] == ["assistant"] * 3
    assert final.usage is not None
    assert final.usage.total_tokens == 5


async def test_the_stream_helper_accumulates_and_parses_tool_calls(stage: Stage) -> None:
    def call(index: int, **members: Any) -> bytes:
        return chunk({"tool_calls": [{"index": index, **members}]})

    name: Any = {"name": "Weather", "arguments": ""}
    bare: Any = {"id": None, "type": None}  # as some servers send them
    stage.first.script = stream_reply(
        chunk({"role": "assistant", "content": None}),
        call(0, id="call_1", type="function", function=name),
        call(0, function={"arguments": '{"city":"東京",'}),
        call(0, **bare, function={"name": None, "arguments": '"celsius":3}'}),
        call(1, id="call_2", type="function", function=name),
        call(1, function={"arguments": CALL["function"]["arguments"]}),  # type: ignore[index]
        chunk({}, "tool_calls"),
        DONE,
    )
    tools = [openai.pydantic_function_tool(Weather)]
    async with stage.house.openai.chat.completions.stream(**HELLO, tools=tools) as stream:
        final = await stream.get_final_completion()
    calls = final.choices[0].message.tool_calls or []
    assert [(call.id, call.type, call.function.name) for call in calls] == [
        ("call_1", "function", "Weather"),
        ("call_2", "function", "Weather"),
    ]
    parsed = [call.function.parsed_arguments for call in calls]
    assert parsed == [Weather(city="東京", celsius=3), Weather(city="Zürich", celsius=3)]
    assert final.choices[0].finish_reason == "tool_calls"


# The chunks, to the letter.


@pytest.mark.parametrize("asked", [False, True])
async def test_a_stream_is_role_text_finish_usage_done(stage: Stage, asked: bool) -> None:
    events = await stage.events(stream_reply(*hello_stream()), **(ASK_USAGE if asked else {}))
    first = events[0]
    envelope = {name: first[name] for name in ("id", "created")}
    envelope |= {"object": "chat.completion.chunk", "model": "smart"} | ({"usage": None} if asked else {})

    def one(delta: Any, finish: str | None = None) -> Any:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return envelope | {"choices": [choice]}

    usage = [envelope | {"choices": [], "usage": USAGE}] if asked else []
    assert events == [
        one(ROLE),
        one({"content": "Hel"}),
        one({"content": "lo"}),
        one({}, "stop"),
        *usage,
        "[DONE]",
    ]
    assert first["id"].startswith("chatcmpl-")
    assert (type(first["created"]), first["created"] > 17) == (int, True)
    assert stage.sent["stream_options"] == {"include_usage": True}


async def test_usage_that_no_upstream_tells_is_our_own_count(stage: Stage) -> None:
    told_nothing = [event for event in hello_stream() if b'"usage"' not in event]
    *chunks, last, done = await stage.events(stream_reply(*told_nothing), **ASK_USAGE)
    usage = last["usage"]
    assert (last["choices"], done) == ([], "[DONE]")
    assert all(each["usage"] is None for each in chunks)
    assert usage["completion_tokens"] == 2, "a token for each piece"
    assert usage["prompt_tokens"] > 0
    assert usage["total_tokens"] == usage["prompt_tokens"] + 2


@pytest.mark.parametrize("tier", [None, "flex"])
async def test_every_chunk_names_the_tier_to_who_asked_for_one(stage: Stage, tier: str | None) -> None:
    chunks = [chunk({"content": text}, service_tier=tier) for text in ("a", "b", "c")]
    script = stream_reply(*chunks, chunk({}, "stop", service_tier=tier), DONE)
    *events, _ = await stage.events(script, **ASK_USAGE, service_tier="auto")
    assert {each.get("service_tier") for each in events} == {tier or "default"}
    *events, _ = await stage.events(script)
    assert {each.get("service_tier") for each in events} == {tier}


async def test_every_stream_has_an_id_of_its_own(stage: Stage) -> None:
    streams = [await stage.events(stream_reply(*hello_stream())) for _ in range(5)]
    assert len({events[0]["id"] for events in streams}) == 5


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("escaped", [False, True], ids=["utf-8", "escapes"])
async def test_text_arrives_as_it_was_sent_wherever_the_network_cuts_it(stage: Stage, text: str, escaped: bool) -> None:
    events = [chunk(ROLE), *(chunk({"content": char}) for char in text), chunk({"content": text}), STOP]
    if escaped:
        events = [b"data: " + json.dumps(json.loads(each[6:])).encode() + b"\n\n" for each in events]
    body = b"".join(events)
    stage.first.script = stream_reply(*(body[at : at + 101] for at in range(0, len(body), 101)))
    stream = await stage.house.openai.chat.completions.create(**STREAM)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == text * 2


def named(**changes: Any) -> bytes:
    """A chunk of its own making; a member that is `...` is left out."""
    whole = json.loads(chunk({"content": "x"})[6:]) | changes
    return event({name: value for name, value in whole.items() if value is not ...})


def without(name: str, delta: dict[str, Any] | None = None) -> bytes:
    """A chunk whose choice lacks a member."""
    choice = {"index": 0, "delta": delta or {"content": "x"}, "logprobs": None, "finish_reason": None}
    del choice[name]
    return named(choices=[choice])


def text(content: str = "x", **members: Any) -> bytes:
    return chunk({"content": content, **members})


ENGINES = {
    "role in every chunk": [
        *(chunk({"role": "assistant", "content": char}) for char in "xxx"),
        chunk({"role": "assistant", "content": ""}, "stop"),
        DONE,
    ],
    "no finish_reason until the end, usage on the last chunk, no DONE": [
        without("finish_reason", ROLE),
        *[without("finish_reason")] * 3,
        chunk({}, "stop", usage=USAGE),
    ],
    "usage on every chunk": [
        chunk(ROLE, usage=USAGE | {"completion_tokens": 0}),
        *[chunk({"content": "x"}, usage=USAGE | {"completion_tokens": 1})] * 3,
        chunk({}, "stop", usage=USAGE),
        DONE,
    ],
    "usage null on every chunk": [
        chunk(ROLE, usage=None),
        *[chunk({"content": "x"}, usage=None)] * 3,
        chunk({}, "stop", usage=None),
        chunk(None, usage=USAGE),
        DONE,
    ],
    "an empty finish_reason": [chunk(ROLE, ""), *[chunk({"content": "x"}, "")] * 3, STOP, DONE],
    "chunks without choices": [
        chunk(None, prompt_filter_results=[]),
        chunk(ROLE),
        chunk(None),
        *[text()] * 3,
        STOP,
        chunk(None),
        DONE,
    ],
    "more choices than were asked for": [
        chunk(ROLE),
        chunk(ROLE, index=1),
        *[text()] * 3,
        chunk({"content": "y"}, index=1),
        chunk({}, "stop", index=1),
        STOP,
        DONE,
    ],
    "a chunk after the end": [chunk(ROLE), *[text()] * 3, STOP, text(), STOP, DONE],
    "no role, and no empty first chunk": [*[text()] * 3, STOP, DONE],
    "text in the first and the last chunk": [
        chunk({"role": "assistant", "content": "x"}),
        text(),
        chunk({"content": "x"}, "stop"),
        DONE,
    ],
    "no index": [without("index", ROLE), *[without("index")] * 3, STOP, DONE],
    "nulls of its own": [
        chunk(ROLE, prompt_token_ids=None),
        *[text(tool_calls=None, function_call=None, reasoning_content=None, role=None)] * 3,
        chunk({"tool_calls": None}, "stop", system_fingerprint=None),
        DONE,
    ],
    "nulls that come late": [
        chunk(ROLE),
        text(),
        chunk({"content": "x", "tool_calls": None}, system_fingerprint=None),
        text(),
        STOP,
        DONE,
    ],
    "obfuscation": [
        chunk(ROLE, obfuscation="a"),
        *[chunk({"content": "x"}, obfuscation="bcd")] * 3,
        chunk({}, "stop", obfuscation=""),
        DONE,
    ],
    "another created and id in each chunk": [
        named(created=number, id=f"x{number}", choices=json.loads(each[6:])["choices"])
        for number, each in enumerate([chunk(ROLE), *[text()] * 3, STOP])
    ],
    "no envelope": [
        named(id=..., object=..., created=..., model=..., choices=json.loads(each[6:])["choices"])
        for each in [chunk(ROLE), *[text()] * 3, STOP]
    ],
    "a text_completion object, and model first": [
        event({"model": "m", "object": "text_completion", "choices": json.loads(each[6:])["choices"], "id": ""})
        for each in [chunk(ROLE), *[text()] * 3, STOP]
    ],
    "JSON over several lines": [
        b"data: " + json.dumps(json.loads(each[6:]), indent=1).replace("\n", "\ndata: ").encode() + b"\n\n"
        for each in [chunk(ROLE), *[text()] * 3, STOP]
    ],
    "comments and event names": [
        b": ping\n\nevent: message\n" + chunk(ROLE).replace(b"data: ", b"data:"),
        *[b"event: x\nid: 7\nretry: 3\n" + text()] * 3,
        b":\n\n" + STOP.replace(b"\n", b"\r\n"),
        b"data: [DONE] \n\n",
    ],
}


@pytest.mark.parametrize("asked", [False, True], ids=["without usage", "with usage"])
@pytest.mark.parametrize("received", ENGINES.values(), ids=ENGINES.keys())
async def test_streams_of_all_engines_become_openais(stage: Stage, received: list[bytes], asked: bool) -> None:
    events = await stage.events(stream_reply(*received), **(ASK_USAGE if asked else {}))
    assert said(events) == "xxx"
    assert events.pop() == "[DONE]"
    if events[-1]["choices"] == []:
        assert asked
        told = events.pop()["usage"]
        assert told["total_tokens"] == told["prompt_tokens"] + told["completion_tokens"]
    assert all(len(chunk["choices"]) == 1 for chunk in events)
    assert all(
        set(chunk) == {"id", "object", "created", "model", "choices"} | set(["usage"] * asked) for chunk in events
    )
    assert all(chunk.get("usage") is None for chunk in events)
    assert {(chunk["object"], chunk["model"]) for chunk in events} == {("chat.completion.chunk", "smart")}
    assert len({(chunk["id"], chunk["created"]) for chunk in events}) == 1
    choices = [chunk["choices"][0] for chunk in events]
    assert ["role" in choice["delta"] for choice in choices] == [True] + [False] * (len(choices) - 1)
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert {choice["index"] for choice in choices} == {0}
    assert all(None not in choice["delta"].values() for choice in choices)


async def test_every_choice_begins_in_order_before_any_of_its_text(stage: Stage) -> None:
    received = [
        chunk({"content": "b"}, index=1),
        chunk({"content": "a"}),
        chunk({}, "stop", index=1),
        chunk({}, "stop", index=0),
        DONE,
    ]
    events = await stage.events(stream_reply(*received), n=2)
    choices = [chunk["choices"][0] for chunk in events[:-1]]
    assert [(choice["index"], choice["delta"]) for choice in choices] == [
        (0, {"role": "assistant", "content": ""}),
        (1, {"role": "assistant", "content": "b"}),
        (0, {"content": "a"}),
        (1, {}),
        (0, {}),
    ]
    assert all(choice["logprobs"] is None and "finish_reason" in choice for choice in choices)


async def test_logprobs_and_what_openai_does_not_know_pass_through(stage: Stage) -> None:
    logprobs: Any = {"content": [{"token": "x", "logprob": -0.5, "bytes": None, "top_logprobs": []}], "refusal": None}
    choice = {"index": 0, "delta": {"content": "x", "reasoning_content": "…"}, "logprobs": logprobs}
    received = [chunk(ROLE), named(choices=[choice | {"finish_reason": None}], system_fingerprint="fp_1"), STOP, DONE]
    events = await stage.events(stream_reply(*received))
    assert events[1]["choices"] == [choice | {"finish_reason": None}]
    assert events[1]["system_fingerprint"] == "fp_1"


async def test_usage_of_a_stream_adds_up_and_has_no_nulls(stage: Stage) -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 0, "prompt_tokens_details": None}
    received = [chunk(ROLE), STOP, chunk(None, usage=usage), DONE]
    assert (await stage.events(stream_reply(*received), **ASK_USAGE))[-2]["usage"] == USAGE


async def test_usage_keeps_what_the_gateway_does_not_read(stage: Stage) -> None:
    usage = USAGE | {"prompt_tokens_details": {"cached_tokens": 1, "audio_tokens": 2}}
    received = [chunk(ROLE), *[chunk({"content": "x"}, usage=usage)] * 3, STOP, DONE]
    assert (await stage.events(stream_reply(*received), **ASK_USAGE))[-2]["usage"] == usage


# Failures.


@pytest.mark.parametrize(
    ("script", "status"),
    [
        pytest.param(stream_reply(event(error(code=400)), DONE), 400, id="400"),
        pytest.param(stream_reply(b": hi\n\n", event(error(code=503)), DONE), 503, id="503"),
        pytest.param(stream_reply(event(error()), DONE), 502, id="no code"),
        pytest.param(stream_reply(event({"error": {"message": HERE, "http_status_code": 422}})), 400, id="TGI's code"),
        pytest.param(stream_reply(event({"error": "Model is overloaded", "error_type": "overloaded"})), 502, id="text"),
        pytest.param(stream_reply(event({"object": "error", "message": HERE, "code": 400})), 400, id="flat"),
        pytest.param(stream_reply(b"event: error\n" + event({"detail": "x"})), 502, id="detail"),
        pytest.param(stream_reply(b"data: not json\n\n"), 502, id="no JSON"),
        pytest.param(stream_reply(b"data: \xff\n\n"), 502, id="no UTF-8"),
        pytest.param(stream_reply(named(choices=None)), 502, id="choices null"),
        pytest.param(stream_reply(named(choices=[1])), 502, id="choices of numbers"),
        pytest.param(stream_reply(event({"id": "x"})), 502, id="no choices"),
        pytest.param(stream_reply(event([])), 502, id="a list"),
        pytest.param(stream_reply(b"data: " + b"[" * 100_000 + b"\n\n"), 502, id="deep nesting"),
        pytest.param(stream_reply(b"data: " + b" " * 2_000_000), 502, id="an event without an end"),
        pytest.param(stream_reply(), 502, id="nothing"),
        pytest.param(stream_reply(b": hi\n\n", DONE), 502, id="only DONE"),
        pytest.param(stream_reply(chunk(None), chunk(None, usage=USAGE), DONE), 502, id="no choice ever"),
        pytest.param(stream_reply(cut=True), 502, id="cut before the first event"),
        pytest.param(stream_reply(*hello_stream(), content_encoding="gzip"), 502, id="gzip"),
        pytest.param(stream_reply(*hello_stream(), content_type="text/html"), 502, id="HTML"),
        pytest.param(json_reply(completion()), 502, id="a whole answer"),
        pytest.param(json_reply(error(code=400)), 400, id="a JSON error with 200"),
        pytest.param(json_reply(error(), 401), 502, id="401"),
        pytest.param(json_reply(error(), 404), 502, id="404"),
        pytest.param(json_reply(error(), 503), 503, id="503 as status"),
    ],
)
async def test_a_failure_before_the_first_chunk_is_a_status(stage: Stage, script: Script, status: int) -> None:
    response = await stage.post(script, stream=True)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.json()["error"]["code"] != "internal_error"
    assert "10.1.2.3" not in response.text


BEGUN = [chunk(ROLE), chunk({"content": "Hel"})]


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(stream_reply(*BEGUN, event(error(code=400)), DONE), id="an error event"),
        pytest.param(stream_reply(b"".join(BEGUN) + event(error()) + DONE), id="an error event in the same block"),
        pytest.param(stream_reply(*BEGUN, event({"error": HERE})), id="a text as error"),
        pytest.param(stream_reply(*BEGUN, event({"object": "error", "message": HERE})), id="a flat error"),
        pytest.param(stream_reply(*BEGUN, b"data: not json\n\n"), id="no JSON"),
        pytest.param(stream_reply(*BEGUN, chunk({"x": "é"}).decode().encode("latin-1")), id="no UTF-8"),
        pytest.param(stream_reply(*BEGUN, cut=True), id="cut off"),
        pytest.param(stream_reply(*BEGUN), id="an end without finish_reason"),
        pytest.param(stream_reply(*BEGUN, DONE), id="DONE without finish_reason"),
        pytest.param(stream_reply(*BEGUN, STOP[:-9]), id="an end within an event"),
        pytest.param(stream_reply(*BEGUN, chunk({}, "stop", index=7), DONE), id="another choice finished"),
        pytest.param(stream_reply(*BEGUN, b"data: " + b"[" * 100_000 + b"\n\n"), id="deep nesting"),
    ],
)
async def test_a_failure_after_the_first_chunk_raises_in_the_sdk(stage: Stage, script: Script) -> None:
    """On the second target no more is tried: two beginnings are not an answer."""
    stage.first.script = script
    stage.second.script = stream_reply(*hello_stream())
    stream = await stage.house.openai.chat.completions.create(**STREAM | {"model": "spare"})
    texts = [(await anext(stream)).choices[0].delta.content for _ in BEGUN]
    with pytest.raises(openai.APIError) as caught:
        await anext(stream)
    assert texts == ["", "Hel"]
    assert caught.value.code != "internal_error"
    assert HERE not in caught.value.message
    assert stage.second.requests == []
    events = events_of((await stage.post(script, stream=True)).content)
    assert set(events[-1]) == {"error"}
    assert set(events[-1]["error"]) == {"message", "type", "param", "code"}
    assert not any(choice["finish_reason"] for chunk in events[:-1] for choice in chunk["choices"])


@pytest.mark.parametrize("missing", [1, 2], ids=["no DONE", "no usage and no DONE"])
async def test_a_finished_stream_is_whole_whatever_is_missing_after_it(stage: Stage, missing: int) -> None:
    events = await stage.events(stream_reply(*hello_stream()[:-missing]))
    assert (said(events), events[-1]) == ("Hello", "[DONE]")


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(stream_reply(event(error(code=503)), DONE), id="an error as first event"),
        pytest.param(json_reply(error(), 503), id="503"),
        pytest.param(stream_reply(), id="an empty stream"),
        pytest.param(stream_reply(cut=True), id="cut off"),
        pytest.param(json_reply(completion()), id="a whole answer"),
    ],
)
async def test_another_target_streams_where_the_first_fails_before_it_begins(stage: Stage, script: Script) -> None:
    stage.second.script = stream_reply(*hello_stream())
    assert said(await stage.events(script, model="spare")) == "Hello"


async def test_another_target_answers_where_nobody_listens() -> None:
    async with upstream(stream_reply(*hello_stream())) as second:
        async with upstream(json_reply({})) as gone:
            deserted = gone.settings()
        async with running(settings_for(deserted, second.settings())) as house:
            assert said(events_of((await house.post(STREAM)).content)) == "Hello"
        async with running(settings_for(deserted)) as house:
            response = await house.post(STREAM)
            assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_connect_error")
            assert str(gone.port) not in response.text


# Time.


async def test_silence_before_the_first_event_is_504(stage: Stage) -> None:
    response = await stage.post(stream_reply(b": hi\n\n", asyncio.Event()), stream=True, model="hasty")
    assert (response.status_code, response.json()["error"]["code"]) == (504, "upstream_timeout")


async def test_silence_within_a_stream_ends_it_with_an_error(stage: Stage) -> None:
    events = await stage.events(stream_reply(*BEGUN, asyncio.Event()), model="hasty")
    assert events[-1]["error"]["code"] == "upstream_timeout"


@pytest.mark.parametrize("noise", [b": hi\n\n", b"data: {"])
async def test_neither_comments_nor_half_an_event_prove_that_a_generation_goes_on(stage: Stage, noise: bytes) -> None:
    async def mutter(received: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, {"content-type": "text/event-stream"}) + b"".join(BEGUN))
        while not received.gone.is_set():
            writer.write(noise)
            await asyncio.sleep(0.02)

    async with asyncio.timeout(5):
        events = await stage.events(mutter, model="hasty")
    assert events[-1]["error"]["code"] == "upstream_timeout"


async def test_the_status_is_held_for_a_moment_and_then_comments_keep_the_connection_alive() -> None:
    late = asyncio.Event()
    server = Server(hold_s=0.05, keep_alive_s=0.05)
    script = stream_reply(late, event(error(code=503)))
    async with upstream(script) as fake, running(settings_for(fake.settings(), server=server)) as house:
        request = house.http.build_request(
            "POST", f"{house.url}/v1/chat/completions", json=STREAM, headers={"authorization": f"Bearer {TOKEN}"}
        )
        response = await house.http.send(request, stream=True)
        assert response.status_code == 200
        received = b""
        async for block in response.aiter_raw():
            received += block
            if received.count(b": keep-alive\n\n") == 3:
                late.set()
        assert events_of(received)[-1]["error"]["code"] == "overloaded"
        assert b"[DONE]" not in received


async def test_a_stream_that_was_held_and_kept_alive_is_read_by_the_sdk() -> None:
    late = asyncio.Event()
    server = Server(hold_s=0.03, keep_alive_s=0.03)
    script = stream_reply(late, *hello_stream())
    async with upstream(script) as fake, running(settings_for(fake.settings(), server=server)) as house:
        stream = await house.openai.chat.completions.create(**STREAM)
        asyncio.get_running_loop().call_later(0.1, late.set)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "Hello"


async def test_a_slow_answer_that_is_not_streamed_is_504() -> None:
    never = asyncio.Event()
    async with upstream(stream_reply(never)) as fake:
        settings = settings_for(fake.settings(timeouts=Timeouts(total_s=0.1)))
        async with running(settings) as house:
            response = await house.post(HELLO)
            assert (response.status_code, response.json()["error"]["code"]) == (504, "upstream_timeout")
