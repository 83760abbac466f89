"""Is whatever was answered answered again alike, in both forms, as the OpenAI SDK reads it?"""

import itertools
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gateway.cache import Cache
from gateway.cache.question import Fingerprints
from gateway.cache.track import Track
from gateway.schema.common import Usage
from gateway.schema.endpoint import CHAT, COMPLETIONS, EMBEDDINGS
from gateway.schema.payload import Part, Parts
from gateway.settings import Caching
from gateway.sse import write_events
from gateway.stores.answers import MemoryAnswers
from gateway.stream import Chunks
from tests.cache.conftest import ASK_USAGE, STREAM, USED, Playing, chunk, delta, hello, keeping, settings_with, whole
from tests.cache.direct import a_call, all_of
from tests.house import HELLO, House, events_of

pytestmark = pytest.mark.anyio

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "こんにちは",
        "👩‍👩‍👧 family",
        'a "quote" \\ and\n',
        "{}",
        "e\u0301te\u0301",
        "\u2028",
        "data: [DONE]\n\n",
        "null",
        "",
    ]
)
PIECES = st.lists(TEXT.filter(bool), max_size=6)


@dataclass
class Call:
    id: str
    name: str
    arguments: list[str]


@dataclass
class Choice:
    """One choice of an answer, in pieces. Without `content` its message has none."""

    content: list[str] | None
    reasoning: list[str] = field(default_factory=list)
    refusal: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    logprobs: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def finish(self) -> str:
        return "tool_calls" if self.calls else "stop"

    def whole(self, index: int) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if self.content is None else "".join(self.content),
            "refusal": "".join(self.refusal) or None,
        }
        if self.reasoning:
            message["reasoning_content"] = "".join(self.reasoning)
        if self.calls:
            message["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": "".join(c.arguments)}}
                for c in self.calls
            ]
        logprobs = {"content": [token(piece) for piece in self.content or []], "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs if self.logprobs else None,
            "finish_reason": self.finish,
            **self.extra,
        }

    def deltas(self, index: int) -> list[dict[str, Any]]:
        said: list[dict[str, Any]] = [{"role": "assistant", "content": None if self.content is None else ""}]
        said += [{"reasoning_content": piece} for piece in self.reasoning]
        said += [{"content": piece} for piece in self.content or []]
        said += [{"refusal": piece} for piece in self.refusal]
        for place, call in enumerate(self.calls):
            begun = {
                "index": place,
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": ""},
            }
            said.append({"tool_calls": [begun]})
            said += [{"tool_calls": [{"index": place, "function": {"arguments": piece}}]} for piece in call.arguments]
        choices: list[dict[str, Any]] = [
            {
                "index": index,
                "delta": delta,
                "logprobs": {"content": [token(delta["content"])], "refusal": None}
                if self.logprobs and delta.get("content")
                else None,
                "finish_reason": None,
            }
            for delta in said
        ]
        return [*choices, {"index": index, "delta": {}, "logprobs": None, "finish_reason": self.finish, **self.extra}]


def token(text: str) -> dict[str, Any]:
    return {"token": text, "logprob": -0.5, "bytes": list(text.encode()), "top_logprobs": []}


NAMES = st.sampled_from(["weather", "search", "f"])
CALLS = st.lists(st.builds(Call, st.uuids().map(str), NAMES, PIECES), max_size=3)
CHOICES = st.builds(
    Choice,
    content=st.none() | PIECES,
    reasoning=PIECES,
    refusal=st.just([]) | PIECES,
    calls=CALLS,
    logprobs=st.booleans(),
    extra=st.sampled_from([{}, {"stop_reason": "</s>"}]),
).filter(lambda choice: choice.content is not None or bool(choice.calls))
ANSWERS = st.lists(CHOICES, min_size=1, max_size=3)


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[Choice], list[Parts]]:
    """Choices, and a stream that says them: interleaved, some chunks arriving together."""
    choices = draw(ANSWERS)
    left = [choice.deltas(index) for index, choice in enumerate(choices)]
    chunks = [rest.pop(0) for rest in left]  # in order: else the gateway begins them itself, with empty content
    while any(left):
        index = draw(st.sampled_from([index for index, rest in enumerate(left) if rest]))
        chunks.append(left[index].pop(0))
    usage = chunk([], used=USED, usage=USED, system_fingerprint="fp_1")
    parts = [*(chunk([said], system_fingerprint="fp_1") for said in chunks), usage]
    arrivals: list[Parts] = []
    for part in parts:
        together: bool = draw(st.booleans())
        if arrivals and together:
            arrivals[-1].append(part)
        else:
            arrivals.append([part])
    return choices, arrivals


class Stage:
    """A gateway that keeps answers, what its upstream says next, and a question for each answer."""

    def __init__(self, house: House, adapter: Playing) -> None:
        self.house = house
        self.adapter = adapter
        self._seeds = itertools.count()

    def says(self, *arrivals: Parts, **asked: Any) -> dict[str, Any]:
        def write(_: Any) -> list[Parts]:
            return [[Part(part.value, part.wire, part.usage) for part in parts] for parts in arrivals]

        self.adapter.write = write
        return {**HELLO, "seed": next(self._seeds), **asked}

    async def streamed(self, body: dict[str, Any]) -> tuple[list[Any], str]:
        response = await self.house.post(body | {"stream": True, "stream_options": {"include_usage": True}})
        events = events_of(response.content)
        assert events.pop() == "[DONE]"
        for event in events:
            del event["id"], event["created"]
        return events, response.headers["x-suiron-cache"]

    async def accumulated(self, body: dict[str, Any]) -> Any:
        asked: Any = body | {"stream_options": {"include_usage": True}}
        async with self.house.openai.chat.completions.stream(**asked) as stream:
            return plain(await stream.get_final_completion())

    async def answered(self, body: dict[str, Any]) -> Any:
        asked: Any = body
        return plain(await self.house.openai.chat.completions.create(**asked))


NOT_COMPARED = {"id", "created", "object", "parsed", "parsed_arguments", "system_fingerprint", "stop_reason"}
"""… the last two, since the SDK takes one from the usage chunk, and the other not at all, when it accumulates."""


def plain(completion: Any) -> Any:
    """What the SDK has read, without what is minted for each answer or parsed by its helper."""
    return _without(completion.model_dump(exclude_none=True), NOT_COMPARED)


def _without(value: Any, names: set[str], depth: int = 0) -> Any:
    if isinstance(value, list):
        return [_without(item, names, depth) for item in value]
    if not isinstance(value, dict):
        return value
    dropped = names if not depth else names - {"id"}
    kept = {name: _without(member, names, depth + 1) for name, member in value.items() if name not in dropped}
    return {name: member for name, member in kept.items() if not (name == "index" and depth == 3)}  # of a call


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two answers differ: all of them would be pages."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [d for name in one | other for d in differences(one.get(name), other.get(name), f"{path}.{name}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [d for at, pair in enumerate(zip(one, other, strict=True)) for d in differences(*pair, f"{path}[{at}]")]
    return [] if one == other else [f"{path}: {str(one)[:100]} is not {str(other)[:100]}"]


@pytest.fixture(scope="module")
async def stage() -> AsyncIterator[Stage]:
    adapter = Playing(lambda _: [])
    async with keeping(adapter, Caching(mode="all", max_entry_bytes=2**20)) as house:
        yield Stage(house, adapter)


EXAMPLES = settings(
    max_examples=25,
    phases=[Phase.reuse, Phase.generate],  # to shrink takes minutes with the SDK in the loop
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@EXAMPLES
@given(said=streams())
async def test_a_stream_comes_again_chunk_by_chunk_and_as_one_answer(
    stage: Stage, said: tuple[list[Choice], list[Parts]]
) -> None:
    choices, arrivals = said
    body = stage.says(*arrivals, n=len(choices))
    first, state = await stage.streamed(body)
    assert state == "miss"
    second, state = await stage.streamed(body)
    assert state == "hit"
    assert differences(second, first) == []
    heard, read = await stage.accumulated(body), await stage.answered(body)
    assert differences(read, heard) == []
    assert [choice["finish_reason"] for choice in read["choices"]] == [choice.finish for choice in choices]
    assert [choice["message"].get("content") for choice in read["choices"]] == [
        None if choice.content is None else "".join(choice.content) for choice in choices
    ]


@given(said=streams(), usage=st.booleans(), escaped=st.booleans())
def test_many_pieces_at_once_are_written_and_counted_as_one_by_one(
    said: tuple[list[Choice], list[Parts]], usage: bool, escaped: bool
) -> None:
    choices, arrivals = said
    track = Track(CHAT, True)
    for parts in [
        *arrivals[:1],
        *([[delta({"content": f"{n}\\"}) for n in range(9)]] if escaped else []),
        *arrivals[1:],
    ]:
        track.add(parts)

    def sent(parts: Parts) -> tuple[bytes, list[int]]:
        call = a_call({**(ASK_USAGE if usage else STREAM), "n": len(choices)}, id="x", created=1)
        call.arrived(parts)
        chunks = Chunks(call)
        wires = [part.wire for part in chunks.rewrite(parts)]
        heard = call.heard
        return write_events(wires), [heard.pieces, heard.text_bytes, heard.counted_bytes]

    assert sent(track.in_runs(0, len(track))) == sent(track.parts(0, len(track)))


@EXAMPLES
@given(choices=ANSWERS)
async def test_an_answer_comes_again_and_as_a_stream(stage: Stage, choices: list[Choice]) -> None:
    answer = whole(choices=[choice.whole(index) for index, choice in enumerate(choices)], system_fingerprint="fp_1")
    body = stage.says([answer], n=len(choices))
    first, second = await stage.answered(body), await stage.answered(body)
    assert differences(second, first) == []
    calls = stage.adapter.calls
    assert differences(await stage.accumulated(body), first) == []
    assert stage.adapter.calls == calls


@EXAMPLES
@given(texts=st.lists(PIECES, min_size=1, max_size=3), logprobs=st.booleans())
async def test_completions_come_again_in_both_forms(stage: Stage, texts: list[list[str]], logprobs: bool) -> None:
    def lists(pieces: list[str]) -> Any:
        tops = [{piece: -0.5} for piece in pieces]
        return {"tokens": pieces, "token_logprobs": [-0.5] * len(pieces), "top_logprobs": tops} if logprobs else None

    done = [
        {"index": index, "text": "".join(pieces), "logprobs": lists(pieces), "finish_reason": "stop"}
        for index, pieces in enumerate(texts)
    ]
    chunks = [
        chunk([{"index": index, "text": piece, "logprobs": lists([piece]), "finish_reason": None}], COMPLETIONS)
        for index, pieces in enumerate(texts)
        for piece in pieces
    ]
    ends = [
        chunk([{"index": index, "text": "", "logprobs": None, "finish_reason": "stop"}], COMPLETIONS)
        for index in range(len(texts))
    ]
    for said in ([[whole(COMPLETIONS, choices=done)]], [[part] for part in [*chunks, *ends]]):
        streamed = len(said) > 1
        body = stage.says(*said, prompt="x", n=len(texts), logprobs=2 if logprobs else None)
        del body["messages"]
        forms = [
            (await stage.house.post(body | {"stream": stream}, "completions")) for stream in (streamed, False, True)
        ]
        assert [response.headers["x-suiron-cache"] for response in forms] == ["miss", "hit", "hit"]
        plain, events = forms[1].json(), events_of(forms[2].content)[:-1]
        given = {choice["index"]: choice for choice in plain["choices"]}
        for index, pieces in enumerate(texts):
            heard = [c for event in events for c in event["choices"] if c["index"] == index]
            assert "".join(choice["text"] for choice in heard) == given[index]["text"] == "".join(pieces)
            assert heard[-1]["finish_reason"] == given[index]["finish_reason"] == "stop"
            if logprobs and pieces:
                tokens = [t for choice in heard if choice["logprobs"] for t in choice["logprobs"]["tokens"]]
                assert tokens == given[index]["logprobs"]["tokens"] == pieces


async def test_embeddings_are_kept_where_deterministic_answers_are() -> None:
    data = [{"object": "embedding", "index": index, "embedding": [0.5, 1.0]} for index in range(2)]
    adapter = Playing(lambda _: [[whole(EMBEDDINGS, Usage(prompt_tokens=3, total_tokens=3), data=data)]])
    async with keeping(adapter, Caching(mode="deterministic")) as house:
        body = {"model": "smart", "input": ["a", "b"]}
        first, second = [await house.post(body, "embeddings") for _ in range(2)]
        assert [first.headers["x-suiron-cache"], second.headers["x-suiron-cache"]] == ["miss", "hit"]
        assert first.content == second.content
        await house.post(body | {"user": "someone"}, "embeddings")
        assert adapter.calls == 1


async def test_recorded_pacing_waits_as_it_was_waited_for() -> None:
    now = [0.0]
    slept: list[float] = []

    async def produce(_: Any) -> AsyncGenerator[Parts]:
        for wait_s, parts in zip((0.5, 0.1, 0.25, 0.0, 0.0), hello(), strict=True):
            now[0] += wait_s
            yield parts

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    config = settings_with(Caching(mode="all", replay="recorded", coalesce=False))
    cache = Cache(config, MemoryAnswers(10**6), Fingerprints(config), sleep=sleep, monotonic=lambda: now[0])
    first = await all_of(cache.through(a_call(), produce))
    await cache.settled()
    second = await all_of(cache.through(a_call(), produce))
    assert [len(parts) for parts in first] == [1, 1, 1, 1, 1]
    assert [len(parts) for parts in second] == [1, 1, 3]
    assert slept == [0.1, 0.25]
    assert [p.wire for parts in first for p in parts] == [p.wire for parts in second for p in parts]
