"""What an adapter has, it has as OpenAI does; for what it lacks there is a 400 that names the parameter."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import openai
import pytest

from tests.conformance.conftest import ADAPTERS, Contestant, ready
from tests.conformance.features import LACKS

pytestmark = pytest.mark.anyio

UNIT = {"type": "object", "properties": {"unit": {"type": "string", "enum": ["celsius"]}}, "required": ["unit"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "unit", "schema": UNIT, "strict": True}}
TOOLS = [
    {"type": "function", "function": {"name": name, "strict": True, "parameters": UNIT}} for name in ("warm", "weather")
]
NAMED = {"type": "function", "function": {"name": "weather"}}
IMAGE = [{"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}]


class Feature(NamedTuple):
    name: str
    asks: dict[str, Any]
    check: Callable[[Any], bool]
    chat: bool = True


def calls(name: str, finish: str) -> Callable[[Any], bool]:
    def check(answer: Any) -> bool:
        (choice,) = answer.choices
        (call,) = choice.message.tool_calls
        assert json.loads(call.function.arguments) == {"unit": "celsius"}
        return (call.type, call.function.name, choice.finish_reason) == ("function", name, finish) and bool(call.id)

    return check


def tells_of_tokens(answer: Any) -> bool:
    content = answer.choices[0].logprobs.content
    assert "".join(token.token for token in content) == answer.choices[0].message.content
    assert bytes(byte for token in content for byte in token.bytes).decode() == answer.choices[0].message.content
    assert all(len(token.top_logprobs) == 1 and token.logprob <= 0 for token in content)
    return bool(len(content) == answer.usage.completion_tokens)


def lists_tokens(answer: Any) -> bool:
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text
    lists = (logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset)
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    return {len(each) for each in lists} == {answer.usage.completion_tokens}


FEATURES = [
    Feature("tools", {"tools": TOOLS, "tool_choice": "required"}, calls("warm", "tool_calls")),
    Feature("a named tool", {"tools": TOOLS, "tool_choice": NAMED}, calls("weather", "stop")),
    Feature(
        "json_schema",
        {"response_format": FORMAT},
        lambda answer: json.loads(answer.choices[0].message.content) == {"unit": "celsius"},
    ),
    Feature("logprobs", {"logprobs": True, "top_logprobs": 1}, tells_of_tokens),
    Feature("logprobs of a completion", {"logprobs": 1}, lists_tokens, chat=False),
    Feature("best_of", {"best_of": 2}, lambda answer: answer.usage.completion_tokens > 16, chat=False),
    Feature("echo", {"echo": True}, lambda answer: answer.choices[0].text.startswith("Hi. "), chat=False),
    Feature("token ids", {"prompt": [5, 6, 7]}, lambda answer: answer.usage.prompt_tokens == 3, chat=False),
    Feature("logit_bias", {"logit_bias": {"5": -100}}, lambda answer: bool(answer.choices)),
    Feature("presence_penalty", {"presence_penalty": 1.5}, lambda answer: bool(answer.choices)),
    Feature("images", {"messages": [{"role": "user", "content": IMAGE}]}, lambda answer: bool(answer.choices)),
]
SUBJECT = "Hi. How are you doing today? I am fine, and I hope that you are."


@pytest.fixture(params=ADAPTERS)
def adapter(request: pytest.FixtureRequest, contestants: dict[str, Contestant]) -> Contestant:
    return ready(contestants[request.param])


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
async def test_a_feature_is_there_or_refused_by_name(adapter: Contestant, feature: Feature) -> None:
    async def ask(**changes: Any) -> Any:
        if feature.chat:
            return await adapter.chat(SUBJECT, **feature.asks, **changes)
        asked: Any = {"prompt": SUBJECT, "temperature": 1.0, **feature.asks, **changes}
        return await adapter.complete(**asked)

    lacking = LACKS[adapter.name].get(feature.name)
    if lacking is None:
        assert feature.check(await ask())
        return
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(stream=stream)
        assert (caught.value.param, caught.value.type) == (lacking, "invalid_request_error")
    assert adapter.player is None or adapter.player.requests == []


@pytest.mark.parametrize("name", sorted({feature.name for feature in FEATURES} & {"tools", "a named tool"}))
async def test_the_sdk_joins_the_calls_of_a_stream(adapter: Contestant, name: str) -> None:
    feature = next(feature for feature in FEATURES if feature.name == name)
    if name in LACKS[adapter.name]:
        return
    plain = await adapter.chat(SUBJECT, **feature.asks)
    async with adapter.house.openai.chat.completions.stream(**adapter.asks(SUBJECT, **feature.asks)) as stream:
        final: Any = await stream.get_final_completion()
    assert feature.check(plain)
    assert feature.check(final)
    assert not final.choices[0].message.content


async def test_logprobs_of_a_stream_are_those_of_the_plain_answer(adapter: Contestant) -> None:
    if "logprobs" in LACKS[adapter.name]:
        return
    asked: Any = {"logprobs": True, "top_logprobs": 1}
    plain, chunks = await adapter.chat(SUBJECT, **asked), await adapter.chunks(SUBJECT, **asked)
    told = [choice.logprobs for chunk in chunks for choice in chunk.choices if choice.logprobs is not None]
    streamed = [token.to_dict() for logprobs in told for token in logprobs.content]
    assert plain.choices[0].logprobs is not None
    assert streamed == [token.to_dict() for token in plain.choices[0].logprobs.content or ()]


async def test_several_choices_come_in_order_and_their_prompt_counts_once(adapter: Contestant) -> None:
    if "n" in LACKS[adapter.name]:
        return
    asked: Any = {"temperature": 1.0, "seed": 3, "max_completion_tokens": 8}
    one, several = await adapter.chat(SUBJECT, **asked), await adapter.chat(SUBJECT, n=3, **asked)
    assert one.usage is not None
    assert several.usage is not None
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.choices[0].message.content == one.choices[0].message.content
    assert several.usage.prompt_tokens == one.usage.prompt_tokens
    assert several.usage.completion_tokens > one.usage.completion_tokens
    *chunks, last = await adapter.chunks(SUBJECT, n=3, stream_options={"include_usage": True}, **asked)
    begun = [choice.index for chunk in chunks for choice in chunk.choices if choice.delta.role]
    ended = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert (begun, sorted(ended)) == ([0, 1, 2], [0, 1, 2])
    for choice in several.choices:
        mine = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert "".join(each.delta.content or "" for each in mine) == choice.message.content
    assert last.usage.completion_tokens == several.usage.completion_tokens
    greedy = await adapter.chat(SUBJECT, n=2)
    assert greedy.choices[0].message.content == greedy.choices[1].message.content


async def test_several_prompts_have_their_choices_in_order(adapter: Contestant) -> None:
    if "several prompts" in LACKS[adapter.name]:
        return
    asked: Any = {"n": 2, "max_tokens": 3, "temperature": 0}
    answer, chunks = (
        await adapter.complete(["ab", "xy"], **asked),
        await adapter.complete(["ab", "xy"], stream=True, **asked),
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    if adapter.name != "local":
        assert [choice.text for choice in answer.choices] == ["ab", "ab", "xy", "xy"]
    for choice in answer.choices:
        mine = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert "".join(each.text for each in mine) == choice.text
        assert mine[-1].finish_reason == choice.finish_reason


def test_the_table_is_of_the_adapters_that_there_are() -> None:
    assert set(LACKS) == set(ADAPTERS)
