"""What of OpenAI's contract does a client get from TGI? A scripted one, since the real one needs a GPU."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import httpx2
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI, Stream
from openai.types.chat import ChatCompletionChunk

from adapters.tgi import Adapter
from adapters.tgi.cut import Cut
from gateway.adapter import Dispatch, Features, ModelFacts
from gateway.errors import Overloaded, UpstreamFailed
from gateway.fanout import merged
from gateway.schema.endpoint import CHAT, COMPLETIONS
from gateway.schema.payload import Part, Parts
from gateway.schema.reading import read_request
from gateway.settings import Model, Settings, SettingsError, Target, Timeouts, Upstream
from tests.house import (
    DONE,
    HELLO,
    House,
    Received,
    Script,
    UpstreamServer,
    event,
    events_of,
    json_reply,
    running,
    settings_for,
    stream_reply,
    upstream,
)

pytestmark = pytest.mark.anyio

INFO = {
    "model_id": "org/small",
    "model_sha": "5f91d94",
    "version": "3.3.6",
    "max_input_tokens": 100,
    "max_total_tokens": 128,
}
TOOL = {"type": "function", "function": {"name": "depth_of"}}
PROMPT = {"model": "smart", "prompt": "Water is"}


@dataclass
class TGI:
    """A TGI that counts words as tokens, and answers by the script that a test gives it."""

    answer: Script

    async def __call__(self, received: Received, writer: asyncio.StreamWriter) -> None:
        script = self.answer
        if received.path == "/info":
            script = json_reply(INFO)
        elif received.path == "/tokenize":
            script = json_reply(received.json["inputs"].split())
        elif received.path == "/chat_tokenize":
            script = json_reply({"tokenize_response": received.json["messages"], "templated_text": ""})
        await script(received, writer)


@dataclass
class Stage:
    """A gateway whose `smart` is on a TGI, `wide` on one with every option, and `spare` on it or else an echo."""

    house: House
    server: UpstreamServer
    tgi: TGI

    async def post(self, script: Script, body: dict[str, Any]) -> httpx2.Response:
        self.tgi.answer = script
        self.server.requests.clear()
        return await self.house.post(body, "completions" if "prompt" in body else "chat/completions")

    async def answer(self, script: Script, body: dict[str, Any]) -> Any:
        response = await self.post(script, body)
        assert response.status_code == 200, response.text
        return response.json()

    async def events(self, script: Script, body: dict[str, Any]) -> list[Any]:
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        response = await self.post(script, asked)
        assert response.status_code == 200, response.text
        return events_of(response.content)

    def sent(self, path: str) -> list[Any]:
        return [request.json for request in self.server.requests if request.path == path]


@pytest.fixture(scope="module")
async def shared() -> AsyncIterator[Stage]:
    tgi = TGI(json_reply({}))
    async with upstream(tgi) as server:
        able: dict[str, Any] = {"vision": True, "prefill_logprobs": True, "loras": ["lakes"]}
        settings = settings_for(server.settings("tgi"))
        settings.upstreams["able"] = server.settings("tgi", options=able, extra_fields=["watermark"])
        settings.upstreams["echo"] = Upstream(adapter="echo")
        settings.models["wide"] = Model(targets=[Target(upstream="able", model="lakes")])
        spare = [Target(upstream="upstream-1"), Target(upstream="echo")]
        settings.models["spare"] = Model(targets=spare)
        async with running(settings) as house:
            yield Stage(house, server, tgi)


@pytest.fixture
def stage(shared: Stage) -> Stage:
    return shared


def said(text: str | None = "Wet.", finish: str = "stop", **message: Any) -> dict[str, Any]:
    """A chat completion as TGI sends it."""
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "logprobs": None}
    envelope = {"object": "chat.completion", "id": "", "created": 17, "model": "org/small"}
    return {**envelope, "choices": [{**choice, "finish_reason": finish}], "usage": usage}


def delta(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "logprobs": None, "finish_reason": finish}
    return event({"object": "chat.completion.chunk", "id": "", "created": 17, "choices": [choice], "usage": None})


def usage(prompt: int, made: int) -> bytes:
    counted = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
    return event({"object": "chat.completion.chunk", "id": "", "created": 18, "choices": [], "usage": counted})


def generated(text: str, *logprobs: float, finish: str = "eos_token", **details: Any) -> dict[str, Any]:
    """An answer of `/generate`: the words of *text* are its tokens."""
    words = [f" {word}" for word in text.split()]
    tokens = [
        {"id": 1, "text": word, "logprob": logprob, "special": False}
        for word, logprob in zip(words, logprobs or [-1.0] * len(words), strict=True)
    ]
    counted = {"finish_reason": finish, "generated_tokens": len(tokens), "input_length": 4}
    return {"generated_text": text, "details": {**counted, "prefill": [], "tokens": tokens, **details}}


def token(text: str, finish: str | None = None, logprob: float = -1.0, special: bool = False) -> bytes:
    """An event of `/generate_stream`."""
    details = {"finish_reason": finish, "generated_tokens": 3, "seed": None, "input_length": 4} if finish else None
    last = {"generated_text": "all of it" if finish else None, "details": details}
    return event({"index": 1, "token": {"id": 1, "text": text, "logprob": logprob, "special": special}, **last})


def text_of(events: list[Any]) -> str:
    return "".join(
        choice["text"] if "text" in choice else choice["delta"].get("content") or ""
        for chunk in events
        if chunk != "[DONE]"
        for choice in chunk["choices"]
    )


# What is asked of TGI.


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"logprobs": True, "top_logprobs": 6}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        (
            {
                "tools": [TOOL],
                "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
            },
            "response_format",
        ),
        ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools[0].custom"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice"),
        ({"functions": [{"name": "a"}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "a"}}, "audio"),
        ({"prediction": {"type": "content", "content": "a"}}, "prediction"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"top_k": 4}, "top_k"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png,"}}]}
                ]
            },
            "messages[0].content[0].image_url",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": ""}}]}]},
            "messages[0].content[0].input_audio",
        ),
        (
            {
                "model": "wide",
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/a"}}]}
                ],
            },
            "messages[0].content[0].image_url",
        ),
        ({**PROMPT, "suffix": "."}, "suffix"),
        ({**PROMPT, "prompt": [1, 2]}, "prompt"),
        ({**PROMPT, "prompt": [[1, 2], [3]]}, "prompt"),
        ({**PROMPT, "prompt": None}, "prompt"),
        ({**PROMPT, "logit_bias": {"5": -1}}, "logit_bias"),
        ({**PROMPT, "presence_penalty": -1}, "presence_penalty"),
        ({**PROMPT, "echo": True, "logprobs": 0}, "logprobs"),
        ({**PROMPT, "model": "wide", "echo": True, "logprobs": 1}, "logprobs"),
    ],
)
async def test_what_cannot_be_honoured_is_a_400_that_names_it(stage: Stage, changes: Any, param: str) -> None:
    response = await stage.post(json_reply(said()), changes if "prompt" in changes else HELLO | changes)

    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, "unsupported_parameter")
    assert stage.server.requests == []


@pytest.mark.parametrize(
    "schema",
    [None, {"type": "array", "items": {}}, {"$ref": "#/$defs/a", "$defs": {"a": {}}}, {"anyOf": []}, {}],
)
async def test_a_schema_without_an_object_at_its_root_is_refused(stage: Stage, schema: Any) -> None:
    format = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    response = await stage.post(json_reply(said()), HELLO | {"response_format": format})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("changes", "sent"),
    [
        ({"top_p": 1, "presence_penalty": 0, "logit_bias": {}, "stop": None, "seed": None, "stream": None}, {}),
        ({"top_p": 0, "temperature": 0.7}, {"temperature": 0.0}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"seed": -(2**63)}, {"seed": 2**63}),
        ({"max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"logprobs": True, "top_logprobs": 0}, {"logprobs": True}),
        ({"stop": []}, {}),
        ({"tools": [], "tool_choice": "auto"}, {}),
        ({"tools": [TOOL], "tool_choice": "none", "parallel_tool_calls": True}, {}),
        ({"service_tier": "auto", "verbosity": "low", "user": "u", "store": False}, {}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}},
            {"response_format": {"type": "json", "value": {"type": "object", "properties": {}}}},
        ),
    ],
)
async def test_a_chat_is_asked_in_the_words_that_tgi_takes(stage: Stage, changes: Any, sent: Any) -> None:
    await stage.answer(json_reply(said()), HELLO | changes)

    plain = {"model": "tgi", "messages": HELLO["messages"], "stream": False}
    assert stage.sent("/v1/chat/completions") == [plain | sent]


@pytest.mark.parametrize(
    ("changes", "sent"),
    [
        ({}, {"max_new_tokens": 16, "do_sample": True}),
        ({"temperature": 0}, {"do_sample": False}),
        ({"top_p": 0}, {"do_sample": False}),
        ({"temperature": 0.5, "top_p": 0.25}, {"do_sample": True, "temperature": 0.5, "top_p": 0.25}),
        ({"top_p": 1, "best_of": 1, "user": "u"}, {"do_sample": True}),
        ({"top_k": -1, "typical_p": 1, "repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"logprobs": 3}, {"top_n_tokens": 3}),
        ({"logprobs": 0}, {}),
        ({"model": "wide", "watermark": True}, {"watermark": True, "adapter_id": "lakes"}),
    ],
)
async def test_a_completion_is_asked_of_the_native_route(stage: Stage, changes: Any, sent: Any) -> None:
    await stage.answer(json_reply(generated("wet")), PROMPT | changes)

    (body,) = stage.sent("/generate")
    plain = {"details": True, "return_full_text": False, "max_new_tokens": 16, "do_sample": True}
    assert body == {"inputs": "Water is", "parameters": plain | sent}


@pytest.mark.parametrize("parameter", ["top_k", "typical_p", "repetition_penalty"])
async def test_an_extension_of_the_wrong_type_is_a_400(stage: Stage, parameter: str) -> None:
    response = await stage.post(json_reply(generated("wet")), PROMPT | {parameter: "much"})

    assert (response.status_code, response.json()["error"]["param"]) == (400, parameter)


async def test_a_lora_is_named_and_an_image_is_passed_on_where_the_options_allow(stage: Stage) -> None:
    parts = [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": "data:image/png,", "detail": "low"}},
    ]
    await stage.answer(json_reply(said()), {"model": "wide", "messages": [{"role": "user", "content": parts}]})

    (body,) = stage.sent("/v1/chat/completions")
    assert body["model"] == "lakes"
    assert body["messages"][0]["content"] == [parts[0], {"type": "image_url", "image_url": {"url": "data:image/png,"}}]


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
async def test_the_base_url_is_the_root_or_its_v1_and_a_probe_tells_the_limits(stage: Stage, suffix: str) -> None:
    adapter = Adapter(Upstream(adapter="tgi", base_url=f"http://127.0.0.1:{stage.server.port}{suffix}"))
    facts = await adapter.probe()
    await adapter.aclose()

    known = ModelFacts(id="org/small", context_tokens=128, revision="5f91d94")
    assert (facts.kind, facts.version, list(map(_known, facts.models))) == ("TGI", "3.3.6", [known])


def _known(model: ModelFacts) -> ModelFacts:
    """What the server has told, without what every TGI can do."""
    return msgspec.structs.replace(model, features=Features())


async def test_a_probe_is_content_with_the_list_of_models() -> None:
    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        await json_reply({}, 404 if received.path == "/info" else 200)(received, writer)

    async with upstream(script) as server:
        adapter = Adapter(server.settings("tgi"))
        facts = await adapter.probe()
        await adapter.aclose()

    assert (facts.kind, list(map(_known, facts.models))) == ("TGI", [ModelFacts(id="model-1", owned_by="test")])


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(SettingsError, match="unknown key 'lora'; did you mean 'loras'"):
        Adapter(Upstream(adapter="tgi", base_url="http://a", options={"lora": []}))


async def test_embeddings_are_refused(stage: Stage) -> None:
    response = await stage.house.post({"model": "smart", "input": "a"}, "embeddings")

    assert (response.status_code, response.json()["error"]["code"]) == (400, "unsupported_endpoint")


# Stop strings.


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_stop_string_across_tokens_ends_a_chat_and_closes_tgi_at_once(stage: Stage, streamed: bool) -> None:
    script = stream_reply(delta("A liquid"), delta(". E"), delta("NDless"), asyncio.Event())
    body = HELLO | {"stop": ["END", "\n"]}
    if streamed:
        events = await stage.events(script, body)
        text, finish, counted = text_of(events), events[-3]["choices"][0]["finish_reason"], events[-2]["usage"]
    else:
        answer = await stage.answer(script, body)
        (choice,) = answer["choices"]
        text, finish, counted = choice["message"]["content"], choice["finish_reason"], answer["usage"]

    assert (text, finish) == ("A liquid. ", "stop")
    assert counted == {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
    chat = next(request for request in stage.server.requests if request.path == "/v1/chat/completions")
    await asyncio.wait_for(chat.gone.wait(), 2)


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_stop_string_ends_a_completion_and_its_logprobs(stage: Stage, streamed: bool) -> None:
    script = stream_reply(token(" wet"), token(". S"), token("TO"), token("P it"), asyncio.Event())
    body = PROMPT | {"stop": "STOP", "logprobs": 0, "echo": False}
    if streamed:
        events = await stage.events(script, body)
        choices = [choice for chunk in events[:-1] for choice in chunk["choices"]]
        tokens = [token for choice in choices for token in (choice["logprobs"] or {}).get("tokens", ())]
        text, finish, counted = text_of(events), choices[-1]["finish_reason"], events[-2]["usage"]
    else:
        answer = await stage.answer(script, body)
        (choice,) = answer["choices"]
        tokens = choice["logprobs"]["tokens"]
        text, finish, counted = choice["text"], choice["finish_reason"], answer["usage"]

    assert (text, tokens, finish) == (" wet. ", [" wet", ". S"], "stop")
    assert counted == {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=6),
    stops=st.lists(st.text("abc", min_size=1, max_size=3), max_size=3),
)
def test_text_and_tokens_end_at_the_first_stop_string_however_they_arrive(pieces: list[str], stops: list[str]) -> None:
    cut = Cut[int](stops)
    passed, tokens = "", list[int]()
    for number, piece in enumerate(pieces):
        more, others = cut.feed(piece, [number], last=number == len(pieces) - 1)
        passed, tokens = passed + more, tokens + others

    text = "".join(pieces)
    ends = [text.find(stop) for stop in stops if stop in text]
    starts = [len("".join(pieces[:number])) for number in range(len(pieces))]
    assert passed == text[: min(ends, default=len(text))]
    assert [number for number in tokens if pieces[number]] == [
        number for number, start in enumerate(starts) if pieces[number] and start < len(passed)
    ]
    assert tokens == sorted(tokens)


# One answer out of several exchanges.


def by_seed(script: Callable[[int], Script]) -> Script:
    """Answers each exchange by its seed."""

    async def answer(received: Received, writer: asyncio.StreamWriter) -> None:
        asked = received.json
        await script(asked.get("parameters", asked)["seed"])(received, writer)

    return answer


async def test_choices_are_asked_for_one_by_one_and_the_prompt_is_counted_once(stage: Stage) -> None:
    script = by_seed(lambda seed: json_reply(said(f"Answer {seed}.")))
    answer = await stage.answer(script, HELLO | {"n": 3, "seed": 7})

    told = [(choice["index"], choice["message"]["content"]) for choice in answer["choices"]]
    assert told == [(0, "Answer 7."), (1, "Answer 8."), (2, "Answer 9.")]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}


async def test_streams_of_choices_are_merged_as_they_come(stage: Stage) -> None:
    first_may_go_on = asyncio.Event()

    def script(seed: int) -> Script:
        if seed == 1:
            return stream_reply(delta("one"), first_may_go_on, delta("!", "stop"), usage(3, 2), DONE)

        async def second(received: Received, writer: asyncio.StreamWriter) -> None:
            await stream_reply(delta("two", "length"), usage(3, 1), DONE)(received, writer)
            first_may_go_on.set()

        return second

    events = await stage.events(by_seed(script), HELLO | {"n": 2, "seed": 1})

    texts = ["", ""]
    for chunk in events[:-2]:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == ["one!", "two"]
    assert events[-3]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert events[-2]["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}


async def test_when_one_choice_fails_all_do_and_the_others_are_closed(stage: Stage) -> None:
    never = asyncio.Event()
    script = by_seed(lambda seed: json_reply({"error": "x"}, 500) if seed == 2 else stream_reply(never))
    response = await stage.post(script, HELLO | {"n": 3, "seed": 1, "stream": True})

    assert response.status_code == 502
    others = [request for request in stage.server.requests if request.json["seed"] != 2]
    await asyncio.wait_for(asyncio.gather(*(request.gone.wait() for request in others)), 2)


async def test_a_client_that_leaves_closes_every_exchange(stage: Stage) -> None:
    never = asyncio.Event()
    stage.tgi.answer = stream_reply(delta("on"), never)
    stage.server.requests.clear()
    async with await stage.house.openai.chat.completions.create(
        model="smart", messages=[{"role": "user", "content": "Hi"}], n=3, stream=True
    ) as stream:
        async for chunk in stream:
            if chunk.choices[0].index == 2:
                break

    assert len(stage.server.requests) == 3
    await asyncio.wait_for(asyncio.gather(*(request.gone.wait() for request in stage.server.requests)), 3)


async def test_merging_passes_on_the_error_and_leaves_nothing_running() -> None:
    closed = []

    async def failing() -> AsyncIterator[Parts]:
        yield [Part(None, b"1")]
        raise UpstreamFailed("no more")

    async def lasting() -> AsyncIterator[Parts]:
        try:
            while True:
                yield [Part(None, b"2")]
                await asyncio.sleep(0)
        finally:
            closed.append(True)

    with pytest.raises(UpstreamFailed, match="no more"):
        async for _ in merged([lasting(), failing(), lasting()]):  # type: ignore[list-item]
            pass
    assert closed == [True, True]


async def test_more_choices_than_tgi_lets_in_are_refused(stage: Stage) -> None:
    response = await stage.post(json_reply(generated("wet")), PROMPT | {"prompt": ["a"] * 65, "n": 2})

    assert (response.status_code, response.json()["error"]["param"]) == (400, "n")
    assert stage.server.requests == []


@pytest.mark.parametrize("stop", [None, "never"])
async def test_the_best_of_several_is_that_with_the_highest_mean_logprob(stage: Stage, stop: str | None) -> None:
    likely = {1: [-2.0], 2: [-0.5, -0.5, -0.5], 3: [-0.75]}

    def script(seed: int) -> Script:
        if stop is None:
            return json_reply(generated(" ".join([f"take{seed}"] * len(likely[seed])), *likely[seed]))
        tokens = [token(f" take{seed}", logprob=logprob) for logprob in likely[seed]]
        return stream_reply(*tokens, token("</s>", "eos_token", special=True))

    answer = await stage.answer(by_seed(script), PROMPT | {"best_of": 3, "n": 2, "seed": 1, "stop": stop})

    texts = [choice["text"].split()[0] for choice in answer["choices"]]
    assert (texts, [choice["index"] for choice in answer["choices"]]) == (["take2", "take3"], [0, 1])
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["prompt_tokens"] == 4
    assert answer["usage"]["completion_tokens"] == (5 if stop is None else 9)


async def test_prompts_are_asked_one_by_one_and_answered_in_order(stage: Stage) -> None:
    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        await json_reply(generated(received.json["inputs"].lower()))(received, writer)

    answer = await stage.answer(script, PROMPT | {"prompt": ["ONE", "TWO"], "n": 2, "echo": True})

    assert [choice["text"] for choice in answer["choices"]] == ["ONEone", "ONEone", "TWOtwo", "TWOtwo"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"] == {"prompt_tokens": 8, "completion_tokens": 4, "total_tokens": 12}


@pytest.mark.parametrize("echo", [False, True])
async def test_no_tokens_are_asked_of_nobody(stage: Stage, echo: bool) -> None:
    body = {"model": "smart", "prompt": ["Water is", "Ice"], "max_tokens": 0, "echo": echo}
    answer = await stage.answer(json_reply({}, 500), body)

    assert [choice["text"] for choice in answer["choices"]] == (["Water is", "Ice"] if echo else ["", ""])
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
    assert {request.path for request in stage.server.requests} == {"/tokenize"}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("limit", [0, 5])
async def test_the_prompts_logprobs_are_those_of_the_prefill(stage: Stage, limit: int, streamed: bool) -> None:
    prefill = [
        {"id": 0, "text": "<s>", "logprob": None},
        {"id": 1, "text": "Water", "logprob": -9.0},
        {"id": 2, "text": " is", "logprob": -0.5},
    ]
    script = json_reply(generated(" wet", -0.25, finish="length", prefill=prefill))
    body = PROMPT | {"model": "wide", "echo": True, "logprobs": 0, "max_tokens": limit}
    if streamed:
        choices = [choice for chunk in (await stage.events(script, body))[:-1] for choice in chunk["choices"]]
        choice = next(choice for choice in choices if choice["logprobs"])
    else:
        (choice,) = (await stage.answer(script, body))["choices"]

    (sent,) = stage.sent("/generate")
    assert sent["parameters"]["decoder_input_details"] is True
    assert sent["parameters"]["max_new_tokens"] == max(limit, 1)
    more = bool(limit)
    assert choice["text"] == "Water is" + " wet" * more
    assert choice["logprobs"] == {
        "tokens": ["Water", " is", *[" wet"] * more],
        "token_logprobs": [None, -0.5, *[-0.25] * more],
        "top_logprobs": None,
        "text_offset": [0, 5, *[8] * more],
    }


# What TGI says of usage, tools and errors.


async def test_headers_know_better_than_the_body_what_a_call_that_came_to_nothing_cost(stage: Stage) -> None:
    script = json_reply(said("I cannot"), x_prompt_tokens="21", x_generated_tokens="6")
    answer = await stage.answer(script, HELLO | {"tools": [TOOL], "max_tokens": 6})

    assert answer["usage"] == {"prompt_tokens": 21, "completion_tokens": 6, "total_tokens": 27}
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_a_plain_completion_that_tells_no_input_length_is_counted(stage: Stage) -> None:
    answer = await stage.answer(json_reply(generated("wet", input_length=None)), PROMPT)

    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}


async def test_a_call_that_could_not_be_read_is_the_limits_doing_only_where_there_is_one(stage: Stage) -> None:
    script = json_reply({"error": "Tool error: Failed to parse generated text: EOF", "error_type": "tool_error"}, 422)
    cut = await stage.answer(script, HELLO | {"tools": [TOOL], "max_tokens": 4})
    response = await stage.post(script, HELLO | {"tools": [TOOL]})

    assert cut["choices"][0]["finish_reason"] == "length"
    assert cut["usage"] == {"prompt_tokens": 1, "completion_tokens": 4, "total_tokens": 5}
    assert response.status_code == 502


def fragment(arguments: Any, name: str | None = None, *, listed: bool = True, finish: str | None = None) -> bytes:
    """An event with a piece of a call of a tool; up to version 3.1 the call was not in a list."""
    call = {"index": 0, "id": "0", "type": "function", "function": {"name": name, "arguments": arguments}}
    told = {"role": "assistant", "content": None, "tool_calls": [call] if listed else call}
    return event({"choices": [{"index": 0, "delta": told, "logprobs": None, "finish_reason": finish}]})


@pytest.mark.parametrize(
    ("events", "arguments", "finish"),
    [
        ([fragment("{", "depth_of"), fragment('"lake"'), fragment(": 1}")], '{"lake": 1}', "tool_calls"),
        ([fragment("{", "depth_of"), fragment('{"lake"'), fragment(": 1}")], '{"lake": 1}', "tool_calls"),
        ([fragment("{}", "depth_of", finish="stop")], "{}", "tool_calls"),
        ([fragment('{"a":', "depth_of"), fragment(" 1", finish="length")], '{"a": 1', "length"),
        ([fragment("{", "depth_of")], "{", "length"),
        ([fragment("", "depth_of")], "", "length"),
        ([fragment('{"a"', listed=False), fragment(":1}", listed=False)], '{"a":1}', "tool_calls"),
    ],
)
async def test_a_streamed_call_is_finished_as_it_should_have_been(
    stage: Stage, events: list[bytes], arguments: str, finish: str
) -> None:
    *chunks, last, _, _ = await stage.events(stream_reply(*events, DONE), HELLO | {"tools": [TOOL]})

    first, *others = [chunk["choices"][0]["delta"]["tool_calls"][0] for chunk in chunks]
    assert (first["type"], first["function"]) == ("function", {"name": "depth_of", "arguments": ""})
    assert first["id"].startswith("call_")
    assert "".join(call["function"]["arguments"] for call in others) == arguments
    assert all(call.keys() == {"index", "function"} and call["function"].keys() == {"arguments"} for call in others)
    assert last["choices"][0]["finish_reason"] == finish


async def test_a_call_that_is_whole_needs_no_end_of_stream(stage: Stage) -> None:
    events = await stage.events(stream_reply(fragment("{}", "depth_of")), HELLO | {"tools": [TOOL]})

    assert events[-3]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("document", "body"),
    [
        (said(finish=""), HELLO),
        ({"choices": []}, HELLO),
        ({"choices": 5}, HELLO),
        ({"generated_text": "wet"}, PROMPT),
        ([{"generated_text": "Water is wet"}], PROMPT),
    ],
)
async def test_half_an_answer_is_none(stage: Stage, document: Any, body: Any) -> None:
    response = await stage.post(json_reply(document), body)

    assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_error")


async def test_a_call_of_which_half_is_missing_is_an_error_where_the_stream_just_ends(stage: Stage) -> None:
    events = await stage.events(stream_reply(fragment('{"a"', "depth_of")), HELLO | {"tools": [TOOL]})

    assert events[-1]["error"]["code"] == "upstream_error"


async def test_a_call_without_a_name_is_an_error_unless_there_is_but_one_tool(stage: Stage) -> None:
    two = [TOOL, {"type": "function", "function": {"name": "now"}}]
    response = await stage.post(stream_reply(fragment("{}")), HELLO | {"tools": two, "stream": True})

    assert response.status_code == 502


async def test_choices_call_tools_under_ids_of_their_own(stage: Stage) -> None:
    call = {"id": "0", "type": "function", "function": {"name": "depth_of", "arguments": "{}"}}
    answer = await stage.answer(json_reply(said(None, tool_calls=[call])), HELLO | {"tools": [TOOL], "n": 2})

    ids = {choice["message"]["tool_calls"][0]["id"] for choice in answer["choices"]}
    assert len(ids) == 2
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"tool_calls"}


async def test_logprobs_have_their_bytes_and_not_the_token_that_ended_the_answer(stage: Stage) -> None:
    document = said("é")
    tokens: list[Any] = [{"token": text, "logprob": -1.0, "top_logprobs": []} for text in ("\ufffd", "é", "<|end|>")]
    document["choices"][0]["logprobs"] = {"content": tokens[1:]}
    answer = await stage.answer(json_reply(document), HELLO | {"logprobs": True})
    document["choices"][0] |= {"logprobs": {"content": tokens[:2]}, "finish_reason": "length"}
    other = await stage.answer(json_reply(document), HELLO | {"logprobs": True})

    (told,) = answer["choices"][0]["logprobs"]["content"]
    assert told == {"token": "é", "logprob": -1.0, "bytes": [195, 169], "top_logprobs": []}
    assert [token["bytes"] for token in other["choices"][0]["logprobs"]["content"]] == [None, [195, 169]]


OVERFLOW = (
    "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 128. "
    "Given: {} `inputs` tokens and 200 `max_new_tokens`"
)


@pytest.mark.parametrize("streamed", [False, True])
async def test_in_a_chat_a_limit_beyond_the_context_is_cut_to_it(stage: Stage, streamed: bool) -> None:
    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        fits = received.json["max_tokens"] + 28 <= 128
        refusal: Any = {"error": OVERFLOW.format(28), "error_type": "validation"}
        if streamed:
            stream = [delta("Wet.", "stop"), usage(28, 2)] if fits else [event(refusal)]
            await stream_reply(*stream, DONE)(received, writer)
        else:
            await json_reply(said() if fits else refusal, 200 if fits else 422)(received, writer)

    body = HELLO | {"max_tokens": 200}
    answer = await stage.events(script, body) if streamed else [await stage.answer(script, body)]

    assert answer
    assert [sent["max_tokens"] for sent in stage.sent("/v1/chat/completions")] == [200, 100]


@pytest.mark.parametrize(
    ("status", "body", "expected", "param", "code"),
    [
        (422, {"error": OVERFLOW.format(128), "error_type": "validation"}, 400, "messages", "context_length_exceeded"),
        (
            422,
            {"error": "Input validation error: `stop` supports up to 4", "error_type": "validation"},
            400,
            "stop",
            None,
        ),
        (
            422,
            {"error": "Input validation error: cannot compile regex from schema: x", "error_type": "validation"},
            400,
            "response_format",
            "unsupported_value",
        ),
        (422, {"error": "Template error: x", "error_type": "template_error"}, 400, None, None),
        (422, b"Failed to deserialize the JSON body into the target type: a", 400, None, None),
        (413, b"Failed to buffer the request body: length limit exceeded", 400, None, None),
        (401, b"", 502, None, "upstream_error"),
        (415, b"Expected request with `Content-Type: application/json`", 502, None, "upstream_error"),
        (
            424,
            {"error": "Request failed during generation: x", "error_type": "generation"},
            502,
            None,
            "upstream_error",
        ),
        (429, {"error": "Model is overloaded", "error_type": "overloaded"}, 503, None, "overloaded"),
        (500, {"error": "Incomplete generation", "error_type": "incomplete_generation"}, 502, None, "upstream_error"),
        (503, {"error": "unhealthy", "error_type": "healthcheck"}, 503, None, "overloaded"),
    ],
)
async def test_an_error_is_told_as_openai_would(
    stage: Stage, status: int, body: Any, expected: int, param: str | None, code: str | None
) -> None:
    response = await stage.post(json_reply(body, status), HELLO)

    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (expected, param, code)
    if isinstance(body, dict) and status != 422:
        assert body["error"] not in error["message"]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"error": "Model is overloaded", "error_type": "overloaded"}, 503),
        ({"error": {"message": "Model is overloaded", "http_status_code": 422}}, 503),
        ({"error": {"message": "Request failed during generation: x", "http_status_code": 422}}, 502),
        ({"error": {"message": "Incomplete generation stream", "http_status_code": 422}}, 502),
        ({"error": {"message": "Input validation error: `seed` no", "http_status_code": 422}}, 400),
        ({"error": "Request failed during generation: x", "error_type": "generation"}, 502),
        ({"error": "Input validation error: `seed` no", "error_type": "validation"}, 400),
    ],
)
@pytest.mark.parametrize("body", [HELLO, PROMPT], ids=["chat", "completion"])
async def test_an_error_in_a_stream_is_the_status_it_should_have_been(
    stage: Stage, document: Any, expected: int, body: Any
) -> None:
    response = await stage.post(stream_reply(event(document), DONE), body | {"stream": True})

    assert response.status_code == expected
    assert (response.json()["error"]["param"] == "seed") == (expected == 400)


async def test_a_full_tgi_makes_way_for_the_next_target(stage: Stage) -> None:
    full = stream_reply(event({"error": {"message": "Model is overloaded", "http_status_code": 422}}), DONE)
    answer = await stage.events(full, HELLO | {"model": "spare"})

    assert text_of(answer) == "Hi"


async def test_an_error_in_the_middle_ends_the_stream_with_it(stage: Stage) -> None:
    events = await stage.events(stream_reply(token(" wet"), event({"error": "x", "error_type": "generation"})), PROMPT)

    assert events[0]["choices"][0]["text"] == " wet"
    assert events[-1]["error"]["code"] == "upstream_error"


def test_overload_says_when_to_come_back() -> None:
    adapter = Adapter(Upstream(adapter="tgi", base_url="http://a"))

    assert isinstance(adapter.decode_error(429, b'{"error": "Model is overloaded"}', {}), Overloaded)


STREAM = b"".join([b": \n\n", delta("Gr"), delta("üße, "), delta("東京 👋"), delta("", "stop"), usage(3, 4), DONE])
OLD = STREAM.replace(b"data: ", b"data:").replace(b"\n", b"\r\n")


@pytest.mark.parametrize("whole", [STREAM, OLD], ids=["3", "2"])
async def test_the_network_may_cut_a_stream_anywhere(whole: bytes) -> None:
    cuts = [[cut] for cut in range(1, len(whole))] + [[*range(step, len(whole), step)] for step in (1, 2, 7, 64)]
    for places in cuts:
        blocks = [whole[start:end] for start, end in zip([0, *places], [*places, len(whole)], strict=True)]

        assert await _text_through_adapter(blocks) == "Grüße, 東京 👋", places


class Blocks(httpx2.AsyncByteStream):
    def __init__(self, blocks: list[bytes]) -> None:
        self._blocks = blocks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for block in self._blocks:
            yield block


async def _text_through_adapter(blocks: list[bytes]) -> str:
    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, stream=Blocks(blocks))

    adapter = Adapter(Upstream(adapter="tgi", base_url="http://tgi"), transport=httpx2.MockTransport(answer))
    request, _ = read_request(CHAT, json.dumps(HELLO | {"stream": True}).encode())
    timeouts = Timeouts()
    deadline = time.monotonic() + timeouts.total_s
    dispatch = Dispatch(model="tgi", request_id="7", attempt=1, tenant="", deadline=deadline, timeouts=timeouts)
    return text_of([json.loads(part.wire) async for parts in adapter.chat(request, dispatch) for part in parts])


# The course: its clients, unchanged but for the address.


@pytest.fixture
async def course() -> AsyncIterator[tuple[str, TGI]]:
    tgi = TGI(stream_reply(delta("One"), delta(", two"), delta("", "stop"), usage(9, 3), DONE))
    async with upstream(tgi) as server:
        models = {"tgi": Model(targets=[Target(upstream="tgi")])}
        async with running(Settings(upstreams={"tgi": server.settings("tgi")}, models=models)) as house:
            yield house.url, tgi


async def test_openais_sdk_streams_as_the_course_shows(course: tuple[str, TGI]) -> None:
    url, _ = course

    def ask() -> list[ChatCompletionChunk]:
        client = OpenAI(base_url=f"{url}/v1/", api_key="-")
        stream: Stream[ChatCompletionChunk] = client.chat.completions.create(
            model="tgi",
            messages=[
                {"role": "system", "content": "Answer in one word."},
                {"role": "user", "content": "Count to two."},
            ],
            stream=True,
        )
        with client:
            return list(stream)

    chunks = await asyncio.to_thread(ask)

    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "One, two"
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_the_hubs_client_streams_and_asks_as_the_course_shows(course: tuple[str, TGI]) -> None:
    hub = pytest.importorskip("huggingface_hub")
    url, tgi = course
    question = [{"role": "user", "content": "Count to two."}]

    def stream() -> str:
        client = hub.InferenceClient(base_url=f"{url}/v1/")
        output = client.chat.completions.create(model="tgi", messages=question, stream=True, max_tokens=1024)
        return "".join(chunk.choices[0].delta.content or "" for chunk in output)

    def ask() -> Any:
        return hub.InferenceClient(base_url=f"{url}/v1").chat_completion(question, model="tgi", max_tokens=20)

    assert await asyncio.to_thread(stream) == "One, two"
    tgi.answer = json_reply(said("One, two."))
    assert (await asyncio.to_thread(ask)).choices[0].message.content == "One, two."


async def test_the_courses_curl_gets_an_event_stream(course: tuple[str, TGI]) -> None:
    url, _ = course
    body = {"model": "tgi", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 20}
    async with httpx2.AsyncClient() as http:
        response = await http.post(f"{url}/v1/chat/completions", json=body)

    assert response.headers["content-type"].startswith("text/event-stream")
    assert text_of(events_of(response.content)) == "One, two"


async def test_a_prompt_is_counted_by_tgi(stage: Stage) -> None:
    adapter = Adapter(stage.server.settings("tgi"))
    counted = [
        (CHAT, {"messages": [{"role": "user", "content": "Hi"}] * 2, "n": 3}, 2),
        (COMPLETIONS, {"prompt": "Water is wet", "max_tokens": 3}, 3),
        (COMPLETIONS, {"prompt": ["Water is", "wet"], "n": 2}, 3),
    ]
    for endpoint, members, count in counted:
        request, _ = read_request(endpoint, json.dumps({"model": "smart", **members}).encode())
        assert await adapter.count(endpoint, request, "org/small") == count
    request, _ = read_request(COMPLETIONS, json.dumps({"model": "smart", "prompt": ""}).encode())
    with pytest.raises(UpstreamFailed):
        await adapter.count(COMPLETIONS, request, "org/small")
    await adapter.aclose()
