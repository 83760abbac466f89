"""What a local model is asked, and what is refused with its name."""

from typing import Any

import msgspec
import pytest

from adapters.local.asking import ask_chat, ask_completion
from adapters.local.frames import COMMANDS, Generate, encode
from gateway.errors import InvalidRequest
from gateway.schema.endpoint import CHAT, COMPLETIONS
from gateway.schema.payload import Payload
from gateway.schema.reading import read_request

HELLO = {"role": "user", "content": "Hello!"}
TOOL = {"type": "function", "function": {"name": "look_up"}}
TEXT = {"type": "text", "text": "?"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def chat(**members: Any) -> Payload[Any]:
    return read_request(CHAT, msgspec.json.encode({"model": "m", "messages": [HELLO], **members}))[0]


def completion(**members: Any) -> Payload[Any]:
    return read_request(COMPLETIONS, msgspec.json.encode({"model": "m", "prompt": "Hello", **members}))[0]


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"tools": [TOOL]}, "tools"),
        ({"tools": [TOOL], "tool_choice": "auto"}, "tools"),
        ({"functions": [{"name": "look_up"}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 2}, "logprobs"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"moderation": {"model": "x"}}, "moderation"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        (
            {"messages": [HELLO, {"role": "user", "content": [TEXT, IMAGE]}]},
            "messages[1].content[1]",
        ),
        ({"messages": [{"role": "assistant", "content": "x", "audio": {"id": "a"}}]}, "messages[0].audio"),
    ],
)
def test_what_a_chat_cannot_have_is_refused_by_name(members: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        ask_chat(chat(**members))
    assert (refused.value.param, refused.value.code) == (param, "unsupported_parameter")


@pytest.mark.parametrize(
    ("members", "param"), [({"suffix": "."}, "suffix"), ({"best_of": 2}, "best_of"), ({"logprobs": 0}, "logprobs")]
)
def test_what_a_completion_cannot_have_is_refused_by_name(members: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        ask_completion(completion(**members))
    assert (refused.value.param, refused.value.code) == (param, "unsupported_parameter")


@pytest.mark.parametrize(
    "members",
    [
        {"tools": []},
        {"tools": [TOOL], "tool_choice": "none"},
        {"functions": []},
        {"response_format": {"type": "text"}},
        {"logprobs": False},
        {"modalities": ["text"]},
        {"reasoning_effort": "none"},
        {"prediction": {"type": "content", "content": "x"}},
        {"user": "u", "metadata": {"a": "b"}, "verbosity": "low", "top_k": None},
    ],
)
def test_what_asks_for_nothing_is_taken(members: dict[str, Any]) -> None:
    assert ask_chat(chat(**members)) == ask_chat(chat())


@pytest.mark.parametrize("key", ["hello", "-1", "1.0", "²", "9" * 20])
def test_a_bias_needs_token_ids(key: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        ask_chat(chat(logit_bias={key: 1}))
    assert refused.value.param == "logit_bias"


@pytest.mark.parametrize(("name", "value"), [("top_k", "many"), ("top_k", -2), ("min_p", 1.5), ("min_p", "x")])
def test_extensions_are_checked_like_everything_else(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        ask_chat(chat(**{name: value}))
    assert refused.value.param == name


def test_parameters_reach_the_engine() -> None:
    asked = ask_chat(
        chat(
            temperature=0,
            top_p=0,
            top_k=-1,
            min_p=0.1,
            presence_penalty=1,
            frequency_penalty=-1,
            logit_bias={"7": -100},
            seed=3,
            n=2,
            stop="END",
            max_completion_tokens=9,
        )
    )
    sampling = asked.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 0, 0, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.logit_bias) == (1, -1, {7: -100})
    assert (sampling.seed, asked.n, asked.stop, asked.max_tokens) == (3, 2, ["END"], 9)
    assert COMMANDS.decode(encode(asked)) == asked


def test_defaults_are_openais() -> None:
    sampling = ask_chat(chat(temperature=None, top_p=None)).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (1.0, 1.0, 0, None)
    assert ask_chat(chat()).max_tokens is None
    assert ask_completion(completion()).max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (None, [None]),
    ],
)
def test_every_form_of_prompt_is_understood(prompt: object, prompts: list[object]) -> None:
    asked = ask_completion(completion(prompt=prompt))
    assert asked.prompts == prompts
    assert isinstance(COMMANDS.decode(encode(asked)), Generate)


def test_messages_become_what_templates_take() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    broken = {"id": "c2", "type": "function", "function": {"name": "f", "arguments": '{"a": '}}
    asked = ask_chat(
        chat(
            messages=[
                {
                    "role": "user",
                    "content": [TEXT, TEXT],
                    "name": "Ada",
                },
                {"role": "assistant", "content": None, "tool_calls": [call, broken]},
                {"role": "tool", "tool_call_id": "c1", "content": "42"},
                {"role": "assistant", "function_call": {"name": "g", "arguments": "{}"}},
                {"role": "function", "name": "g", "content": "43"},
            ]
        )
    )
    assert asked.messages is not None
    user, assistant, tool, older, function = asked.messages
    assert user == {"role": "user", "content": "??", "name": "Ada"}
    assert [each["function"]["arguments"] for each in assistant["tool_calls"]] == [{"a": 1}, '{"a": ']
    assert tool == {"role": "tool", "tool_call_id": "c1", "content": "42"}
    assert older["tool_calls"][0]["function"] == {"name": "g", "arguments": {}}
    assert function["role"] == "tool"
