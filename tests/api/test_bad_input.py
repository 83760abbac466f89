"""What does a request get that is wrong? Always OpenAI's error, never a 500, never a wait; and no model sees it."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw

from gateway.adapter import Dispatch
from gateway.schema.chat import AnswerMessage, ChatChoice, ChatChunk, ChatCompletion, ChunkChoice, Delta
from gateway.schema.completions import Completion, CompletionChoice
from gateway.schema.embeddings import Embedding, Embeddings
from gateway.schema.endpoint import CHAT, COMPLETIONS, EMBEDDINGS, Endpoint, expected_choices
from gateway.schema.payload import Part, Parts, Payload
from gateway.schema.reading import OPERATOR_FIELDS
from gateway.settings import Server
from tests.house import AUTH, HELLO, House, ScriptedAdapter, scripted

pytestmark = pytest.mark.anyio

LIMIT = 1_000_000
PATIENCE_S = 5.0


class Obliging(ScriptedAdapter):
    """Gives a whole answer to whatever it is asked, so that only the gateway can be at fault."""

    async def chat(self, request: Payload[Any], dispatch: Dispatch) -> AsyncGenerator[Parts]:
        self.requests.append(request.value)
        message = AnswerMessage(role="assistant", content="x", refusal=None)
        choices = range(expected_choices(request.value))
        if not request.value.stream:
            whole = [ChatChoice(message=message, index=i, finish_reason="stop", logprobs=None) for i in choices]
            yield [Part.encode(ChatCompletion(choices=whole))]
            return
        for i in choices:
            choice = ChunkChoice(delta=Delta(content="x"), index=i, finish_reason="stop")
            yield [Part.encode(ChatChunk(choices=[choice]))]

    async def complete(self, request: Payload[Any], dispatch: Dispatch) -> AsyncGenerator[Parts]:
        self.requests.append(request.value)
        choices = [
            CompletionChoice(text="x", index=i, finish_reason="stop", logprobs=None)
            for i in range(expected_choices(request.value))
        ]
        yield [Part.encode(Completion(choices=choices))]

    async def embed(self, request: Payload[Any], dispatch: Dispatch) -> AsyncGenerator[Parts]:
        self.requests.append(request.value)
        given = request.value.input
        count = len(given) if isinstance(given, list) and not isinstance(given[0], int) else 1
        yield [Part.encode(Embeddings(data=[Embedding(embedding=Raw(b"[0.5]"), index=i) for i in range(count)]))]


@pytest.fixture(scope="module")
async def adapter() -> Obliging:
    return Obliging()


@pytest.fixture(scope="module")
async def house(adapter: Obliging) -> AsyncIterator[House]:
    async with scripted(adapter, server=Server(max_body_bytes=LIMIT)) as house:
        yield house


VALID: dict[str, dict[str, Any]] = {
    CHAT.path: HELLO,
    COMPLETIONS.path: {"model": "smart", "prompt": "Hi"},
    EMBEDDINGS.path: {"model": "smart", "input": "Hi"},
}
PATHS = list(VALID)


def with_members(members: str, path: str = CHAT.path) -> bytes:
    """A valid request with *members*, which are JSON text so that they may be anything."""
    return (json.dumps(VALID[path])[:-1] + f", {members}}}").encode()


def error_of(response: httpx2.Response) -> dict[str, Any]:
    """The error of an answer that has everything that every error has."""
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"].startswith("req_")
    assert "set-cookie" not in response.headers
    document = response.json()
    assert list(document) == ["error"]
    error: dict[str, Any] = document["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(response.content) < 2000, "no answer repeats what it was sent at length"
    assert error["type"] == ("server_error" if response.status_code >= 500 else "invalid_request_error")
    return error


async def refusal(house: House, body: Any, path: str = CHAT.path, **headers: str) -> tuple[int, Any, Any]:
    response = await house.post(body, path, **headers)
    error = error_of(response) if response.status_code != 200 else {"code": "taken", "param": None}
    return response.status_code, error["code"], error["param"]


DEEP = 5_000
DEEPEST = 100_000
NOT_JSON: dict[str, tuple[bytes, str | None]] = {
    "nothing": (b"", None),
    "spaces": (b"  \n", None),
    "half a document": (b'{"model": "sm', None),
    "text": (b"model=smart", None),
    "an array": (b"[]", "invalid_type"),
    "a string": (b'"smart"', "invalid_type"),
    "a number": (b"7", "invalid_type"),
    "null": (b"null", "invalid_type"),
    "single quotes": (b"{'model': 'smart'}", None),
    "a trailing comma": (with_members('"n": 1,'), None),
    "a comment": (with_members('"n": 1 /* one */'), None),
    "text behind it": (with_members('"n": 1') + b" x", None),
    "a second document": (with_members('"n": 1') * 2, None),
    "a leading zero": (with_members('"n": 01'), None),
    "NaN": (with_members('"temperature": NaN'), None),
    "Infinity in a member nobody knows": (with_members('"foo": [-Infinity]'), None),
    "a raw line break in a string": (with_members('"user": "a\nb"'), None),
    "a raw NUL in a string": (with_members('"user": "a\0b"'), None),
    "an unknown escape": (with_members(r'"foo": "\x41"'), None),
    "a byte order mark": (b"\xef\xbb\xbf" + json.dumps(HELLO).encode(), None),
    "UTF-16": (json.dumps(HELLO).encode("utf-16"), None),
    "UTF-16 without a mark": (json.dumps(HELLO).encode("utf-16-le"), None),
    "Latin-1": (with_members('"user": "é"').decode().encode("latin-1"), None),
    "a surrogate in UTF-8": (with_members('"user": "?"').replace(b"?", b"\xed\xa0\x80"), None),
    "half a surrogate pair": (with_members(r'"user": "\ud83c"'), None),
    "half a pair where nobody looks": (with_members(r'"foo": {"a": ["\ude00"]}'), None),
    "half a pair in an unknown name": (with_members(r'"max_token\ud83c": 1'), None),
    "half a pair in a message": (json.dumps(HELLO).replace("Hi", r"\udc00").encode(), None),
    "200,000 digits where nobody looks": (with_members('"foo": 1' + "0" * 200_000), None),
    "5,000 arrays": (with_members('"foo": ' + "[" * DEEP + "]" * DEEP), "json_too_deep"),
    "5,000 objects": (with_members('"foo": ' + '{"a":' * DEEP + "1" + "}" * DEEP), "json_too_deep"),
    "200,000 arrays": (with_members('"foo": ' + "[" * 2 * DEEPEST + "]" * 2 * DEEPEST), "json_too_deep"),
    "100,000 objects": (with_members('"foo": ' + '{"a":' * DEEPEST + "1" + "}" * DEEPEST), "json_too_deep"),
    "200,000 arrays that never end": (b"[" * 2 * DEEPEST, "invalid_type"),
    "deep nesting in a known member": (
        with_members('"prediction": ' + '{"a":' * DEEP + "1" + "}" * DEEP),
        "json_too_deep",
    ),
    "deep nesting in a schema": (
        with_members('"tools": [{"type": "custom", "custom": ' + '{"a":' * DEEP + "1" + "}" * DEEP + "}]"),
        "json_too_deep",
    ),
}


@pytest.mark.parametrize("what", NOT_JSON)
async def test_a_body_that_is_no_json_object_is_refused(house: House, adapter: Obliging, what: str) -> None:
    body, code = NOT_JSON[what]
    before = adapter.calls
    assert await refusal(house, body) == (400, code, None)
    assert adapter.calls == before


CHAT_MEMBERS: list[tuple[str, str | None, str | None]] = [
    # ranges
    ('"n": 0', "integer_below_min_value", "n"),
    ('"n": 129', "integer_above_max_value", "n"),
    ('"n": 1000000000', "integer_above_max_value", "n"),
    ('"n": 1.5', "invalid_type", "n"),
    ('"n": "1"', "invalid_type", "n"),
    ('"n": 1e400', "invalid_value", "n"),
    ('"n": 1' + "0" * 400, "integer_above_max_value", "n"),
    ('"n": 1' + "0" * 200_000, "invalid_value", "n"),
    ('"temperature": -0.1', "decimal_below_min_value", "temperature"),
    ('"temperature": 2.01', "decimal_above_max_value", "temperature"),
    ('"temperature": 1e400', "invalid_value", "temperature"),
    ('"temperature": "hot"', "invalid_type", "temperature"),
    ('"top_p": -1', "decimal_below_min_value", "top_p"),
    ('"top_p": 1.1', "decimal_above_max_value", "top_p"),
    ('"presence_penalty": -2.1', "decimal_below_min_value", "presence_penalty"),
    ('"frequency_penalty": 2.1', "decimal_above_max_value", "frequency_penalty"),
    ('"max_tokens": 0', "integer_below_min_value", "max_tokens"),
    ('"max_tokens": -1', "integer_below_min_value", "max_tokens"),
    ('"max_tokens": 1000000000000000000', "integer_above_max_value", "max_tokens"),
    ('"max_tokens": 1e18', "invalid_type", "max_tokens"),
    ('"max_tokens": 1.5', "invalid_type", "max_tokens"),
    ('"max_tokens": true', "invalid_type", "max_tokens"),
    ('"max_completion_tokens": 0', "integer_below_min_value", "max_completion_tokens"),
    ('"seed": 9223372036854775808', "integer_above_max_value", "seed"),
    ('"seed": -9223372036854775809', "integer_below_min_value", "seed"),
    ('"logprobs": true, "top_logprobs": 21', "integer_above_max_value", "top_logprobs"),
    ('"logprobs": true, "top_logprobs": -1', "integer_below_min_value", "top_logprobs"),
    ('"stop": ["a", "b", "c", "d", "e"]', "array_above_max_length", "stop"),
    ('"stop": ["a", 1]', "invalid_type", "stop[1]"),
    ('"logit_bias": {"5": 101}', "decimal_above_max_value", "logit_bias"),
    ('"logit_bias": {"5": "much"}', "invalid_type", "logit_bias"),
    ('"reasoning_effort": "heroic"', "invalid_value", "reasoning_effort"),
    ('"service_tier": "gold\\r\\nset-cookie: a=b"', "invalid_value", "service_tier"),
    ('"verbosity": "' + "loud" * 10_000 + '"', "invalid_value", "verbosity"),
    # what belongs together, and what does not
    ('"max_tokens": 5, "max_completion_tokens": 5', "invalid_parameter_combination", "max_tokens"),
    ('"top_logprobs": 2', None, "top_logprobs"),
    ('"top_logprobs": 2, "logprobs": false', None, "top_logprobs"),
    ('"stream_options": {"include_usage": true}', None, "stream_options"),
    ('"stream_options": {"include_usage": true}, "stream": false', None, "stream_options"),
    ('"stream": true, "stream_options": {"include_usage": "yes"}', "invalid_type", "stream_options.include_usage"),
    ('"store": true', "unsupported_parameter", "store"),
    # tools
    ('"tools": [7]', "invalid_type", "tools[0]"),
    ('"tools": [{}]', "missing_required_parameter", "tools[0].type"),
    ('"tools": [{"type": "function"}]', "missing_required_parameter", "tools[0].function"),
    (
        '"tools": [{"type": "function", "function": {}}]',
        "missing_required_parameter",
        "tools[0].function.name",
    ),
    (
        '"tools": [{"type": "function", "function": {"name": "a b"}}]',
        "invalid_value",
        "tools[0].function.name",
    ),
    (
        f'"tools": {json.dumps([{"type": "function", "function": {"name": "f"}}] * 129)}',
        "array_above_max_length",
        "tools",
    ),
    ('"tool_choice": "required"', None, "tool_choice"),
    ('"tool_choice": "sometimes"', "invalid_value", "tool_choice"),
    ('"tool_choice": {"type": "function", "function": {"name": "f"}}', None, "tool_choice"),
    *(
        (
            f'"tools": [{{"type": "function", "function": {{"name": "f"}}}}], "tool_choice": {choice}',
            "invalid_value",
            "tool_choice",
        )
        for choice in (
            '{"type": "function", "function": {"name": "g"}}',
            '{"type": "function", "function": {"name": ["f"]}}',
            '{"type": "function", "function": "f"}',
            '{"type": "function"}',
            '{"type": ["function"]}',
            '{"name": "f"}',
        )
    ),
    ('"response_format": {"type": "xml"}', "invalid_value", "response_format.type"),
    ('"response_format": {"type": "json_schema"}', "missing_required_parameter", "response_format.json_schema"),
    (
        '"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}',
        "invalid_value",
        "response_format.json_schema.name",
    ),
    # metadata
    ('"metadata": {"a": 1}', "invalid_type", "metadata"),
    (f'"metadata": {json.dumps({str(i): "" for i in range(17)})}', "invalid_value", "metadata"),
    (f'"metadata": {{"{"k" * 65}": "v"}}', "invalid_value", "metadata"),
    (f'"metadata": {{"k": "{"v" * 513}"}}', "invalid_value", "metadata"),
    # names
    ('"max_token": 5', "unknown_parameter", "max_token"),
    ('"temprature": 0', "unknown_parameter", "temprature"),
    ('"Temperature": 0', "unknown_parameter", "Temperature"),
    ('"top_kk": 5', "unknown_parameter", "top_kk"),
    ('"prompt": "Hi"', "unknown_parameter", "prompt"),
    ('"input": "Hi"', "unknown_parameter", "input"),
    ('"echo": true', "unknown_parameter", "echo"),
    ('"top_k": 5', "unsupported_parameter", "top_k"),
    ('"guided_regex": ".*"', "unsupported_parameter", "guided_regex"),
    (json.dumps({f"zz{i}": i for i in range(101)})[1:-1], "unknown_parameter", None),
    *((f'"{name}": 1', "unknown_parameter", name) for name in sorted(OPERATOR_FIELDS)),
    (r'"chat\u005ftemplate": "x"', "unknown_parameter", "chat_template"),
    ('"request_id"\t : "x"', "unknown_parameter", "request_id"),
    ('"foo": [{"bar": {"priority": 1}}]', "unknown_parameter", "foo[0].bar.priority"),
    (r'"foo": {"\u0063hat_template": "x"}', "unknown_parameter", "foo.chat_template"),
    ('"chat_template_kwargs": {"chat_template": "x"}', "unknown_parameter", "chat_template_kwargs.chat_template"),
    ('"stream": true, "stream_options": {"rid": 1}', "unknown_parameter", "stream_options.rid"),
    # duplicate keys
    ('"model": "dear"', None, "model"),
    ('"n": 1, "n": 1', None, "n"),
    ('"foo": [{"a": {"b": 1, "c": 2, "b": 3}}]', None, "b"),
    (r'"n": 1, "\u006e": 2', None, "n"),
    (f'"{"k" * 10_000}": 1, "{"k" * 10_000}": 1', None, "k" * 100),
]


async def test_each_wrong_member_of_a_chat_request_is_named(house: House, adapter: Obliging) -> None:
    before = adapter.calls
    found = [await refusal(house, with_members(members)) for members, _, _ in CHAT_MEMBERS]
    wrong = [
        (members[:100], answer)
        for (members, code, param), answer in zip(CHAT_MEMBERS, found, strict=True)
        if answer != (400, code, param)
    ]
    assert wrong == []
    assert adapter.calls == before


USER = {"role": "user", "content": "Hi"}
MESSAGES: list[tuple[Any, str | None, str]] = [
    ([], "empty_array", "messages"),
    ([{}], "missing_required_parameter", "messages[0].role"),
    ([USER, 7], "invalid_type", "messages[1]"),
    ([{"role": "wizard", "content": "Hi"}], "invalid_value", "messages[0].role"),
    ([{"role": None, "content": "Hi"}], "invalid_type", "messages[0].role"),
    ([USER, {"role": "user"}], "missing_required_parameter", "messages[1].content"),
    ([{"role": "user", "content": None}], "invalid_type", "messages[0].content"),
    ([{"role": "user", "content": 7}], "invalid_type", "messages[0].content"),
    ([{"role": "user", "content": {"text": "Hi"}}], "invalid_type", "messages[0].content"),
    ([{"role": "user", "content": []}], "empty_array", "messages[0].content"),
    ([{"role": "user", "content": ["Hi"]}], "invalid_type", "messages[0].content[0]"),
    ([{"role": "user", "content": [{"text": "Hi"}]}], "missing_required_parameter", "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": "text"}]}], "missing_required_parameter", "messages[0].content[0].text"),
    (
        [{"role": "user", "content": [{"type": "image_url"}]}],
        "missing_required_parameter",
        "messages[0].content[0].image_url",
    ),
    ([{"role": "user", "content": [{"type": "smell", "text": "x"}]}], "invalid_value", "messages[0].content[0].type"),
    (
        [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}],
        "invalid_value",
        "messages[0].content[0].type",
    ),
    (
        [{"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}],
        "invalid_value",
        "messages[0].content[0].type",
    ),
    ([USER, {"role": "assistant"}], "missing_required_parameter", "messages[1].content"),
    ([USER, {"role": "assistant", "content": None}], "missing_required_parameter", "messages[1].content"),
    (
        [USER, {"role": "assistant", "content": None, "tool_calls": []}],
        "missing_required_parameter",
        "messages[1].content",
    ),
    ([{"role": "tool", "content": "7"}], "missing_required_parameter", "messages[0].tool_call_id"),
    ([{"role": "tool", "tool_call_id": "a"}], "missing_required_parameter", "messages[0].content"),
    (
        [{"role": "assistant", "tool_calls": [{"id": "a", "type": "function"}]}],
        "missing_required_parameter",
        "messages[0].tool_calls[0].function",
    ),
    (
        [{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": {}}}]}],
        "invalid_type",
        "messages[0].tool_calls[0].function.arguments",
    ),
    ([{"role": "user", "content": "Hi", "name": 7}], "invalid_type", "messages[0].name"),
    ([{"role": "user", "content": "Hi", "chat_template": "x"}], "unknown_parameter", "messages[0].chat_template"),
]


async def test_each_fault_in_the_messages_is_named_with_its_place(house: House, adapter: Obliging) -> None:
    before = adapter.calls
    found = [await refusal(house, {**HELLO, "messages": messages}) for messages, _, _ in MESSAGES]
    expected = [(400, code, param) for _, code, param in MESSAGES]
    assert found == expected
    assert adapter.calls == before


OTHERS: list[tuple[Endpoint, str, str | None, str]] = [
    (COMPLETIONS, '"prompt": 7', "invalid_type", "prompt"),
    (COMPLETIONS, '"prompt": []', "empty_array", "prompt"),
    (COMPLETIONS, '"prompt": [[]]', "invalid_type", "prompt"),
    (COMPLETIONS, '"prompt": ["a", 1]', "invalid_type", "prompt"),
    (COMPLETIONS, '"prompt": [1, -1]', "invalid_type", "prompt"),
    (COMPLETIONS, '"prompt": [1, true]', "invalid_type", "prompt"),
    (COMPLETIONS, '"prompt": [1, 4294967296]', "invalid_type", "prompt"),
    (COMPLETIONS, '"prompt": [[1], ["a"]]', "invalid_type", "prompt"),
    (COMPLETIONS, '"prompt": [[[1]]]', "invalid_type", "prompt"),
    (COMPLETIONS, '"prompt": "a", "max_tokens": -1', "integer_below_min_value", "max_tokens"),
    (COMPLETIONS, '"prompt": "a", "logprobs": 6', "integer_above_max_value", "logprobs"),
    (COMPLETIONS, '"prompt": "a", "logprobs": true', "invalid_type", "logprobs"),
    (COMPLETIONS, '"prompt": "a", "best_of": 21', "integer_above_max_value", "best_of"),
    (COMPLETIONS, '"prompt": "a", "best_of": 2, "n": 3', "invalid_value", "best_of"),
    (COMPLETIONS, '"prompt": "a", "best_of": 2, "stream": true', "invalid_value", "best_of"),
    (COMPLETIONS, '"prompt": "a", "messages": []', "unknown_parameter", "messages"),
    (COMPLETIONS, '"prompt": "a", "max_completion_tokens": 5', "unknown_parameter", "max_completion_tokens"),
    (COMPLETIONS, '"prompt": "a", "stream_options": {"include_usage": true}', None, "stream_options"),
    (EMBEDDINGS, '"user": "a"', "missing_required_parameter", "input"),
    (EMBEDDINGS, '"input": ""', "invalid_value", "input"),
    (EMBEDDINGS, '"input": []', "empty_array", "input"),
    (EMBEDDINGS, '"input": {}', "invalid_type", "input"),
    (EMBEDDINGS, '"input": [1.5]', "invalid_type", "input"),
    (EMBEDDINGS, f'"input": {json.dumps(["a"] * 2049)}', "array_above_max_length", "input"),
    (EMBEDDINGS, '"input": "a", "encoding_format": "hex"', "invalid_value", "encoding_format"),
    (EMBEDDINGS, '"input": "a", "dimensions": 0', "integer_below_min_value", "dimensions"),
    (EMBEDDINGS, '"input": "a", "stream": true', "unknown_parameter", "stream"),
    (EMBEDDINGS, '"input": "a", "dimension": 5', "unknown_parameter", "dimension"),
]


async def test_completions_and_embeddings_have_rules_of_their_own(house: House, adapter: Obliging) -> None:
    before = adapter.calls
    found = [await refusal(house, f'{{"model": "smart", {m}}}'.encode(), e.path) for e, m, _, _ in OTHERS]
    expected = [(400, code, param) for _, _, code, param in OTHERS]
    assert found == expected
    assert adapter.calls == before


SAMPLES = {"boolean": True, "integer": 1, "number": 0.5, "string": "none", "array": [[0.5]], "object": {"a": 0.5}}
TAKES: dict[str, dict[str, str]] = {
    CHAT.path: {
        "string": "model stop user safety_identifier prompt_cache_key prompt_cache_retention tool_choice "
        "function_call reasoning_effort verbosity service_tier",
        "boolean": "stream logprobs parallel_tool_calls store",
        "integer": "max_tokens max_completion_tokens n seed top_logprobs",
        "number": "temperature top_p presence_penalty frequency_penalty",
        "array": "messages stop tools functions modalities",
        "object": "stream_options logit_bias response_format tool_choice function_call audio prediction "
        "web_search_options moderation metadata prompt_cache_options",
    },
    COMPLETIONS.path: {
        "string": "model prompt suffix stop user",
        "boolean": "stream echo",
        "integer": "max_tokens n best_of seed logprobs",
        "number": "temperature top_p presence_penalty frequency_penalty",
        "array": "prompt stop",
        "object": "stream_options logit_bias",
    },
    EMBEDDINGS.path: {
        "string": "model input encoding_format user",
        "integer": "dimensions",
        "array": "input",
    },
}
"""The JSON types that OpenAI's description gives each parameter; a number may be an integer."""


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS, EMBEDDINGS], ids=PATHS)
async def test_every_parameter_refuses_every_other_type_by_name(
    house: House, adapter: Obliging, endpoint: Endpoint
) -> None:
    takes = {kind: names.split() for kind, names in TAKES[endpoint.path].items()}
    assert set().union(*takes.values()) == endpoint.known
    before, wrong = adapter.calls, []
    for name in sorted(endpoint.known):
        right = {kind for kind, names in takes.items() if name in names}
        right |= {"integer"} if "number" in right else set()
        for kind in SAMPLES.keys() - right:
            status, code, param = await refusal(house, {**VALID[endpoint.path], name: SAMPLES[kind]}, endpoint.path)
            if (status, code, param) != (400, "invalid_type", name):
                wrong.append((name, kind, status, code, param))
    assert wrong == []
    assert adapter.calls == before


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS, EMBEDDINGS], ids=PATHS)
async def test_null_stands_for_the_default_wherever_there_is_one(house: House, endpoint: Endpoint) -> None:
    refused = []
    for name in sorted(endpoint.known):
        response = await house.post({**VALID[endpoint.path], name: None}, endpoint.path)
        if response.status_code != 200:
            refused.append((name, error_of(response)["param"]))
    required = {"chat/completions": ["messages", "model"], "completions": ["model"], "embeddings": ["input", "model"]}
    assert refused == [(name, name) for name in required[endpoint.path]]


async def test_what_lies_on_the_border_is_taken(house: House) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"priority": {"api_key": 1}}}}}
    taken: list[dict[str, Any]] = [
        {"temperature": 0, "top_p": 0, "presence_penalty": -2, "frequency_penalty": 2, "n": 128},
        {"temperature": 2.0, "top_p": 1, "max_tokens": 2**31 - 1, "seed": -(2**63)},
        {"seed": 2**63 - 1, "stop": ["a", "b", "c", "d"], "logprobs": True, "top_logprobs": 20},
        {"logit_bias": {"5": -100, "7": 100}, "metadata": {f"{i:064}": "v" * 512 for i in range(16)}},
        {"metadata": {"priority": "high", "session_id": "7"}, "store": False},
        {"tools": [tool] * 128, "tool_choice": "required"},
        {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"request_id": {}}}}},
        {"stream": True, "stream_options": {"include_usage": True}, "user": "a\0b\r\nc 🎉"},
        {"stream_options": {}, "tools": [], "stop": "", "logit_bias": {}, "foo": [[[]]] * 50},
        {"messages": [{"role": "assistant", "content": ""}, {"role": "developer", "content": "x"}]},
        {"messages": [HELLO["messages"][0], {"role": "function", "name": "f", "content": None}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "\U0001f389"}], "name": "a"}]},
    ]
    answers = [await house.post({**HELLO, **changes}) for changes in taken]
    assert [answer.text for answer in answers if answer.status_code != 200] == []


async def test_an_extension_that_asks_for_nothing_is_taken_where_nobody_knows_it(house: House) -> None:
    off: dict[str, Any] = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": False, "bad_words": []}
    nulls = dict.fromkeys(["top_p", "top_a", "guided_json", "max_token", "prompt", "mirostat"])
    response = await house.post({**HELLO, **off, **nulls, "chat_template_kwargs": {}, "echo": False})
    assert (response.status_code, response.headers.get("x-suiron-ignored")) == (200, None)
    for name, value in {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1, "bad_words": ["a"]}.items():
        assert await refusal(house, {**HELLO, name: value}) == (400, "unsupported_parameter", name)


async def test_a_value_out_of_a_few_is_answered_with_those_few(house: House) -> None:
    wrong: list[dict[str, Any]] = [
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"response_format": {"type": "xml"}},
        {"reasoning_effort": "heroic"},
        {"service_tier": "gold"},
    ]
    says = [error_of(await house.post({**HELLO, **changes}))["message"] for changes in wrong]
    named = [set(re.findall(r"'(\w+)'", message.partition("Supported")[2])) for message in says]
    assert named == [
        {"developer", "system", "user", "assistant", "tool", "function"},
        {"text", "json_object", "json_schema"},
        {"none", "minimal", "low", "medium", "high", "xhigh", "max"},
        {"auto", "default", "flex", "scale", "priority", "fast"},
    ]


async def test_names_that_nobody_knows_are_taken_and_said_in_a_clean_header(house: House) -> None:
    strange = {"frobnicate": 1, "a\r\nset-cookie: b=c": 1, "é\0": {"x": 1}, "z" * 5000: 1, "x,y": 1}
    response = await house.post({**HELLO, **strange})
    assert response.status_code == 200
    assert "set-cookie" not in response.headers
    ignored = response.headers["x-suiron-ignored"].split(", ")
    assert ignored == ["a??set-cookie??b?c", "frobnicate", "x?y", "z" * 64, "??"]


NAMES = ["nope", "", " smart", "Smart", "smart\0", "a\r\nset-cookie: b=c", "é🎉", "../../etc/passwd", "x" * 500_000]


@pytest.mark.parametrize("path", PATHS)
async def test_an_unknown_model_is_404_whatever_its_name_holds(house: House, adapter: Obliging, path: str) -> None:
    before = adapter.calls
    for name in NAMES:
        assert await refusal(house, {**VALID[path], "model": name}, path) == (404, "model_not_found", "model"), name
    assert adapter.calls == before


@pytest.mark.parametrize("path", PATHS)
async def test_a_model_that_is_not_there_goes_before_a_wrong_parameter_but_not_before_a_malformed_body(
    house: House, path: str
) -> None:
    wrong = {**VALID[path], "model": "nope", "user": 7}
    assert await refusal(house, wrong, path) == (404, "model_not_found", "model")
    assert await refusal(house, {**wrong, "model": "smart"}, path) == (400, "invalid_type", "user")
    assert (await refusal(house, json.dumps(wrong).encode() + b"x", path))[0] == 400


async def test_no_model_is_400(house: House) -> None:
    for path, valid in VALID.items():
        missing = {name: value for name, value in valid.items() if name != "model"}
        assert await refusal(house, missing, path) == (400, None, "model")


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/v1/chat/completions", 405, "POST"),
        ("DELETE", "/v1/chat/completions", 405, "POST"),
        ("PUT", "/v1/embeddings", 405, "POST"),
        ("POST", "/v1/models", 405, "GET"),
        ("DELETE", "/v1/models/smart", 405, "GET"),
        ("POST", "/v1/chat/completion", 404, None),
        ("POST", "/chat/completions", 404, None),
        ("GET", "/v1", 404, None),
        ("GET", "/v1/%0d%0aset-cookie:%20a=b/%ff%00", 404, None),
        ("GET", "/" + "a" * 5000, 404, None),
        ("POST", "/v1/../v1/chat/completions", 404, None),
        ("TRACE", "/v1/models", 405, "GET"),
    ],
)
async def test_an_unknown_route_is_404_and_a_wrong_method_405(
    house: House, method: str, path: str, status: int, allow: str | None
) -> None:
    answer = await talk(house, f"{method} {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n".encode())
    response = parsed(answer)
    error = error_of(response)
    assert (response.status_code, response.headers.get("allow")) == (status, allow)
    assert error["code"] == ("method_not_supported" if status == 405 else None)


@pytest.mark.parametrize(
    ("content_type", "taken"),
    [
        ("application/json; charset=utf-8", True),
        ("Application/JSON;charset=UTF-8", True),
        ("", False),
        ("text/plain", False),
        ("application/x-www-form-urlencoded", False),
        ("multipart/form-data; boundary=x", False),
        ("application/json-patch", False),
        ("é" * 3000, False),
    ],
)
async def test_the_content_type_must_be_json_with_any_charset(house: House, content_type: str, taken: bool) -> None:
    head = request_head(f"content-type: {content_type}".encode(), length=len(json.dumps(HELLO)))
    response = parsed(await talk(house, head, json.dumps(HELLO).encode()))
    assert response.status_code == (200 if taken else 400)
    assert taken or error_of(response)["code"] == "unsupported_content_type"


# On the wire.


def request_head(*lines: bytes, length: int | None = None, key: bool = True, close: bool = True) -> bytes:
    fields = [b"host: a", *lines]
    fields += [f"authorization: {AUTH['authorization']}".encode()] if key else []
    fields += [b"content-length: %d" % length] if length is not None else []
    fields += [b"connection: close"] if close else []
    return b"POST /v1/chat/completions HTTP/1.1\r\n" + b"\r\n".join(fields) + b"\r\n\r\n"


JSON_TYPE = b"content-type: application/json"


async def talk(house: House, *blocks: bytes, until: bytes | None = None) -> bytes:
    """What the gateway says to *blocks* before it closes, or up to *until*; it must do so soon."""
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", house.port)
        try:
            for block in blocks:
                writer.write(block)
                await writer.drain()
            return await (reader.readuntil(until) if until else reader.read())
        finally:
            writer.close()


def parsed(answer: bytes) -> httpx2.Response:
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode("ascii").split("\r\n")
    fields = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    return httpx2.Response(int(first.split()[1]), headers=fields, content=body)


async def test_a_body_over_the_limit_is_413_before_it_is_sent(house: House, adapter: Obliging) -> None:
    before = adapter.calls
    response = parsed(await talk(house, request_head(JSON_TYPE, length=10**9), until=b"}}"))
    assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")
    assert response.headers["connection"] == "close"
    assert adapter.calls == before


async def test_a_chunked_body_over_the_limit_is_413_while_it_is_sent(house: House, adapter: Obliging) -> None:
    before = adapter.calls
    block = b"%x\r\n%b\r\n" % (LIMIT // 4, b" " * (LIMIT // 4))
    head = request_head(JSON_TYPE, b"transfer-encoding: chunked")
    response = parsed(await talk(house, head, *[block] * 5, until=b"}}"))
    assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")
    assert adapter.calls == before


async def test_a_body_at_the_limit_is_taken(house: House) -> None:
    body = json.dumps(HELLO).encode().ljust(LIMIT)
    assert (await house.post(body)).status_code == 200
    assert (await refusal(house, body + b" "))[0] == 413


async def test_a_body_that_does_not_come_is_408() -> None:
    async with scripted(Obliging(), server=Server(body_timeout_s=0.1)) as house:
        response = parsed(await talk(house, request_head(JSON_TYPE, length=500, close=False), b'{"model"'))
    assert (response.status_code, error_of(response)["code"]) == (408, "request_timeout")
    assert response.headers["connection"] == "close"


async def test_a_body_longer_than_declared_is_no_second_request(house: House, adapter: Obliging) -> None:
    body, before = json.dumps(HELLO).encode(), adapter.calls
    answer = await talk(house, request_head(JSON_TYPE, length=len(body) - 5, close=False), body + b"\r\n\r\n")
    assert set(re.findall(rb"HTTP/1.1 (\d+)", answer)) == {b"400"}
    assert adapter.calls == before


@pytest.mark.parametrize(
    "lines",
    [
        [b"content-length: 5", b"transfer-encoding: chunked"],
        [b"content-length: 5", b"content-length: 6"],
        [b"content-length: -1"],
        [b"content-length: 0x10"],
        [b"content-length: " + b"9" * 5000],
        [b"content-length : 5"],
        [b"transfer-encoding: chunked, identity"],
        [b"x: a\0b"],
    ],
    ids=lambda lines: b" + ".join(lines).decode()[:60],
)
async def test_ambiguous_framing_is_refused_and_the_connection_closed(
    house: House, adapter: Obliging, lines: list[bytes]
) -> None:
    before = adapter.calls
    second = request_head(JSON_TYPE, length=len(json.dumps(HELLO))) + json.dumps(HELLO).encode()
    answer = await talk(house, request_head(JSON_TYPE, *lines, close=False), b"0\r\n\r\n", second)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert adapter.calls == before


# A stranger.


async def test_a_stranger_is_refused_before_anything_else_is_looked_at(house: House, adapter: Obliging) -> None:
    before = adapter.calls
    huge = [request_head(JSON_TYPE, length=length, key=False, close=False) for length in (50, 10**9)]
    for head in [*huge, request_head(b"content-type: text/plain", b"expect: 100-continue", length=50, key=False)]:
        response = parsed(await talk(house, head, until=b"}}"))
        assert response.status_code == 401
        error_of(response)
    for body in (b"", b"{", {"model": "nope"}, {**HELLO, "n": "x"}, {**HELLO, "chat_template": "x"}):
        assert await refusal(house, body, authorization="") == (401, None, None)
    assert adapter.calls == before


# Whatever comes.

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=10)
    | st.sampled_from(["user", "assistant", "tool", "text", "function", "smart", "required"])
)
NAMES_OR_TEXT = st.sampled_from(sorted(CHAT.known | COMPLETIONS.known | {"role", "content", "name", "type"})) | st.text(
    max_size=10
)
DOCUMENTS = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES_OR_TEXT, inner, max_size=4), max_leaves=8
)
FULL: dict[str, Any] = {
    **HELLO,
    "messages": [
        {"role": "system", "content": [{"type": "text", "text": "a"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "a", "content": "b"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}},
    "stream": True,
    "stream_options": {"include_usage": True},
    "stop": ["a"],
    "logit_bias": {"1": 1},
    "metadata": {"a": "b"},
    "logprobs": True,
    "top_logprobs": 1,
}


@st.composite
def mutations(draw: st.DrawFn) -> Any:
    """A valid request in which a few members were taken out, exchanged or added, anywhere."""
    document = json.loads(json.dumps(FULL))
    for _ in range(draw(st.integers(1, 3))):
        here: Any = document
        while True:
            steps = list(here) if isinstance(here, dict) else list(range(len(here)))
            step = draw(st.sampled_from(steps)) if steps else None
            if step is None or not isinstance(here[step], dict | list) or draw(st.booleans()):
                break
            here = here[step]
        change = draw(st.sampled_from(["delete", "replace", "insert"]))
        if change == "insert" and isinstance(here, dict):
            here[draw(NAMES_OR_TEXT)] = draw(DOCUMENTS)
        elif change == "insert":
            here.append(draw(DOCUMENTS))
        elif step is not None and change == "delete":
            del here[step]
        elif step is not None:
            here[step] = draw(DOCUMENTS)
    return document


async def holds(house: House, body: Any, path: str) -> None:
    response = await house.post(body, path)
    if response.status_code == 200:
        assert b'"error"' not in response.content
    else:
        assert response.status_code in (400, 404), response.text
        error_of(response)


@given(document=DOCUMENTS, path=st.sampled_from(PATHS))
@settings(max_examples=150, deadline=None)
async def test_no_document_at_all_breaks_the_gateway(house: House, document: Any, path: str) -> None:
    await holds(house, json.dumps(document).encode(), path)
    if isinstance(document, dict):
        await holds(house, {**VALID[path], **document}, path)


@given(document=mutations())
@settings(max_examples=300, deadline=None)
async def test_no_change_to_a_valid_request_breaks_the_gateway(house: House, document: Any) -> None:
    await holds(house, document, CHAT.path)


@given(body=st.binary(max_size=100))
@settings(max_examples=100, deadline=None)
async def test_no_bytes_break_the_gateway(house: House, body: bytes) -> None:
    await holds(house, body, CHAT.path)
