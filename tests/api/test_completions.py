"""Does a legacy completion through the gateway look to the OpenAI SDK as one from OpenAI does?"""

from typing import Any

import openai
import pytest

from tests.api.conftest import Stage
from tests.api.test_streaming import ASK_USAGE
from tests.house import DONE, USAGE, House, event, json_reply, stream_reply

pytestmark = pytest.mark.anyio

PATH = "completions"


def choice(text: str, index: int = 0, finish: str | None = "stop", **members: Any) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish, **members}


def completion(*choices: dict[str, Any], **members: Any) -> dict[str, Any]:
    envelope = {"id": "up-1", "object": "text_completion", "created": 17, "model": "model-1"}
    return {**envelope, "choices": list(choices), "usage": USAGE, **members}


def chunk(*choices: dict[str, Any], **members: Any) -> bytes:
    whole = {**completion(*choices), **members}
    return event(whole if "usage" in members else {k: v for k, v in whole.items() if k != "usage"})


async def test_the_sdk_reads_a_completion(stage: Stage) -> None:
    stage.first.script = json_reply(completion(choice(" there")))
    answer = await stage.house.openai.completions.create(model="smart", prompt="Hello", max_tokens=0)
    assert (answer.choices[0].text, answer.object, answer.model) == (" there", "text_completion", "smart")
    assert answer.id.startswith("cmpl-")
    assert answer._request_id is not None
    assert stage.first.requests[-1].path == "/v1/completions"
    assert stage.sent == {"model": "model-1", "prompt": "Hello", "max_tokens": 0}


@pytest.mark.parametrize(
    "received",
    [choice("x"), {"text": "x", "finish_reason": "stop"}, choice("x", stop_reason=None, token_ids=None)],
)
async def test_logprobs_are_null_and_no_other_member_is(stage: Stage, received: Any) -> None:
    answer = await stage.answer(json_reply(completion(received)), PATH, prompt="a")
    assert answer["choices"] == [choice("x")]


async def test_logprobs_pass_through_with_the_nulls_that_mean_something(stage: Stage) -> None:
    logprobs = {"tokens": ["a", "b"], "token_logprobs": [None, -1.5], "top_logprobs": [None, {}], "text_offset": [0, 1]}
    received = completion(choice("ab", logprobs=logprobs))
    answer = await stage.answer(json_reply(received), PATH, prompt="a", echo=True, logprobs=1)
    assert answer["choices"] == [choice("ab", logprobs=logprobs)]


@pytest.mark.parametrize(
    ("prompt", "n", "expected"),
    [("a", 2, 2), (["a", "b"], 2, 4), ([1, 2, 3], 1, 1), ([[1, 2], [3], [4]], 1, 3), (None, 1, 1)],
)
async def test_choices_are_ordered_by_prompt_and_choice(stage: Stage, prompt: Any, n: int, expected: int) -> None:
    shuffled = [choice(f"c{index}", index) for index in reversed(range(expected))]
    answer = await stage.answer(json_reply(completion(*shuffled)), PATH, prompt=prompt, n=n)
    assert [(each["index"], each["text"]) for each in answer["choices"]] == [(i, f"c{i}") for i in range(expected)]
    response = await stage.post(json_reply(completion(*shuffled[1:])), PATH, prompt=prompt, n=n)
    assert response.status_code == 502


@pytest.mark.parametrize("asked", [False, True])
async def test_a_stream_is_text_finish_usage_done(stage: Stage, asked: bool) -> None:
    received = [
        chunk(choice("He", finish=None)),
        chunk({"index": 0, "text": "l", "finish_reason": ""}),
        chunk(choice("l", finish=None, token_ids=None)),
        chunk(choice("o", finish="length"), usage=USAGE),
        DONE,
    ]
    events = await stage.events(stream_reply(*received), PATH, prompt="a", **(ASK_USAGE if asked else {}))
    assert events.pop() == "[DONE]"
    envelope = {name: events[0][name] for name in ("id", "created")} | {"object": "text_completion", "model": "smart"}
    envelope |= {"usage": None} if asked else {}
    chunks = [choice("He", finish=None), choice("l", finish=None), choice("l", finish=None), choice("o", 0, "length")]
    usage = [envelope | {"choices": [], "usage": USAGE}] if asked else []
    assert events == [*(envelope | {"choices": [each]} for each in chunks), *usage]
    assert events[0]["id"].startswith("cmpl-")


async def test_streamed_choices_first_appear_in_order(stage: Stage) -> None:
    received = [chunk(choice("b", 1)), chunk(choice("a", 0)), DONE]
    events = await stage.events(stream_reply(*received), PATH, prompt=["a", "b"])
    assert [event["choices"][0] for event in events[:-1]] == [
        choice("", 0, None),
        choice("b", 1),
        choice("a", 0),
    ]


async def test_the_sdk_streams_and_raises_where_a_prompt_is_left_unfinished(stage: Stage) -> None:
    stage.first.script = stream_reply(chunk(choice("a", 0)), chunk(choice("b", 1, None)), DONE)
    stream = await stage.house.openai.completions.create(model="smart", prompt=["a", "b"], stream=True)
    assert [(await anext(stream)).choices[0].text for _ in "ab"] == ["a", "b"]
    with pytest.raises(openai.APIError):
        await anext(stream)


# The echo adapter speaks without an upstream.


async def test_an_echo_answers_every_endpoint_that_it_serves(echo: House) -> None:
    plain = await echo.openai.completions.create(model="smart", prompt=["a b", "c"], n=2, stop="b")
    assert [each.text for each in plain.choices] == ["a ", "a ", "c", "c"]
    asked: Any = {"model": "smart", "messages": [{"role": "user", "content": "one two 👩‍👩‍👧‍👦"}], "n": 2}
    async with echo.openai.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        final = await stream.get_final_completion()
    assert [each.message.content for each in final.choices] == ["one two 👩‍👩‍👧‍👦"] * 2
    assert final.usage is not None
    assert (final.usage.prompt_tokens, final.usage.completion_tokens, final.usage.total_tokens) == (3, 6, 9)
    cut = await echo.openai.chat.completions.create(**asked, max_tokens=1)
    assert {(each.message.content, each.finish_reason) for each in cut.choices} == {("one", "length")}


@pytest.mark.parametrize(
    "asked",
    [
        {"logprobs": True},
        {"logit_bias": {"7": 1}},
        {"presence_penalty": 1},
        {"modalities": ["text", "audio"]},
        {"web_search_options": {}},
        {"moderation": {}},
        {"reasoning_effort": "low"},
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"},
    ],
)
async def test_an_echo_refuses_what_would_change_the_answer(echo: House, asked: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await echo.openai.chat.completions.create(
            model="smart", messages=[{"role": "user", "content": "Hi"}], extra_body=asked
        )
    assert caught.value.param == list(asked)[-1]
    assert caught.value.code == "unsupported_parameter"


async def test_an_echo_takes_what_asks_nothing(echo: House) -> None:
    asked = {"logit_bias": {}, "presence_penalty": 0, "logprobs": False, "response_format": {"type": "text"}}
    asked |= {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto", "temperature": 0}
    asked |= {"modalities": ["text"], "reasoning_effort": "none", "web_search_options": None, "service_tier": "auto"}
    answer = await echo.openai.chat.completions.create(
        model="smart", messages=[{"role": "user", "content": "Hi"}], extra_body=asked
    )
    assert answer.choices[0].message.content == "Hi"
    assert answer.service_tier == "default"


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_completion_of_nothing_is_counted_as_nothing(echo: House, streamed: bool) -> None:
    usage: Any = {"stream": True, "stream_options": {"include_usage": True}} if streamed else {}
    response = await echo.post({"model": "smart", "prompt": "", "max_tokens": 0, **usage}, "completions")
    assert response.status_code == 200
    assert '"completion_tokens":0' in response.text
