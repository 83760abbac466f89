"""Is a chunk taken for another one with a different text only where it is that?"""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.openai import Adapter
from gateway.errors import UpstreamFailed
from gateway.schema.endpoint import CHAT
from gateway.schema.mould import Mould
from gateway.schema.payload import Parts, Payload, one_by_one
from gateway.settings import Upstream
from gateway.sse import Event

pytestmark = pytest.mark.anyio


def a_chunk(text: str = "Hello", **delta: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text, **delta}, "logprobs": None, "finish_reason": None}
    return json.dumps({"id": "a", "choices": [choice], "usage": None}, ensure_ascii=False).encode()


def the_mould(wire: bytes) -> Mould:
    mould = Mould.of(wire)
    assert mould is not None
    return mould


MOULD = the_mould(a_chunk())

PIECES = [b"\\", b'"', b"n", b"u", b"0041", b"\n", b"\xe6\x8e", b"\xa8", b" ", b'","x":"']
strings = st.one_of(
    st.binary(max_size=8),
    st.text(max_size=6).map(lambda text: json.dumps(text, ensure_ascii=False)[1:-1].encode(errors="surrogatepass")),
    st.lists(st.sampled_from([b"\\", b'"', b"n", b"u", b"0041", b"\n", b"\xe6\x8e", b"\xa8", b" ", b'","x":"'])).map(
        b"".join
    ),
)


@given(strings)
def test_what_fits_decodes_and_differs_in_nothing_but_its_text(text: bytes) -> None:
    wire = MOULD.before + text + MOULD.after
    found = MOULD.text_of(wire)
    if found is None:
        return
    document = json.loads(wire.decode())
    document["choices"][0]["delta"]["content"] = "Hello"
    assert found == text
    assert document == json.loads(a_chunk())
    assert msgspec.json.decode(wire) is not None


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=6))
def test_whatever_can_be_written_without_control_characters_fits(text: str) -> None:
    assert MOULD.text_of(a_chunk(text)) == json.dumps(text, ensure_ascii=False)[1:-1].encode()


@given(st.lists(strings, max_size=6))
def test_those_that_fit_are_the_same_together_and_alone(texts: list[bytes]) -> None:
    wires = [MOULD.before + text + MOULD.after for text in texts]
    alone = [MOULD.text_of(wire) for wire in wires]
    fitting = alone[: alone.index(None)] if None in alone else alone
    assert MOULD.texts_of(wires) == fitting


others = st.sampled_from([b"", b"{}", MOULD.before, MOULD.after, MOULD.before[:-5] + MOULD.after, a_chunk(x="y")])
fitting = strings.map(lambda text: MOULD.before + text + MOULD.after)
together = st.lists(st.one_of(fitting, others), min_size=2, max_size=3).map(b"\0".join)


@given(st.lists(st.one_of(fitting, others, together), max_size=6))
def test_none_is_taken_to_fit_together_that_does_not_alone(wires: list[bytes]) -> None:
    alone = [MOULD.text_of(wire) for wire in wires]
    assert MOULD.texts_of(wires) == (alone[: alone.index(None)] if None in alone else alone)


@pytest.mark.parametrize(
    "wire",
    [a_chunk(x="y"), a_chunk()[:-1], a_chunk() + b" ", MOULD.before[:-5] + MOULD.after, b"", a_chunk()[:-1] + b",}"],
)
def test_what_differs_elsewhere_does_not_fit(wire: bytes) -> None:
    assert MOULD.text_of(wire) is None


@pytest.mark.parametrize("wire", [b"{}", a_chunk(text="x", arguments="y"), b'{"content": "\\u0041"}'])
def test_where_there_is_no_telling_what_the_text_is_there_is_no_mould(wire: bytes) -> None:
    assert Mould.of(wire) is None


def reading(*documents: bytes) -> AsyncGenerator[Parts]:
    async def events() -> AsyncIterator[list[Event]]:
        yield [Event(document) for document in documents]

    request = Payload(CHAT.requests.decode(b'{"model": "m", "messages": [{"role": "user"}]}'), b"")
    return Adapter(Upstream(adapter="openai", base_url="http://a/v1")).decode_stream(CHAT, request, events())


async def test_chunks_that_were_not_decoded_say_the_same_as_if_they_had_been() -> None:
    wires = [a_chunk("", role="assistant"), *map(a_chunk, ("a", '"b"', "推")), a_chunk("d", x=1), a_chunk("e")]
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    wires.append(json.dumps({"choices": [], "usage": usage}).encode())
    (parts,) = [parts async for parts in reading(*wires, b"[DONE]", b"nonsense")]
    assert len(parts) < len(wires)
    parts = one_by_one(parts)
    assert [part.wire for part in parts] == wires
    assert [part.value for part in parts] == [CHAT.chunks.decode(wire) for wire in wires]
    assert [part.usage is not None for part in parts] == [False] * 6 + [True]


async def test_what_came_before_a_fault_goes_out_and_the_fault_is_raised() -> None:
    parts = reading(a_chunk("a"), a_chunk("b"), b'{"error": {"message": "out of memory", "code": 500}}', a_chunk("c"))
    assert [part.wire for part in await anext(parts)] == [a_chunk("a"), a_chunk("b")]
    with pytest.raises(UpstreamFailed):
        await anext(parts)
