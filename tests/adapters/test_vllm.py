"""What is asked of vLLM, what of its answers passes, and what do its complaints become?"""

import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.vllm import Adapter
from adapters.vllm.asking import DEFAULTS, GUIDED, SAMPLING, TEMPLATE
from gateway.adapter import Dispatch
from gateway.auth import ANONYMOUS
from gateway.call import Call
from gateway.errors import ContextLengthExceeded, GatewayError, InvalidRequest
from gateway.schema.common import Usage
from gateway.schema.endpoint import CHAT, COMPLETIONS, EMBEDDINGS, Endpoint
from gateway.schema.payload import Part
from gateway.schema.reading import EXTENSION_FIELDS, judge_unknown, read_request
from gateway.settings import SettingsError, Timeouts, Upstream
from gateway.sse import Event
from gateway.stream import Chunks
from tests.house import finished, json_reply, upstream

T = TypeVar("T")
Document = dict[str, Any]

DISPATCH = Dispatch(model="model-1", request_id="r", attempt=2, tenant="t3n4nt", deadline=1e12, timeouts=Timeouts())
TOOL: Document = {"type": "function", "function": {"name": "weather"}}
NAMED = {"type": "function", "function": {"name": "weather"}}
URL = {"type": "image_url", "image_url": {"url": "http://somewhere/cat.png"}}
AUDIO = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}
FILE = {"type": "file", "file": {"file_id": "f"}}
ASKED: dict[Endpoint, Document] = {
    CHAT: {"model": "smart", "messages": [{"role": "user", "content": "Hi"}]},
    COMPLETIONS: {"model": "smart", "prompt": "Hi"},
    EMBEDDINGS: {"model": "smart", "input": "Hi"},
}


def vllm(**options: Any) -> Adapter:
    return Adapter(Upstream(adapter="vllm", base_url="http://upstream/v1", options=options))


def a_call(endpoint: Endpoint, **changes: Any) -> Call:
    payload, unknown = read_request(endpoint, json.dumps(ASKED[endpoint] | changes).encode())
    return Call(endpoint, ANONYMOUS, payload, unknown, id="7", created=7)


def sent(endpoint: Endpoint, adapter: Any = None, **changes: Any) -> Document:
    """What is sent beside the model, the question and OpenAI's defaults."""
    outgoing = (adapter or vllm()).encode(endpoint, a_call(endpoint, **changes).request, DISPATCH)
    body: Document = json.loads(outgoing.body)
    assert body.pop("model") == "model-1"
    body.pop(endpoint.asks)
    return {name: value for name, value in body.items() if (name, value) not in DEFAULTS.items()}


def test_openais_defaults_are_sent_unless_the_configuration_leaves_them_to_the_model() -> None:
    for adapter, expected in ((vllm(), DEFAULTS), (vllm(defaults={}), {}), (vllm(defaults={"top_k": 1}), {"top_k": 1})):
        body = json.loads(adapter.encode(CHAT, a_call(CHAT).request, DISPATCH).body)
        assert body.keys() - {"model", "messages"} == expected.keys()
        assert {name: body[name] for name in expected} == expected
    assert json.loads(vllm().encode(CHAT, a_call(CHAT, temperature=0).request, DISPATCH).body)["temperature"] == 0


def said_in(*parts: Document) -> Document:
    return {"messages": [{"role": "user", "content": list(parts)}]}


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of what never has to wait."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise AssertionError("it waits")


async def streamed(call: Call, documents: list[Document]) -> list[Part[Any]]:
    async def events() -> AsyncIterator[list[Event]]:
        for document in documents:
            yield [Event(json.dumps(document).encode())]

    chunks = vllm().decode_stream(call.endpoint, call.request, events())
    return [part async for arrived in chunks for part in arrived]


async def through_the_gateway(call: Call, documents: list[Document]) -> list[Document]:
    async def events() -> AsyncIterator[list[Event]]:
        yield [Event(json.dumps(document).encode()) for document in documents]

    chunks = finished(call, vllm().decode_stream(call.endpoint, call.request, events()))
    return [json.loads(part.wire) async for arrived in chunks for part in arrived]


# Requests.

STREAM_OPTIONS = {"include_usage": True, "continuous_usage_stats": True}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"temperature": None, "n": None, "stop": None, "user": "u", "metadata": {"a": "b"}}, {}),
        ({"service_tier": "auto", "verbosity": "low", "stream_options": None, "store": False}, {}),
        ({"max_tokens": 7}, {"max_completion_tokens": 7}),
        ({"max_completion_tokens": 7}, {"max_completion_tokens": 7}),
        ({"stop": "a"}, {"stop": ["a"]}),
        ({"stop": ["a", ""]}, {"stop": ["a"]}),
        ({"top_p": 0}, {"top_p": 1e-6}),
        ({"top_p": 1}, {}),
        ({"temperature": 0, "n": 3}, {"temperature": 0}),
        ({"temperature": 0.5, "n": 3}, {"temperature": 0.5, "n": 3}),
        ({"n": 1}, {}),
        ({"tools": []}, {}),
        ({"tools": [], "tool_choice": "auto"}, {}),
        ({"tools": [TOOL], "tool_choice": "none", "parallel_tool_calls": True}, {}),
        ({"tools": [TOOL], "tool_choice": NAMED}, {"tools": [TOOL], "tool_choice": NAMED}),
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"response_format": {"type": "json_object"}}),
        ({"modalities": ["text"], "functions": []}, {}),
        ({"stream": True}, {"stream": True, "stream_options": STREAM_OPTIONS}),
        (
            {"stream": True, "stream_options": {"include_usage": False}},
            {"stream": True, "stream_options": STREAM_OPTIONS},
        ),
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        ({"guided_json": {"type": "object"}}, {"structured_outputs": {"json": {"type": "object"}}}),
        ({"guided_regex": "a+"}, {"structured_outputs": {"regex": "a+"}}),
        ({"guided_grammar": None, "top_k": None}, {}),
        ({"structured_outputs": {"choice": ["a"]}}, {"structured_outputs": {"choice": ["a"]}}),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"chat_template_kwargs": {"enable_thinking": False}}),
        ({"stop_token_ids": [2], "bad_words": ["x"]}, {"stop_token_ids": [2], "bad_words": ["x"]}),
    ],
)
def test_a_chat_request_is_written_so_that_vllm_takes_it(changes: Document, expected: Document) -> None:
    assert sent(CHAT, **changes) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_tokens": 0, "echo": True}, {"max_tokens": 0, "echo": True}),
        ({"best_of": 1}, {}),
        ({"best_of": 2, "n": 2}, {"n": 2}),
        ({"best_of": 3}, {"n": 3, "logprobs": 1}),
        ({"best_of": 3, "logprobs": 0}, {"n": 3, "logprobs": 0}),
        ({"best_of": 3, "temperature": 0}, {"temperature": 0}),
        ({"suffix": ""}, {}),
        ({"top_k": 4}, {"top_k": 4}),
        ({"documents": [], "chat_template_kwargs": {}}, {}),
    ],
)
def test_a_completion_request_is_written_so_that_vllm_takes_it(changes: Document, expected: Document) -> None:
    assert sent(COMPLETIONS, **changes) == expected


@pytest.mark.parametrize(
    ("endpoint", "changes", "param"),
    [
        (CHAT, {"audio": {"voice": "alloy"}}, "audio"),
        (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
        (CHAT, {"prediction": {"type": "content"}}, "prediction"),
        (CHAT, {"web_search_options": {"a": 1}}, "web_search_options"),
        (CHAT, {"web_search_options": {}}, "web_search_options"),
        (CHAT, {"moderation": {}}, "moderation"),
        (CHAT, {"functions": [{"name": "f"}]}, "functions"),
        (CHAT, {"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools"),
        (CHAT, {"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        (CHAT, said_in(FILE), "messages[0].content[0].file"),
        (CHAT, said_in(AUDIO), "messages[0].content[0].input_audio"),
        (CHAT, said_in({"type": "text", "text": "?"}, URL), "messages[0].content[1].image_url"),
        (CHAT, {"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
        (CHAT, {"guided_json": {}, "structured_outputs": {}}, "structured_outputs"),
        (CHAT, {"structured_outputs": {"json": {}, "_backend": "x"}}, "structured_outputs"),
        (CHAT, {"structured_outputs": "x"}, "structured_outputs"),
        (COMPLETIONS, {"suffix": "end"}, "suffix"),
        (COMPLETIONS, {"best_of": 2, "echo": True}, "best_of"),
        (COMPLETIONS, {"prompt": ["a"] * 1025}, "prompt"),
        (COMPLETIONS, {"documents": ["a"]}, "documents"),
        (EMBEDDINGS, {"top_k": 4}, "top_k"),
        (EMBEDDINGS, {"guided_regex": "a"}, "guided_regex"),
    ],
)
def test_what_vllm_cannot_honour_is_refused_by_name(endpoint: Endpoint, changes: Document, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sent(endpoint, **changes)
    assert caught.value.param == param


def test_a_template_that_knows_no_developer_is_given_a_system() -> None:
    asked = [{"role": "developer", "content": "x", "name": "d"}, {"role": "user", "content": "Hi"}]
    for adapter, role in ((vllm(), "developer"), (vllm(developer_role=False), "system")):
        body = json.loads(adapter.encode(CHAT, a_call(CHAT, messages=asked).request, DISPATCH).body)
        assert body["messages"] == [{**asked[0], "role": role}, asked[1]]


def test_options_let_in_what_only_the_operator_can_know() -> None:
    sent(CHAT, vllm(audio=True, fetch_images=True), **said_in(AUDIO, URL))
    sent(CHAT, **said_in({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}))
    with pytest.raises(SettingsError, match=r"cache_slat.*did you mean 'cache_salt'"):
        vllm(cache_slat=True)


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
def test_prefixes_are_shared_within_a_tenant_only_where_that_is_configured(endpoint: Endpoint) -> None:
    assert sent(endpoint, vllm(cache_salt=True)) == {"cache_salt": "t3n4nt"}
    assert sent(endpoint) == {}


def test_every_extension_is_sent_or_refused() -> None:
    extensions = vllm().extra_fields
    assert extensions <= EXTENSION_FIELDS
    for name in EXTENSION_FIELDS - extensions:
        with pytest.raises(InvalidRequest):
            judge_unknown([name], extensions)
    for name in (SAMPLING | TEMPLATE) - {"structured_outputs"}:
        assert sent(CHAT, **{name: 1}) == {name: 1}
    assert {name: sent(CHAT, **{name: "x"}) for name in GUIDED} == {
        name: {"structured_outputs": {member: "x"}} for name, member in GUIDED.items()
    }


# Answers.


def a_choice(index: int, finish: str | None = None, **delta: Any) -> Document:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish, "token_ids": None}


def counts(prompt_tokens: int, completion_tokens: int) -> Document:
    total_tokens = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total_tokens}


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5)), max_size=20), st.booleans())
def test_usage_is_that_of_all_choices_wherever_a_stream_is_cut(steps: list[tuple[int, int]], batch: bool) -> None:
    """Three choices of one prompt, or of three prompts of 10, 11 and 12 tokens."""
    call = a_call(COMPLETIONS, stream=True, prompt=["a", "b", "c"]) if batch else a_call(CHAT, stream=True, n=3)
    spent: dict[int, int] = {}
    documents, expected = [], []
    for index, tokens in steps:
        spent[index] = spent.get(index, 0) + tokens
        choice = a_choice(index, content="x") | {"text": "x"}
        documents.append({"choices": [choice], "usage": counts(10 + batch * index, spent[index])})
        prompt_tokens = sum(10 + each for each in spent) if batch else 10
        expected.append(Usage(**counts(prompt_tokens, sum(spent.values()))))
    assert [part.usage for part in run(streamed(call, documents))] == expected


texts = st.text(st.characters(codec="utf-8"), max_size=8)
calls: Any = st.lists(st.tuples(texts, st.lists(texts, max_size=4), st.booleans()), min_size=1, max_size=3)


@given(calls, st.booleans())
def test_a_client_that_joins_tool_deltas_gets_the_calls(calls: list[Any], null: bool) -> None:
    """As SDKs do: what is a text is appended. Servers differ in what they repeat, and in what they leave out."""
    extra: Document = {"content": None} if null else {}
    documents = []
    for number, (start, rest, repeats) in enumerate(calls):
        name: Document = {"index": number, "id": f"call-{number}", "type": "function"}
        begin = {**name, "function": {"name": f"f{number}"} | ({"arguments": start} if start else {})}
        documents.append(a_choice(0, tool_calls=[begin], **extra))
        for text in rest:
            again = {**name, "function": {"name": f"f{number}", "arguments": text}} if repeats else None
            plain = {"index": number, "function": {"arguments": text}}
            documents.append(a_choice(0, tool_calls=[again or plain], **extra))
    documents.append(a_choice(0, "tool_calls", content=""))
    chunks = run(through_the_gateway(a_call(CHAT, stream=True, tools=[TOOL]), [{"choices": [c]} for c in documents]))
    joined: dict[int, Document] = {}
    for delta in (chunk["choices"][0]["delta"] for chunk in chunks):
        assert delta.get("content", "") is not None
        for part in delta.get("tool_calls", ()):
            call = joined.setdefault(part["index"], {"id": "", "name": "", "arguments": ""})
            call["id"] += part.get("id", "")
            call["name"] += part["function"].get("name", "")
            call["arguments"] += part["function"]["arguments"]
    assert joined == {
        number: {"id": f"call-{number}", "name": f"f{number}", "arguments": "".join([start, *rest])}
        for number, (start, rest, _) in enumerate(calls)
    }


leaks = st.dictionaries(
    st.sampled_from(["stop_reason", "token_ids", "prompt_logprobs", "annotations"]), st.just("LEAK")
)


@given(st.data())
def test_nothing_passes_that_openai_does_not_have(data: st.DataObject) -> None:
    def draw(document: Any) -> Document:
        return {**data.draw(leaks), **document}

    deltas = [{"role": "assistant", "content": ""}, {"content": "a"}, {"reasoning": "b"}, {"content": None}]
    choices = [draw(a_choice(0) | {"delta": draw(delta)}) for delta in deltas] + [draw(a_choice(0, "stop"))]
    chunks = run(through_the_gateway(a_call(CHAT, stream=True), [draw({"choices": [choice]}) for choice in choices]))
    message = draw({"role": "assistant", "content": "a", "tool_calls": []})
    answer = draw({"choices": [draw({"index": 0, "message": message, "finish_reason": "stop"})]})
    whole = vllm().decode(CHAT, a_call(CHAT).request, json.dumps(answer).encode())
    assert "LEAK" not in json.dumps(chunks) + whole.wire.decode()


@pytest.mark.parametrize("reason", ["stop", "length", "repetition", "eos_token", "", None])
def test_no_finish_reason_passes_that_openai_does_not_have(reason: str | None) -> None:
    documents = [{"choices": [a_choice(0, reason, content="a")]}, {"choices": [a_choice(0, "length")]}]
    chunks = run(through_the_gateway(a_call(CHAT, stream=True), documents))
    expected = {"length": "length", "": None, None: None}.get(reason, "stop")
    assert chunks[0]["choices"][0]["finish_reason"] == expected


@given(st.lists(st.lists(st.floats(-9, 0), max_size=4), min_size=4, max_size=4))
def test_the_best_of_many_are_the_likeliest_for_each_token(logprobs: list[list[float]]) -> None:
    choices = [
        {"index": index, "text": str(index), "finish_reason": "stop", "logprobs": {"token_logprobs": each}}
        for index, each in enumerate(logprobs)
    ]
    request = a_call(COMPLETIONS, best_of=4, n=2).request
    answer = json.loads(vllm().decode(COMPLETIONS, request, json.dumps({"choices": choices}).encode()).wire)["choices"]
    means = [sum(each) / len(each) if each else float("-inf") for each in logprobs]
    kept = [means[int(choice["text"])] for choice in answer]
    assert kept == pytest.approx(sorted(means, reverse=True)[:2])
    assert [(choice["index"], choice["logprobs"]) for choice in answer] == [(0, None), (1, None)]


def test_chunks_that_differ_in_text_and_usage_alone_are_spliced() -> None:
    call = a_call(CHAT, stream=True)
    role = {"choices": [a_choice(0, role="assistant", content="")], "usage": counts(10, 0)}
    texts = [{"choices": [a_choice(0, content=str(n))], "usage": counts(10, n)} for n in range(50)]
    chunks = Chunks(call)
    taken_apart = 0
    for part in run(streamed(call, [role, *texts])):
        if chunks.spliced(part) is None:
            taken_apart += 1
            chunks.rewrite([part])
    assert taken_apart == 2


# Errors.

NESTED = "This model's maximum context length is 256 tokens. "


@pytest.mark.parametrize(
    ("message", "says", "param"),
    [
        (
            NESTED + "However, your prompt contains at least 257 input tokens, which exceeds this limit even without "
            "any output tokens. (parameter=input_tokens, value=257)",
            "at least 257 tokens",
            None,
        ),
        (
            NESTED + "However, your prompt contains 9000 characters (more than 4096 characters, which is the upper "
            "bound for 255 input tokens). Please reduce the length of the input prompt.",
            "more than 255 tokens",
            None,
        ),
        (
            "You passed 300 input tokens and requested 0 output tokens. However, the model's context length is only "
            "256 tokens, resulting in a maximum input length of 256 tokens.",
            "300 tokens",
            None,
        ),
        ("The decoder prompt (length 300) is longer than the maximum model length of 256.", "300 tokens", None),
        ("Input length (300) exceeds model's maximum context length (256).", "300 tokens", None),
        ("max_tokens=512 cannot be greater than max_model_len=256. Please request fewer.", "512", "max_tokens"),
        (
            "'max_tokens' or 'max_completion_tokens' is too large: 512. This model's maximum context length is 256 "
            "tokens and your request has 17 input tokens (512 > 256 - 17).",
            "512",
            "max_tokens",
        ),
    ],
)
def test_a_context_overflow_is_told_in_openais_words(message: str, says: str, param: str | None) -> None:
    body = json.dumps({"error": {"message": message, "type": "BadRequestError", "param": "input_tokens", "code": 400}})
    error = vllm().decode_error(400, body.encode(), {})
    assert isinstance(error, ContextLengthExceeded)
    assert error.message.startswith(NESTED)
    assert says in error.message
    assert error.param == param


BAD = "Invalid 'x'. (parameter=x, value=LEAK)"


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (
            400,
            {"error": {"message": BAD, "type": "BadRequestError", "param": "x", "code": 400}},
            (400, "x", "Invalid 'x'."),
        ),
        (400, {"object": "error", "message": BAD, "param": None, "code": 400}, (400, None, "Invalid 'x'.")),
        (422, {"detail": [{"loc": ["body", "seed"], "msg": "Bad seed", "input": "LEAK"}]}, (400, "seed", "Bad seed")),
        (422, {"detail": [{"no": "loc"}]}, (400, None, "The upstream refused the request.")),
        (400, {"error": {"message": "tiny is not a multimodal model"}}, (400, "messages", None)),
        (
            400,
            {"error": {"message": 'tool_choice="required" requires --tool-call-parser to be set'}},
            (400, "tools", None),
        ),
        (401, {"error": "Unauthorized"}, (502, None, None)),
        (404, {"error": {"message": "The model `LEAK` does not exist.", "code": 404}}, (502, None, None)),
        (404, {"detail": "Not Found"}, (502, None, None)),
        (500, {"error": {"message": "LEAK", "code": 500}}, (502, None, None)),
        (501, {"error": {"message": "LEAK", "code": 501}}, (502, None, None)),
        (503, {"error": "The model is currently scaling. LEAK"}, (503, None, None)),
        (503, {"error": {"message": "The engine is currently busy LEAK", "code": 503}}, (503, None, None)),
    ],
)
def test_an_error_of_any_shape_is_one_of_openais(status: int, body: Document, expected: Any) -> None:
    error = vllm().decode_error(status, json.dumps(body).encode(), {})
    assert isinstance(error, GatewayError)
    assert (error.status, error.param) == expected[:2]
    assert expected[2] in (None, error.message)
    assert "LEAK" not in error.message
    assert "tiny" not in error.message


def test_the_same_error_within_a_stream_is_the_same() -> None:
    message = "The engine is currently busy and cannot accept new requests."
    event: Document = {"error": {"message": message, "type": "Service Unavailable", "param": None, "code": 503}}
    with pytest.raises(GatewayError) as caught:
        run(streamed(a_call(CHAT, stream=True), [event]))
    assert caught.value.status == 503


# The server.


@pytest.mark.anyio
@pytest.mark.parametrize("has_version", [True, False])
async def test_a_probe_tells_version_models_and_context_and_chat_limits_are_cut_to_it(has_version: bool) -> None:
    async def script(received: Any, writer: Any) -> None:
        models = json_reply({"detail": "Not Found"}, 404)
        if received.path == "/v1/models":
            listed = {"object": "list", "data": [{"id": "model-1", "root": "/secret", "max_model_len": 256}]}
            writer.write(whole(200, listed))
        elif received.path == "/version" and has_version:
            writer.write(whole(200, {"version": "0.32.0"}))
        else:
            await models(received, writer)

    async with upstream(script) as server:
        adapter = Adapter(server.settings("vllm"))
        facts = await adapter.probe()
        await adapter.aclose()
    assert (facts.kind, facts.version) == ("vLLM", "0.32.0" if has_version else None)
    assert [(model.id, model.context_tokens, model.revision) for model in facts.models] == [("model-1", 256, "/secret")]
    assert sent(CHAT, adapter, max_completion_tokens=1000) == {"max_completion_tokens": 256}
    assert sent(CHAT, adapter, max_completion_tokens=9) == {"max_completion_tokens": 9}
    assert sent(COMPLETIONS, adapter, max_tokens=1000) == {"max_tokens": 1000}


def whole(status: int, document: Document) -> bytes:
    body = json.dumps(document).encode()
    return b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
        status,
        len(body),
        body,
    )


class Recording(httpx2.AsyncBaseTransport):
    headers: Any = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.headers = request.headers
        return httpx2.Response(503, content=b"")


@pytest.mark.anyio
async def test_a_request_id_says_which_attempt_it_is() -> None:
    transport = Recording()
    adapter = Adapter(Upstream(adapter="vllm", base_url="http://upstream/v1"), transport=transport)
    with pytest.raises(GatewayError):
        await anext(adapter.chat(a_call(CHAT).request, DISPATCH))
    assert transport.headers["x-request-id"] == "r-2"


COUNTS: list[tuple[Endpoint, Document, list[Document], int]] = [
    (CHAT, {"temperature": 0, "tools": [TOOL]}, [{"messages": ASKED[CHAT]["messages"], "tools": [TOOL]}], 7),
    (CHAT, {"tools": [TOOL], "tool_choice": "none"}, [{"messages": ASKED[CHAT]["messages"]}], 7),
    (COMPLETIONS, {"max_tokens": 5}, [{"prompt": "Hi"}], 7),
    (COMPLETIONS, {"prompt": ["Hi", "Ho"]}, [{"prompt": "Hi"}, {"prompt": "Ho"}], 14),
    (EMBEDDINGS, {}, [{"prompt": "Hi"}], 7),
]


@pytest.mark.anyio
@pytest.mark.parametrize(("endpoint", "changes", "wanted", "count"), COUNTS)
async def test_a_prompt_is_counted_by_vllm(
    endpoint: Endpoint, changes: Document, wanted: list[Document], count: int
) -> None:
    async with upstream(json_reply({"count": 7, "max_model_len": 99, "tokens": [1] * 7})) as server:
        adapter = Adapter(Upstream(adapter="vllm", base_url=f"http://127.0.0.1:{server.port}/v1"))
        assert await adapter.count(endpoint, a_call(endpoint, **changes).request, "model-1") == count
        assert [request.path for request in server.requests] == ["/tokenize"] * len(wanted)
        assert [request.json for request in server.requests] == [{"model": "model-1", **body} for body in wanted]
        await adapter.aclose()


@pytest.mark.anyio
async def test_what_vllm_does_not_count_is_an_error() -> None:
    async with upstream(json_reply({"object": "error"}, 404)) as server:
        adapter = Adapter(Upstream(adapter="vllm", base_url=f"http://127.0.0.1:{server.port}/v1"))
        for call in (a_call(CHAT), a_call(COMPLETIONS, prompt=["Hi"] * 9)):
            with pytest.raises(GatewayError):
                await adapter.count(call.endpoint, call.request, "model-1")
        await adapter.aclose()
