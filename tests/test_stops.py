"""Does every text end at its first stop string, wherever an engine lets that through?"""

import json
from collections.abc import AsyncGenerator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.schema.endpoint import CHAT, COMPLETIONS, Endpoint
from gateway.schema.payload import Part, Parts
from tests.house import completion, finished
from tests.test_stream import a_call, a_chunk, dump, run

texts = st.text("ab🗼", max_size=12)
some_stops = st.lists(st.text("ab🗼", min_size=1, max_size=3), min_size=1, max_size=3)


class Engine:
    """Says *documents*; counts those that were taken, and sees whether it was closed."""

    def __init__(self, *documents: Any) -> None:
        self.documents = documents
        self.taken = 0
        self.closed = False

    async def answer(self, endpoint: Endpoint, streamed: bool) -> AsyncGenerator[Parts]:
        decoder = endpoint.chunks if streamed else endpoint.answers
        try:
            for document in self.documents:
                self.taken += 1
                value = decoder.decode(dump(document))
                yield [Part(value, dump(document), value.usage or None)]
        finally:
            self.closed = True


def ask(engine: Engine, endpoint: Endpoint = CHAT, **changes: Any) -> list[Any]:
    """The documents that the client gets."""

    async def answered() -> list[Any]:
        call = a_call(endpoint, **changes)
        parts = finished(call, engine.answer(endpoint, call.streamed))
        return [json.loads(part.wire) async for arrived in parts for part in arrived]

    return run(answered())


def says(*pieces: str, index: int = 0, finish: str = "length") -> list[Any]:
    """The chunks of a choice."""
    chunks = [a_chunk(index=index, delta={"content": piece}) for piece in pieces]
    return [*chunks, a_chunk(index=index, delta={}, finish_reason=finish)]


def heard(chunks: list[Any], index: int = 0) -> tuple[str, list[str]]:
    """What a choice said, and its finish reasons."""
    mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    text = "".join(choice["delta"].get("content") or "" for choice in mine)
    return text, [choice["finish_reason"] for choice in mine if choice["finish_reason"]]


@given(text=texts, stops=some_stops, cuts=st.lists(st.integers(0, 12), max_size=5))
@example(text="aab", stops=["ab"], cuts=[1, 2])
@example(text="ab", stops=["abb", "b"], cuts=[1])
def test_plain_or_streamed_in_whatever_pieces(text: str, stops: list[str], cuts: list[int]) -> None:
    end = min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
    expected = (text, "length") if end is None else (text[:end], "stop")
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    chunks = ask(Engine(*says(*(text[start:end] for start, end in pairwise(places)))), stop=stops)
    assert heard(chunks) == (expected[0], [expected[1]])
    (answer,) = ask(Engine(completion(text, finish_reason="length")), stop=stops, stream=False)
    assert (answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"]) == expected


def test_an_engine_that_goes_on_is_closed_when_all_choices_have_ended() -> None:
    first, second = says("a", ".", "b", "c", index=0), says("d", ".", "e", "f", index=1)
    engine = Engine(*(chunk for both in zip(first, second, strict=True) for chunk in both))
    chunks = ask(engine, stop=".", n=2)
    assert heard(chunks, 0) == ("a", ["stop"])
    assert heard(chunks, 1) == ("d", ["stop"])
    assert engine.taken == 5
    assert engine.closed


def test_an_engine_that_stops_too_is_heard_to_its_usage() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    engine = Engine(*says("a", ".b", finish="stop"), {"choices": [], "usage": usage})
    assert heard(ask(engine, stop=["."])) == ("a", ["stop"])
    assert engine.taken == 4


def test_what_an_echo_repeats_is_not_cut() -> None:
    plain = {"choices": [{"text": "a.bc.d", "index": 0, "finish_reason": "length"}]}
    (answer,) = ask(Engine(plain), COMPLETIONS, prompt="a.b", echo=True, stop=".", stream=False)
    assert answer["choices"][0]["text"] == "a.bc"
    chunks = [{"choices": [{"text": text, "index": 1, "finish_reason": None}]} for text in ("a.", "b.", "x.", "c")]
    engine = Engine({"choices": [{"text": "!", "index": 0, "finish_reason": "stop"}]}, *chunks)
    sent = ask(engine, COMPLETIONS, prompt=["!", "a.b."], echo=True, stop=".")
    assert "".join(choice["text"] for chunk in sent for choice in chunk["choices"] if choice["index"]) == "a.b.x"


def test_a_call_that_comes_with_held_back_text_is_not_held_back() -> None:
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    called = a_chunk(delta={"content": "<", "tool_calls": [call]})
    chunks = ask(Engine(called, a_chunk(delta={}, finish_reason="tool_calls")), stop="<|")
    assert chunks[0]["choices"][0]["delta"]["tool_calls"] == [call]
    assert heard(chunks) == ("<", ["tool_calls"])


@pytest.mark.parametrize("stop", [None, "", [], [""]])
def test_where_nothing_is_to_be_found_nothing_is_looked_for(stop: Any) -> None:
    chunks = ask(Engine(*says("a", "b")), stop=stop)
    assert heard(chunks) == ("ab", ["length"])
