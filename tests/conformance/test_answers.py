"""Does every adapter answer as OpenAI does, to OpenAI's SDK on a real socket?"""

import asyncio
import json
from typing import Any

import openai
import pytest

from tests.conformance.conftest import TEXT, Contestant
from tests.conformance.features import LACKS
from tests.replay import Faults

pytestmark = pytest.mark.anyio

FROZEN = Faults(freeze_after=3)


def check_usage(usage: Any) -> None:
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens > 0


def counts(usage: Any) -> list[int]:
    return [usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")]


def said(chunks: list[Any], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


async def test_a_chat_is_whole(adapter: Contestant) -> None:
    response = await adapter.house.post(adapter.asks(TEXT))
    document = json.loads(response.content)
    assert document["id"].startswith("chatcmpl-")
    assert (document["object"], document["model"]) == ("chat.completion", adapter.name)
    assert isinstance(document["created"], int)
    (choice,) = document["choices"]
    assert set(choice) == {"index", "message", "logprobs", "finish_reason"}
    assert set(choice["message"]) >= {"role", "content", "refusal"}
    assert (choice["index"], choice["logprobs"], choice["message"]["role"]) == (0, None, "assistant")
    assert choice["message"]["refusal"] is None
    assert choice["finish_reason"] in ("stop", "length")
    assert "null" not in json.dumps(document["usage"])
    assert counts(document["usage"])[2] == sum(counts(document["usage"])[:2])
    if adapter.name != "local":
        assert choice["message"]["content"] == TEXT


async def test_a_stream_has_openais_order(adapter: Contestant) -> None:
    *events, done = await adapter.events()
    assert done == "[DONE]"
    assert len({(event["id"], event["created"], event["object"], event["model"]) for event in events}) == 1
    assert (events[0]["object"], events[0]["model"]) == ("chat.completion.chunk", adapter.name)
    assert not any("usage" in event for event in events)
    choices = [choice for event in events for choice in event["choices"]]
    assert len(choices) == len(events)
    assert [choice["delta"].get("role") for choice in choices] == ["assistant"] + [None] * (len(choices) - 1)
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] in ("stop", "length")
    assert all(choice.keys() >= {"index", "delta", "finish_reason"} for choice in choices)


async def test_a_stream_says_what_a_plain_answer_does(adapter: Contestant) -> None:
    plain, chunks = await adapter.chat(), await adapter.chunks()
    assert said(chunks) == plain.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == plain.choices[0].finish_reason
    assert len(chunks) > 4


async def test_usage_comes_where_it_is_asked_for_and_is_the_plain_answers(adapter: Contestant) -> None:
    plain = await adapter.chat()
    *events, last, done = await adapter.events(**adapter.asks(TEXT), stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert all(event["usage"] is None and event["choices"] for event in events)
    assert last["choices"] == []
    assert plain.usage is not None
    check_usage(plain.usage)
    assert counts(last["usage"]) == counts(plain.usage.to_dict())


async def test_the_sdks_stream_helper_joins_it(adapter: Contestant) -> None:
    async with adapter.house.openai.chat.completions.stream(**adapter.asks(TEXT)) as stream:
        final = await stream.get_final_completion()
    plain = await adapter.chat()
    assert final.choices[0].message.content == plain.choices[0].message.content
    assert final.choices[0].finish_reason == plain.choices[0].finish_reason


async def test_a_limit_is_exact(adapter: Contestant) -> None:
    for limit in (1, 2, 5):
        for name in ("max_tokens", "max_completion_tokens"):
            answer = await adapter.chat(**{"max_completion_tokens": None, name: limit})
            assert answer.choices[0].finish_reason == "length"
            assert answer.usage is not None
            assert answer.usage.completion_tokens == limit


async def test_no_stop_string_is_in_a_text(adapter: Contestant) -> None:
    full = (await adapter.chat()).choices[0].message.content
    assert full is not None
    assert len(full) > 6
    middle = len(full) // 2
    stops = [[full[at : at + length]] for at in (1, 5, middle) for length in (1, 2, 3)]
    for stop in [*stops, [full[middle:], full[2:4]], ["not there", full[middle : middle + 2]]]:
        end = min(at for each in stop if (at := full.find(each)) >= 0)
        answer, chunks = await asyncio.gather(adapter.chat(stop=stop), adapter.chunks(stop=stop))
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (full[:end], "stop")
        assert (said(chunks), chunks[-1].choices[0].finish_reason) == (full[:end], "stop")


async def test_a_stop_string_that_does_not_come_takes_nothing_away(adapter: Contestant) -> None:
    plain = await adapter.chat()
    full = plain.choices[0].message.content
    assert full is not None
    stop = [full[-2:] + "x", "nowhere"]
    answer, chunks = await asyncio.gather(adapter.chat(stop=stop), adapter.chunks(stop=stop))
    assert answer.choices[0].message.content == said(chunks) == full
    assert answer.choices[0].finish_reason == plain.choices[0].finish_reason == chunks[-1].choices[0].finish_reason


@pytest.mark.parametrize("text", ["推論は、推論である。", "👩‍👩‍👧‍👦🇯🇵👋🏽", 'Grüße\n\t"quoted\\" \u2028 data: x\n\n'])
async def test_characters_are_whole(adapter: Contestant, text: str) -> None:
    plain, chunks, events = await asyncio.gather(
        adapter.chat(text), adapter.chunks(text), adapter.events(**adapter.asks(text))
    )
    assert plain.choices[0].message.content == said(chunks)
    if adapter.name != "local":
        assert said(chunks) == text
    for event in events[:-1]:
        json.dumps(event, ensure_ascii=False).encode()  # raises at half a surrogate pair


async def test_the_same_seed_says_the_same_again(adapter: Contestant) -> None:
    asked: Any = {"temperature": 1.0, "seed": 7, "max_completion_tokens": 20}
    first, second, streamed = await asyncio.gather(
        adapter.chat(**asked), adapter.chat(**asked), adapter.chunks(**asked)
    )
    assert first.choices[0].message.content == second.choices[0].message.content == said(streamed)


async def test_completions_are_whole_and_streamed_alike(adapter: Contestant) -> None:
    raw = await adapter.house.post({"model": adapter.name, "prompt": TEXT, "temperature": 0}, "completions")
    document = json.loads(raw.content)
    assert document["id"].startswith("cmpl-")
    assert (document["object"], document["model"]) == ("text_completion", adapter.name)
    (choice,) = document["choices"]
    assert set(choice) == {"index", "text", "logprobs", "finish_reason"}
    assert document["usage"]["completion_tokens"] <= 16  # OpenAI's default
    *events, last, done = await adapter.events("completions", temperature=0, stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert counts(last["usage"]) == counts(document["usage"])
    choices = [choice for event in events for choice in event["choices"]]
    assert "".join(each["text"] for each in choices) == choice["text"]
    assert [each["finish_reason"] for each in choices] == [None] * (len(choices) - 1) + [choice["finish_reason"]]
    assert {event["object"] for event in events} == {"text_completion"}
    chunks = await adapter.complete(temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice["text"]


async def test_a_completion_ends_at_its_stop_string(adapter: Contestant) -> None:
    full = (await adapter.complete(temperature=0, max_tokens=12)).choices[0].text
    stop = full[len(full) // 2 :][:2]
    asked: Any = {"temperature": 0, "max_tokens": 12, "stop": stop}
    answer, chunks = await asyncio.gather(adapter.complete(**asked), adapter.complete(stream=True, **asked))
    expected = (full[: full.index(stop)], "stop")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == expected
    assert ("".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason) == expected


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_beyond_the_context_is_openais_400(adapter: Contestant, stream: bool) -> None:
    if "a context" in LACKS[adapter.name]:
        return
    with pytest.raises(openai.BadRequestError) as chat:
        await adapter.chat("Hi. " * 400, stream=stream)
    assert (chat.value.code, chat.value.param, chat.value.type) == (
        "context_length_exceeded",
        "messages",
        "invalid_request_error",
    )
    with pytest.raises(openai.BadRequestError) as completion:
        await adapter.complete("Hi. " * 400, stream=stream)
    assert (completion.value.code, completion.value.param) == ("context_length_exceeded", "prompt")


async def test_a_client_that_leaves_frees_the_engine(adapter: Contestant) -> None:
    """Within a second; what the next one asks is answered as if nothing had been."""
    if adapter.player is not None:
        adapter.player.faults = FROZEN
    stream: Any = await adapter.house.openai.chat.completions.create(**adapter.asks(TEXT * 4, stream=True))
    await anext(aiter(stream))
    await stream.close()
    if adapter.player is not None:
        (received,) = adapter.player.requests
        async with asyncio.timeout(1):
            await received.gone.wait()
        adapter.player.forget()
    async with asyncio.timeout(5):
        assert (await adapter.chat()).choices
