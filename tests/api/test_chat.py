"""Does a chat completion through the gateway look to the OpenAI SDK as one from OpenAI does?"""

import gzip
import json
import re
from typing import Any

import anyio.to_thread
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from tests.api.conftest import Stage
from tests.house import AUTH, HELLO, TOKEN, USAGE, Script, completion, json_reply

pytestmark = pytest.mark.anyio

TEXTS = [
    "推論は「考え」を導く。",
    "👩‍👩‍👧‍👦 🇯🇵🇨🇭 👋🏽 é ก็",
    "line\u2028separator\u2029and\x85next\r\n\tline",
    'quotes " \\ / </script> \x00 \x1f \u200b\ufeff',
    'null, "usage":null, data: [DONE]\n\ndata: {}',
]


class Weather(BaseModel):
    """What the weather tool takes, and what an answer about the weather looks like."""

    city: str
    celsius: int


CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "Weather", "arguments": '{"city":"Zürich","celsius":3}'},
}


def message(**members: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "refusal": None} | members


def choices(*indexes: int, **changes: Any) -> dict[str, Any]:
    whole = completion()
    each = [whole["choices"][0] | {"index": index, "message": message(content=f"c{index}")} for index in indexes]
    return whole | {"choices": each} | changes


# The SDK.


async def test_the_async_sdk_reads_an_answer_and_its_request_id(stage: Stage) -> None:
    stage.first.script = json_reply(completion("Hello"))
    answer = await stage.house.openai.chat.completions.create(**HELLO)
    assert answer.choices[0].message.content == "Hello"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 5
    assert answer._request_id is not None
    assert answer._request_id.startswith("req_")


@pytest.mark.parametrize("base", ["/v1", "/v1/"])
async def test_the_sync_sdk_reads_an_answer_whether_or_not_its_base_url_ends_in_a_slash(
    stage: Stage, base: str
) -> None:
    stage.first.script = json_reply(completion("Hello"))

    def ask() -> Any:
        with OpenAI(base_url=stage.house.url + base, api_key=TOKEN, max_retries=0) as client:
            return client.chat.completions.create(**HELLO).choices[0].message.content

    assert await anyio.to_thread.run_sync(ask) == "Hello"


async def test_the_raw_response_of_the_sdk_has_the_headers_and_parses(stage: Stage) -> None:
    stage.first.script = json_reply(completion("Hello"))
    raw = await stage.house.openai.chat.completions.with_raw_response.create(**HELLO)
    assert raw.headers["content-type"] == "application/json"
    assert raw.headers["openai-version"] == "2020-10-01"
    assert int(raw.headers["openai-processing-ms"]) >= 0
    assert raw.parse().choices[0].message.content == "Hello"


async def test_a_structured_answer_is_parsed_by_the_sdk(stage: Stage) -> None:
    stage.first.script = json_reply(completion('{"city":"東京","celsius":-1}'))
    answer = await stage.house.openai.chat.completions.parse(**HELLO, response_format=Weather)
    assert answer.choices[0].message.parsed == Weather(city="東京", celsius=-1)
    assert stage.sent["response_format"]["json_schema"]["strict"] is True


async def test_tool_calls_are_parsed_by_the_sdk(stage: Stage) -> None:
    stage.first.script = json_reply(completion(message=message(tool_calls=[CALL]), finish_reason="tool_calls"))
    tool = openai.pydantic_function_tool(Weather)
    answer = await stage.house.openai.chat.completions.parse(**HELLO, tools=[tool])
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == Weather(city="Zürich", celsius=3)
    assert answer.choices[0].message.content is None
    assert stage.sent["tools"][0]["function"]["name"] == "Weather"


# The answer, to the letter.


async def test_the_envelope_is_the_gateways_and_all_required_nulls_are_there(stage: Stage) -> None:
    answer = await stage.answer(json_reply(completion("Hello")))
    assert answer.pop("id").startswith("chatcmpl-")
    assert type(answer.pop("created")) is int
    assert answer == {
        "object": "chat.completion",
        "model": "smart",
        "choices": [
            {"index": 0, "message": message(content="Hello"), "logprobs": None, "finish_reason": "stop"},
        ],
        "usage": USAGE,
    }


async def test_every_answer_has_an_id_of_its_own_that_is_not_the_upstreams(stage: Stage) -> None:
    ids = {(await stage.answer(json_reply(completion())))["id"] for _ in range(5)}
    assert len(ids) == 5
    assert "up-1" not in ids


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("escaped", [False, True], ids=["utf-8", "escapes"])
async def test_text_arrives_as_it_was_sent(stage: Stage, text: str, escaped: bool) -> None:
    document = json.dumps(completion(text), ensure_ascii=escaped).encode()
    stage.first.script = json_reply(document)
    asked: Any = HELLO | {"messages": [{"role": "user", "content": text}]}
    answer = await stage.house.openai.chat.completions.create(**asked)
    assert answer.choices[0].message.content == text
    assert stage.sent["messages"][0]["content"] == text


BARE = {"message": {"content": "Hello"}, "finish_reason": "stop"}
FULL = {"index": 0, "message": message(content="Hello"), "logprobs": None, "finish_reason": "stop"}
NULLS = {"annotations": None, "audio": None, "function_call": None, "tool_calls": None, "reasoning_content": None}
LOGPROB = {"token": "null", "logprob": -0.1, "bytes": None, "top_logprobs": []}
UNTIDY_CALL = CALL | {"index": None, "function": {**CALL["function"], "description": None}}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("received", "answered"),
    [
        pytest.param(BARE, FULL, id="missing members are added"),
        pytest.param({k: v for k, v in FULL.items() if k != "index"}, FULL, id="the index too"),
        pytest.param(FULL | {"message": {"content": "Hello", "refusal": None}}, FULL, id="the role too"),
        pytest.param(FULL | {"message": message(content="Hello", **NULLS)}, FULL, id="nulls of a message go"),
        pytest.param(FULL | {"stop_reason": None, "token_ids": None}, FULL, id="nulls of a choice go"),
        pytest.param(
            FULL | {"message": message(content="null")}, FULL | {"message": message(content="null")}, id="a text stays"
        ),
        pytest.param(
            FULL | {"message": message(refusal="No.")}, FULL | {"message": message(refusal="No.")}, id="a refusal stays"
        ),
        pytest.param(
            FULL | {"message": message(tool_calls=[UNTIDY_CALL]), "finish_reason": "tool_calls"},
            FULL | {"message": message(tool_calls=[CALL]), "finish_reason": "tool_calls"},
            id="nulls of a tool call go",
        ),
        pytest.param(
            FULL | {"logprobs": {"content": [LOGPROB]}},
            FULL | {"logprobs": {"content": [LOGPROB], "refusal": None}},
            id="logprobs have both lists",
        ),
    ],
)
async def test_nulls_that_are_required_stay_and_all_others_go(stage: Stage, received: Any, answered: Any) -> None:
    answer = await stage.answer(json_reply(completion() | {"choices": [received]}))
    assert answer["choices"] == [answered]


async def test_null_members_of_the_answer_itself_go_and_others_stay(stage: Stage) -> None:
    document = completion() | {"system_fingerprint": None, "prompt_logprobs": None, "service_tier": "default"}
    answer = await stage.answer(json_reply(document))
    assert set(answer) == {"id", "object", "created", "model", "choices", "usage", "service_tier"}


@pytest.mark.parametrize(
    ("received", "answered"),
    [
        (USAGE, USAGE),
        (USAGE | {"total_tokens": 99}, USAGE),
        ({"prompt_tokens": 3, "completion_tokens": 2}, USAGE),
        (USAGE | {"prompt_tokens_details": None, "completion_tokens_details": None}, USAGE),
        (
            USAGE | {"prompt_tokens_details": {"cached_tokens": 1, "audio_tokens": None}},
            USAGE | {"prompt_tokens_details": {"cached_tokens": 1}},
        ),
        ({"prompt_tokens": -3, "completion_tokens": 2, "total_tokens": -1}, None),
    ],
)
async def test_usage_adds_up_and_has_no_nulls(stage: Stage, received: Any, answered: Any) -> None:
    answer = await stage.answer(json_reply(completion() | {"usage": received}))
    assert answer.get("usage") == answered


@pytest.mark.parametrize("received", [None, "flex"])
async def test_who_asks_for_a_tier_is_told_which_it_was(stage: Stage, received: str | None) -> None:
    script = json_reply(completion() | {"service_tier": received})
    assert (await stage.answer(script, service_tier="auto"))["service_tier"] == received or "default"
    assert (await stage.answer(script)).get("service_tier") == received


@pytest.mark.parametrize("indexes", [(0, 1, 2), (2, 0, 1), (0, 1, 2, 3)])
async def test_choices_come_in_order_and_no_more_than_were_asked_for(stage: Stage, indexes: tuple[int, ...]) -> None:
    answer = await stage.answer(json_reply(choices(*indexes)), n=3)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["c0", "c1", "c2"]


@pytest.mark.parametrize("reason", [None, "", "stop"])
async def test_an_answer_with_a_choice_missing_or_unfinished_is_an_error(stage: Stage, reason: str | None) -> None:
    script = json_reply(completion(finish_reason=reason))
    response = await stage.post(script, n=1 if not reason else 2)
    assert response.status_code == 502


async def test_usage_that_no_upstream_tells_is_our_own_count(stage: Stage) -> None:
    answer = {name: value for name, value in completion("Hello").items() if name != "usage"}
    usage = (await stage.post(json_reply(answer))).json()["usage"]
    assert min(usage["prompt_tokens"], usage["completion_tokens"]) > 0
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


# Headers.


async def test_every_answer_has_a_request_id_and_the_version(stage: Stage) -> None:
    house = stage.house
    answers = [
        await stage.post(json_reply(completion())),
        await stage.post(json_reply(completion()), n=0),
        await stage.post(json_reply(completion()), stream=True),
        await house.http.post(f"{house.url}/v1/chat/completions", json=HELLO),
        await house.http.get(f"{house.url}/v1/nowhere", headers=AUTH),
        await house.http.get(f"{house.url}/v1/models/nobody", headers=AUTH),
    ]
    assert [answer.status_code for answer in answers] == [200, 400, 502, 401, 404, 404]
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(answers)
    assert {answer.headers["openai-version"] for answer in answers} == {"2020-10-01"}
    assert {answer.headers["content-type"] for answer in answers} == {"application/json"}
    assert all("openai-processing-ms" in answer.headers for answer in answers if answer.status_code == 200)


async def test_so_does_every_answer_beside_the_api(stage: Stage) -> None:
    house = stage.house
    named = {"x-request-id": "mine"}
    answers = [
        await house.http.request(method, f"{house.url}{path}", headers={**AUTH, **named})
        for method, path in [
            ("GET", "/health/live"),
            ("GET", "/health/ready"),
            ("GET", "/metrics"),
            ("GET", "/"),
            ("GET", "/v1/models"),
            ("HEAD", "/v1/models"),
            ("OPTIONS", "/v1/models"),
            ("OPTIONS", "/v1/nowhere"),
        ]
    ]
    assert {answer.headers.get("x-request-id") for answer in answers} == {"mine"}
    assert {answer.headers.get("openai-version") for answer in answers} == {"2020-10-01"}


async def test_a_base_url_without_its_version_is_set_right(stage: Stage) -> None:
    answer = await stage.house.http.post(f"{stage.house.url}/chat/completions", headers=AUTH, json=HELLO)
    assert answer.status_code == 404
    assert answer.json()["error"]["message"].endswith("Did you mean /v1/chat/completions?")


async def test_an_endpoint_that_is_not_there_is_answered_with_those_that_are(stage: Stage) -> None:
    with pytest.raises(
        openai.NotFoundError, match=r"Invalid URL \(POST /v1/responses\)\. There are /v1/chat/completions, "
    ):
        await stage.house.openai.responses.create(model="smart", input="Hi")


async def test_the_sdk_finds_the_request_id_of_an_error(stage: Stage) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await stage.house.openai.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "Hi"}])
    assert caught.value.request_id is not None
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


# What goes upstream.


async def test_an_upstream_gets_the_listed_fields_and_nothing_else(stage: Stage) -> None:
    asked: dict[str, Any] = {
        "temperature": 0,
        "n": None,
        "stop": ["\n"],
        "logit_bias": {"7": -100},
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "stream": False,
        "stream_options": None,
        "favourite_colour": "blue",
        "top_k": 5,
    }
    response = await stage.post(json_reply(completion()), **asked)
    assert response.status_code == 200
    assert stage.sent == {
        "model": "model-1",
        "messages": HELLO["messages"],
        "temperature": 0,
        "stop": ["\n"],
        "logit_bias": {"7": -100},
        "stream": False,
        "top_k": 5,
    }
    assert response.headers["x-suiron-ignored"] == "favourite_colour"


async def test_an_upstream_gets_the_listed_headers_and_nothing_of_the_clients(stage: Stage) -> None:
    extra = {
        "x-request-id": "mine",
        "x-client-request-id": "mine",
        "cookie": "a=b",
        "x-forwarded-for": "10.0.0.1",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "openai-organization": "org",
        "user-agent": "me",
    }
    response = await stage.post(json_reply(completion()), headers=extra)
    headers = stage.first.requests[-1].headers
    length = str(len(stage.first.requests[-1].body))
    assert response.headers["x-request-id"] == "mine"
    assert re.fullmatch(r"[0-9a-f]{32}-1", headers.pop("x-request-id"))
    assert headers.pop("user-agent").startswith("suiron/")
    assert headers == {
        "host": f"127.0.0.1:{stage.first.port}",
        "accept-encoding": "identity",
        "content-type": "application/json",
        "accept": "application/json",
        "content-length": length,
    }


# What an upstream may do wrong.

HERE = "http://10.1.2.3:8000/v1 on 10.1.2.3:8000 and gpu-7.internal:8000 in /srv/models/x.py"


def error(message: str = HERE, **members: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": "x", "param": None, "code": None} | members}


def raw(body: bytes, status: int = 200, **headers: str) -> Script:
    return json_reply(body, status, **headers)


HTML = raw(b"<html>Hello</html>", content_type="text/html")
DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        pytest.param(json_reply(error(param="n", code="bad_n"), 400), 400, "bad_n", id="400"),
        pytest.param(json_reply(error(), 422), 400, None, id="422"),
        pytest.param(
            json_reply(error("This model's maximum context length is 8 tokens."), 400),
            400,
            "context_length_exceeded",
            id="context",
        ),
        pytest.param(json_reply(error(), 401), 502, "upstream_error", id="401"),
        pytest.param(json_reply(error(), 403), 502, "upstream_error", id="403"),
        pytest.param(json_reply(error(), 404), 502, "upstream_error", id="404"),
        pytest.param(json_reply(error(), 429, retry_after="7"), 503, "overloaded", id="429"),
        pytest.param(json_reply(error(), 500), 502, "upstream_error", id="500"),
        pytest.param(json_reply(error(), 503), 503, "overloaded", id="503"),
        pytest.param(json_reply(error(), 504), 504, "upstream_timeout", id="504"),
        pytest.param(json_reply({}, 302, location="http://10.1.2.3/"), 502, "upstream_error", id="302"),
        pytest.param(json_reply(completion(), 201), 502, "upstream_error", id="201"),
        pytest.param(json_reply(error(code=400)), 400, None, id="200 with a 400 inside"),
        pytest.param(json_reply(error()), 502, "upstream_error", id="200 with an error"),
        pytest.param(json_reply({"error": "loading"}), 502, "upstream_error", id="200 with a text as error"),
        pytest.param(
            json_reply({"object": "error", "message": HERE, "code": 400}), 400, None, id="200 with a flat error"
        ),
        pytest.param(HTML, 502, "upstream_error", id="HTML"),
        pytest.param(
            raw(gzip.compress(b"{}"), content_encoding="gzip"), 502, "upstream_error", id="gzip that was not asked for"
        ),
        pytest.param(raw(b""), 502, "upstream_error", id="no body"),
        pytest.param(raw(b"[1]"), 502, "upstream_error", id="a list"),
        pytest.param(raw(b"null"), 502, "upstream_error", id="null"),
        pytest.param(raw(b'{"choices":' + DEEP + b"}"), 502, "upstream_error", id="deep nesting"),
        pytest.param(raw(b'{"x":' + DEEP + b',"choices":[]}'), 502, "upstream_error", id="deep nesting elsewhere"),
        pytest.param(raw(b'{"error":' + DEEP + b"}", 400), 400, None, id="deep nesting in an error"),
        pytest.param(json_reply(completion() | {"choices": None}), 502, "upstream_error", id="choices null"),
        pytest.param(json_reply(completion() | {"choices": [1, 2]}), 502, "upstream_error", id="choices of numbers"),
        pytest.param(json_reply(completion() | {"choices": []}), 502, "upstream_error", id="no choices"),
        pytest.param(json_reply({"id": "x"}), 502, "upstream_error", id="no choices member"),
        pytest.param(json_reply(completion(message=None)), 502, "upstream_error", id="no message"),
        pytest.param(json_reply(completion(index=-1)), 502, "upstream_error", id="a negative index"),
        pytest.param(json_reply(completion(index=1.0)), 502, "upstream_error", id="a fraction as index"),
        pytest.param(json_reply(completion() | {"usage": [1]}), 502, "upstream_error", id="usage a list"),
        pytest.param(
            raw(json.dumps(completion("é"), ensure_ascii=False).encode("latin-1")),
            502,
            "upstream_error",
            id="Latin-1",
        ),
        pytest.param(
            raw(json.dumps(completion() | {"note": "é"}, ensure_ascii=False).encode("latin-1")),
            502,
            "upstream_error",
            id="Latin-1 in what nobody reads",
        ),
        pytest.param(raw(json.dumps(completion("\ud800")).encode()), 502, "upstream_error", id="half a surrogate"),
        pytest.param(raw(json.dumps(completion() | {"x": float("nan")}).encode()), 502, "upstream_error", id="NaN"),
    ],
)
async def test_a_failing_upstream_becomes_the_right_error(
    stage: Stage, script: Script, status: int, code: str | None
) -> None:
    response = await stage.post(script)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.json()["error"]["type"] == ("invalid_request_error" if status == 400 else "server_error")
    for address in ("127.0.0.1", str(stage.first.port), "10.1.2.3", "gpu-7", "/srv", "model-1"):
        assert address not in response.text


async def test_an_overloaded_upstream_says_when_to_come_back(stage: Stage) -> None:
    response = await stage.post(json_reply(error(), 429, retry_after="7"))
    assert response.headers["retry-after"] == "7"


# Another target.


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(json_reply(error(), 503), id="503"),
        pytest.param(json_reply(error(), 429), id="429"),
        pytest.param(json_reply(error(), 500), id="500"),
        pytest.param(json_reply(error(), 401), id="401"),
        pytest.param(json_reply(error()), id="200 with an error"),
        pytest.param(HTML, id="HTML"),
        pytest.param(raw(b""), id="nothing"),
    ],
)
async def test_another_target_answers_where_the_first_fails(stage: Stage, script: Script) -> None:
    stage.second.script = json_reply(completion("from the second"))
    answer = await stage.answer(script, model="spare")
    assert answer["choices"][0]["message"]["content"] == "from the second"
    assert (answer["model"], stage.sent["model"]) == ("spare", "a")
    (retried,) = stage.second.requests
    assert retried.json["model"] == "b"
    assert retried.headers["x-request-id"].endswith("-2")


async def test_a_request_at_fault_is_not_tried_again(stage: Stage) -> None:
    response = await stage.post(json_reply(error(), 400), model="spare")
    assert response.status_code == 400
    assert stage.second.requests == []


async def test_the_last_failure_is_told_when_every_target_fails(stage: Stage) -> None:
    stage.second.script = json_reply(error(), 503)
    response = await stage.post(json_reply(error(), 500), model="spare")
    assert response.status_code == 503
