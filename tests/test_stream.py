"""Does an answer stay the same, whatever its chunks look like and whichever way they are rewritten?"""

import json
from collections.abc import AsyncIterator, Coroutine
from itertools import pairwise
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.openai import Adapter
from gateway.auth import ANONYMOUS
from gateway.call import Call
from gateway.errors import UpstreamFailed
from gateway.schema.endpoint import CHAT, COMPLETIONS, Endpoint, expected_choices
from gateway.schema.payload import Part, Payload
from gateway.settings import Upstream
from gateway.sse import BETWEEN, Event, EventReader
from gateway.stream import Chunks
from tests.house import HELLO, ROLE, USAGE, finished

T = TypeVar("T")
Document = dict[str, Any]

ENVELOPE: Document = {"id": "up-1", "object": "x", "created": 17, "model": "model-1"}
PLAIN: Document = {"index": 0, "delta": {"content": "x"}, "logprobs": None, "finish_reason": None}


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of what never has to wait."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise AssertionError("it waits")


def a_call(endpoint: Endpoint = CHAT, **changes: Any) -> Call:
    body = json.dumps({**HELLO, "prompt": "a", "stream": True, **changes}).encode()
    return Call(endpoint, ANONYMOUS, Payload(endpoint.requests.decode(body), body), set(), id="7", created=7)


def a_part(document: Document | bytes, endpoint: Endpoint = CHAT) -> Part[Any]:
    wire = document if isinstance(document, bytes) else dump(document)
    value = endpoint.chunks.decode(wire)
    return Part(value, wire, value.usage or None)


def dump(document: Document, ascii: bool = False, spaced: bool = False) -> bytes:
    separators = (", ", ": ") if spaced else (",", ":")
    return json.dumps(document, ensure_ascii=ascii, separators=separators).encode()


def a_chunk(**changes: Any) -> Document:
    return {**ENVELOPE, "choices": [PLAIN | changes]}


# The two ways of rewriting.


class Rebuilding(Chunks):
    """Takes every chunk apart."""

    def spliced(self, part: Part[Any]) -> bytes | None:
        return None


class Splicing(Chunks):
    """Counts the chunks that were not taken apart."""

    count = 0

    def spliced(self, part: Part[Any]) -> bytes | None:
        wire = super().spliced(part)
        self.count += wire is not None
        return wire


pieces = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=6),
    st.sampled_from(
        [
            "\\",
            '"',
            'x\\"',
            '","text":"',
            "null",
            ',"usage":null}',
            '"model":"m"',
            "}],",
            "\u2028\r\n",
            "推論",
            "👩‍👩‍👧‍👦🇯🇵",
            "[DONE]",
            "data: x\n\n",
            "",
        ]
    ),
)
maybe_null: Any = st.sampled_from([{}, {}, {"x": None}, {"x": 1}, {"x": None, "y": None}, {"x": [{"y": None}]}])
logprobs: Any = st.sampled_from(
    [{}, {"logprobs": None}, {"logprobs": {"content": []}}, {"logprobs": {"content": None, "refusal": None}}]
)
calls = [{"index": 0, "id": None, "function": {"name": None, "arguments": "null"}}]
deltas: Any = st.sampled_from(
    [
        *[{}] * 6,
        {"role": "assistant"},
        {"role": None},
        {"content": None},
        {"refusal": None},
        {"refusal": "No."},
        {"text": "x"},
        {"reasoning_content": "x"},
        {"tool_calls": None},
        {"tool_calls": calls},
        {"content": None, "function_call": None},
    ]
)
tops: Any = st.sampled_from(
    [
        *[{}] * 6,
        {"usage": None},
        {"usage": USAGE},
        {"system_fingerprint": None},
        {"service_tier": "x"},
        {"obfuscation": "ab"},
        {"text": "x"},
    ]
)


@st.composite
def choices(draw: st.DrawFn, chat: bool, count: int) -> Document:
    if draw(st.integers(0, 2)):
        plain: Document = {"delta": {"content": draw(pieces)}} if chat else {"text": draw(pieces)}
        vendor: Document = draw(
            st.sampled_from([{}, {}, {"token_ids": None}, {"stop_reason": None, "token_ids": None}])
        )
        if chat and draw(st.integers(0, 3)) == 0:
            plain["delta"]["role"] = "assistant"
        plain |= draw(st.sampled_from([{}, {"logprobs": None}]))
        return {"index": draw(st.integers(0, count - 1)), **plain, "finish_reason": None, **vendor}
    index: Document = draw(st.sampled_from([{"index": number} for number in range(count)] + [{}]))
    said: Document = {"delta": {"content": draw(pieces), **draw(deltas)}} if chat else {"text": draw(pieces)}
    reason = draw(st.sampled_from([None, None, None, None, None, "", "stop"]))
    finish: Document = draw(st.sampled_from([{"finish_reason": reason}] * 5 + [{}]))
    return {**index, **said, **draw(logprobs), **finish, **draw(maybe_null)}


@st.composite
def streams(draw: st.DrawFn, chat: bool, count: int) -> list[bytes]:
    names = draw(st.permutations(list(ENVELOPE)))
    envelope = {name: ENVELOPE[name] for name in names}
    wires = []
    for _ in range(draw(st.integers(1, 10))):
        late = {"id": "up-2"} if draw(st.integers(0, 9)) == 0 else {}
        odd = draw(st.integers(0, 4)) == 0
        several = draw(st.lists(choices(chat, count), max_size=3)) if odd else [draw(choices(chat, count))]
        document = {**envelope, **late, "choices": several, **draw(tops)}
        ascii, pretty = draw(st.booleans()), draw(st.sampled_from([None] * 10 + [0, 1]))
        for text in draw(st.lists(pieces, max_size=4)):
            document["choices"] = [with_text(choice, text) for choice in document["choices"]]
            wire = dump(document, ascii) if pretty is None else json.dumps(document, indent=pretty).encode()
            wires.append(wire)
    return wires


def with_text(choice: Document, text: str) -> Document:
    if isinstance(choice.get("delta", {}).get("content"), str):
        return choice | {"delta": choice["delta"] | {"content": text}}
    return choice | ({"text": text} if "text" in choice else {})


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS], ids=["chat", "completions"])
@pytest.mark.parametrize("asked", [False, True])
@given(data=st.data())
def test_splicing_and_rebuilding_give_the_same_chunks(endpoint: Endpoint, asked: bool, data: st.DataObject) -> None:
    wires = data.draw(streams(endpoint is CHAT, 2))
    call = a_call(endpoint, n=2, stream_options={"include_usage": asked})
    both: list[list[Any]] = []
    for chunks in (Chunks(call), Rebuilding(call)):
        sent = [part.wire for wire in wires for part in chunks.rewrite([a_part(wire, endpoint)])]
        assert not any(b"\n" in wire for wire in sent)
        both.append([json.loads(wire) for wire in sent])
    assert both[0] == both[1]


@pytest.mark.parametrize("choice", [{}, {"token_ids": None}])
@pytest.mark.parametrize("extra", [{}, {"usage": None}, {"system_fingerprint": "fp"}, {"usage": None, "x": "y"}])
def test_nearly_all_of_an_ordinary_stream_is_spliced(choice: Document, extra: Document) -> None:
    ordinary = [a_chunk(delta=ROLE), *[a_chunk(**choice)] * 100, a_chunk(delta={}, finish_reason="stop")]
    chunks = Splicing(a_call())
    for document in ordinary:
        chunks.rewrite([a_part(document | extra)])
    assert chunks.count == 99


@pytest.mark.parametrize(
    "document",
    [
        {"id": "a", "id ": "b", "object": "x", "created": 1, "choices": [PLAIN], "model": "leak"},
        {"choices": [PLAIN], **ENVELOPE, "model": "leak"},
        ENVELOPE | {"id": 'a"b', "model": "leak", "choices": [PLAIN]},
        b'{"id":"a","id":"b","object":"x","created":1,"choices":[%b],"model":"leak"}' % dump(PLAIN),
    ],
)
def test_an_envelope_elsewhere_is_exchanged_too(document: Document | bytes) -> None:
    chunks = Chunks(a_call())
    for _ in range(3):
        (part,) = chunks.rewrite([a_part(document)])
        assert json.loads(part.wire)["model"] == "smart"
        assert b"leak" not in part.wire


# Whole streams, through the dialect.


async def answered(call: Call, blocks: list[bytes]) -> list[Any]:
    """What the client gets for an event stream in *blocks*."""

    async def events() -> AsyncIterator[list[Event]]:
        reader = EventReader(1 << 20)
        for block in blocks:
            if arrived := reader.feed(block):
                yield arrived

    dialect = Adapter(Upstream(adapter="openai", base_url="http://upstream/v1"))
    parts = dialect.decode_stream(call.endpoint, call.request, events())
    sent = [part.wire async for arrived in finished(call, parts) for part in arrived]
    return [json.loads(wire) for wires in sent for wire in wires.split(BETWEEN)]


@given(data=st.data())
def test_the_client_sees_the_same_text_however_it_is_sent_and_cut(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 3))
    order = data.draw(st.permutations([index for index in range(count) for _ in range(data.draw(st.integers(1, 4)))]))
    texts = dict.fromkeys(range(count), "")
    documents = []
    for index in order:
        text = data.draw(pieces)
        texts[index] += text
        delta = {"content": text} | data.draw(st.sampled_from([{}, {"role": "assistant"}, {"tool_calls": None}]))
        documents.append({**ENVELOPE, "choices": [PLAIN | {"index": index, "delta": delta}], **data.draw(tops)})
    endings = data.draw(st.permutations(range(count)))
    documents += [a_chunk(index=index, delta={}, finish_reason="stop") for index in endings]
    stream = data.draw(framed(documents))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    blocks = [stream[start:end] for start, end in pairwise([0, *cuts, len(stream)])]
    chunks = run(answered(a_call(n=count), blocks))
    sent = [choice for chunk in chunks for choice in chunk["choices"]]
    said = {index: [choice for choice in sent if choice["index"] == index] for index in range(count)}
    assert {i: "".join(each["delta"].get("content") or "" for each in said[i]) for i in said} == texts
    assert list(dict.fromkeys(choice["index"] for choice in sent)) == list(range(count))
    for each in said.values():
        assert ["role" in choice["delta"] for choice in each] == [True] + [False] * (len(each) - 1)
        assert [choice["finish_reason"] for choice in each] == [None] * (len(each) - 1) + ["stop"]


@st.composite
def framed(draw: st.DrawFn, documents: list[Document]) -> bytes:
    """An event stream, as one server or another would write it."""
    end = draw(st.sampled_from([b"\n", b"\r\n", b"\r"]))
    events = []
    for document in documents:
        wire = dump(document, ascii=draw(st.booleans()), spaced=draw(st.booleans()))
        events.append(draw(st.sampled_from([b"", b": ping" + end * 2, b"event: x" + end])))
        events.append(draw(st.sampled_from([b"data: ", b"data:"])) + wire + end * 2)
    return b"".join(events) + draw(st.sampled_from([b"", b"data: [DONE]" + end * 2]))


def test_a_stream_may_be_cut_at_every_byte() -> None:
    documents = [a_chunk(delta={"content": "推論 👩‍👩‍👧‍👦 🇯🇵"}), a_chunk(finish_reason="stop")]
    for ending in (b"\n", b"\r\n", b"\r"):
        stream = b"".join(b"data: " + dump(document) + ending * 2 for document in documents)
        whole = run(answered(a_call(), [stream]))
        assert run(answered(a_call(), [bytes([byte]) for byte in stream])) == whole
        for at in range(len(stream)):
            assert run(answered(a_call(), [stream[:at], stream[at:]])) == whole


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 1),
        ({"n": 3}, 3),
        ({"prompt": ["a", "b"], "n": 2}, 4),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [[1], [2]]}, 2),
        ({"prompt": None}, 1),
    ],
)
def test_a_choice_is_expected_for_every_prompt_and_every_n(changes: Document, expected: int) -> None:
    endpoint = COMPLETIONS if "prompt" in changes else CHAT
    assert expected_choices(a_call(endpoint, **changes).request.value) == expected


def test_an_answer_that_ends_early_is_never_whole() -> None:
    documents = [a_chunk(index=1, finish_reason="stop"), a_chunk(index=0), a_chunk(index=0, finish_reason="length")]
    stream = [b"data: " + dump(document) + b"\n\n" for document in documents]
    assert len(run(answered(a_call(n=2), stream))) == 4
    for count in range(len(stream)):
        with pytest.raises(UpstreamFailed):
            run(answered(a_call(n=2), stream[:count]))


def test_usage_is_the_last_that_the_upstream_told() -> None:
    call = a_call(stream_options={"include_usage": True})
    call.usage = a_part({"choices": [], "usage": USAGE}).usage
    chunks = run(answered(call, [b"data: " + dump(a_chunk(finish_reason="stop") | {"usage": USAGE}) + b"\n\n"]))
    assert [chunk["usage"] for chunk in chunks] == [None, USAGE]
    assert {chunk["id"] for chunk in chunks} == {"chatcmpl-7"}
