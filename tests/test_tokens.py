"""How many tokens is this? What is estimated, counted and learned."""

import asyncio
import base64
import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from adapters.echo import Adapter as Echo
from gateway.adapter import Adapter, ModelFacts, UpstreamFacts
from gateway.auth import ANONYMOUS
from gateway.call import Attempt, Call, Estimate
from gateway.errors import UpstreamFailed
from gateway.models import Target
from gateway.schema.chat import ChatChunk, ChunkChoice, Delta
from gateway.schema.common import Usage
from gateway.schema.endpoint import CHAT, COMPLETIONS, EMBEDDINGS, Endpoint
from gateway.schema.mould import Mould
from gateway.schema.payload import Part, Payload
from gateway.schema.reading import read_request
from gateway.settings import Settings, Upstream, parse
from gateway.telemetry import Telemetry
from gateway.tokens import Tokens
from gateway.tokens.encodings import MAX_COUNTED_BYTES
from tests.cache.conftest import probed
from tests.house import KEY, Received, UpstreamServer, completion, json_reply, running, settings_for, upstream
from tests.served import until

pytestmark = pytest.mark.anyio

ECHO = Echo(Upstream(adapter="echo"))
TARGET = Target("e", "m", ECHO)
PIXELS = "data:image/png;base64," + "iVBORw0KGgo" * 20_000
TEXT = st.text(st.characters(codec="utf-8"), max_size=200)

TABLE_URL = "https://tables.invalid/{}.tiktoken"
PLUGIN = """
import os
from pathlib import Path
from tiktoken.load import load_tiktoken_bpe

def table(name):
    return lambda: {
        "name": name,
        "pat_str": r"\\w+|\\W",
        "mergeable_ranks": load_tiktoken_bpe(f"https://tables.invalid/{name}.tiktoken"),
        "special_tokens": {"<|end|>": 300},
    }

def gated():
    Path(os.environ["TIKTOKEN_CACHE_DIR"], "gate").read_bytes()
    return {**table("tiny")(), "name": "gated"}

ENCODING_CONSTRUCTORS = {name: table(name) for name in ("tiny", "absent", "garbled")} | {"gated": gated}
"""
MERGES = [b"th", b"the", b"he", b"in", b"\xe3\x81", "の".encode()]


def settings(**model: Any) -> Settings:
    document = {"upstreams": {"e": {"adapter": "echo"}}, "models": {"m": {"targets": [{"upstream": "e"}], **model}}}
    return parse(json.dumps(document), "settings")


def asked(endpoint: Endpoint = CHAT, **members: Any) -> Call:
    hi: Any = [{"role": "user", "content": "Hi"}] if endpoint is CHAT else "Hi"
    body = {"model": "m", endpoint.asks: hi, **members}
    request, unknown = read_request(endpoint, json.dumps(body).encode())
    return Call(endpoint, ANONYMOUS, request, unknown)


def said(text: Any, **members: Any) -> Call:
    return asked(messages=[{"role": "user", "content": text}], **members)


def answered(call: Call, prompt: int, completion: int = 1) -> Call:
    call.attempts.append(Attempt(TARGET, 0.0))
    call.first_at = 0.0
    call.usage = Usage(prompt_tokens=prompt, completion_tokens=completion)
    call.outcome = "completed"
    return call


def teach(tokens: Tokens, call: Call, prompt: int, completion: int = 1) -> None:
    tokens.prompt(call)
    tokens.settle(answered(call, prompt, completion))


def pieces(*texts: str, usage: Usage | None = None) -> list[Part[Any]]:
    return [Part.encode(ChatChunk(choices=[ChunkChoice(delta=Delta(content=text))]), usage) for text in texts]


# By size.


def test_a_chat_is_estimated_by_its_text_and_never_above_its_bytes_and_what_templates_add() -> None:
    tokens = Tokens(settings())
    short, long = tokens.prompt(said("word " * 10)), tokens.prompt(said("word " * 1000))
    assert 0 < short.tokens < long.tokens < 5000 < long.upper_bound
    assert not long.exact


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"type": "function", "function": {"name": "f", "description": "x" * 3000}}]},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"x": "y" * 3000}}}},
        {"functions": [{"name": "f", "description": "x" * 3000}]},
        {"messages": [{"role": "user", "content": "Hi", "name": "x" * 3000}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 3000}]}]},
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "x" * 3000}}],
                }
            ]
        },
        {"chat_template_kwargs": {"x": "y" * 3000}},
    ],
)
def test_everything_that_becomes_a_prompt_counts(more: dict[str, Any]) -> None:
    tokens = Tokens(settings())
    assert tokens.prompt(asked(**more)).text_bytes > tokens.prompt(asked()).text_bytes + 2900


def test_escapes_in_the_body_do_not_make_a_text_longer() -> None:
    plain = json.dumps({"model": "m", "messages": [{"role": "user", "content": "日本語" * 99}]}, ensure_ascii=False)
    request, _ = read_request(CHAT, plain.encode())
    tokens = Tokens(settings())
    assert tokens.prompt(Call(CHAT, ANONYMOUS, request, set())) == tokens.prompt(said("日本語" * 99))


def test_media_are_not_text() -> None:
    tokens = Tokens(settings())
    picture = {"type": "image_url", "image_url": {"url": PIXELS}}
    one, two = tokens.prompt(said([picture])), tokens.prompt(said([picture, picture]))
    assert one.tokens < 2000
    assert two.tokens - one.tokens == 1024
    sound = {"type": "input_audio", "input_audio": {"data": "A" * 100_000, "format": "wav"}}
    assert 20 < tokens.prompt(said([sound])).tokens < 1000


@pytest.mark.parametrize(
    ("endpoint", "members", "count"),
    [
        (COMPLETIONS, {"prompt": [1, 2, 3]}, 3),
        (COMPLETIONS, {"prompt": [[1, 2, 3], [4]]}, 4),
        (EMBEDDINGS, {"input": [1, 2]}, 2),
        (EMBEDDINGS, {"input": [[1, 2], [3]]}, 3),
    ],
)
def test_token_ids_are_counted_exactly(endpoint: Endpoint, members: dict[str, Any], count: int) -> None:
    estimate = Tokens(settings()).prompt(asked(endpoint, **members))
    assert (estimate.tokens, estimate.upper_bound, estimate.exact) == (count, count, True)


@given(st.lists(TEXT, min_size=1, max_size=4), st.lists(st.binary(min_size=2, max_size=6), max_size=20))
def test_no_byte_level_encoding_makes_more_tokens_than_the_upper_bound(texts: list[str], merges: list[bytes]) -> None:
    encoding = byte_level("any", merges)
    tokens = Tokens(settings())
    messages = [{"role": "user", "content": text} for text in texts]
    for call in (asked(messages=messages), asked(COMPLETIONS, prompt=texts), asked(EMBEDDINGS, input=texts)):
        estimate = tokens.prompt(call)
        assert estimate.upper_bound >= sum(len(encoding.encode(text, disallowed_special=())) for text in texts)
        assert estimate.tokens >= 1


@pytest.mark.parametrize(
    "call",
    [
        said("a" * 20_000_000),
        said([{"type": "text", "text": "é"}] * 50_000),
        said("<|im_start|><|endoftext|>[INST]<s>" * 1000),
        said([{"type": "image_url", "image_url": {"url": None, "detail": 7}}]),
        said([{"type": "input_audio", "input_audio": {"data": 3}}, {"type": "file", "file": {"file_data": []}}]),
        asked(messages=[{"role": "assistant", "tool_calls": [{"id": "", "type": "custom", "custom": {"a": [[]]}}]}]),
        asked(COMPLETIONS, prompt=None),
        asked(COMPLETIONS, prompt=""),
        asked(COMPLETIONS, prompt=["", ""]),
    ],
    ids=range(9),
)
def test_nothing_that_clients_send_makes_it_raise_or_slow(call: Call) -> None:
    tokens = Tokens(settings())
    started = time.thread_time()
    assert tokens.prompt(call).tokens >= 1
    assert time.thread_time() - started < 0.2


# Learned.


@given(
    st.floats(0.05, 1.5),
    st.integers(0, 60),
    st.lists(st.integers(1, 200) | st.integers(2000, 5000), min_size=8, max_size=8),
)
def test_estimates_converge_to_what_the_model_shows(ratio: float, around: int, sizes: list[int]) -> None:
    tokens = Tokens(settings())
    for size in [1, 2000, *sizes] * 30:
        call = said("x" * size)
        teach(tokens, call, around + round(tokens.prompt(call).text_bytes * ratio))
    for size in (1, 200, 1000, 4000):
        estimate = tokens.prompt(said("x" * size))
        assert estimate.tokens == pytest.approx(around + estimate.text_bytes * ratio, rel=0.1, abs=3)


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(-(2**70), 2**70), st.integers(-(2**70), 2**70))))
def test_whatever_upstreams_say_estimates_stay_within_bounds(said_so: list[tuple[int, int, int]]) -> None:
    tokens = Tokens(settings())
    for size, prompt, generated in said_so:
        teach(tokens, said("x" * size), prompt, generated)
    estimate = tokens.prompt(said("x" * 1000))
    assert 10 <= estimate.tokens <= 6200
    assert 1016 <= estimate.upper_bound <= 67_000
    assert 1 <= tokens.expected_output(said("x")) <= 2**31


def test_one_strange_prompt_does_not_spoil_the_estimates_of_all_others() -> None:
    tokens = Tokens(settings())
    for _ in range(100):
        teach(tokens, said("x" * 1000), 250)
    before = tokens.prompt(said("x" * 1000)).tokens
    teach(tokens, said("🦄" * 50_000), 200_000)
    assert before <= tokens.prompt(said("x" * 1000)).tokens < 1.3 * before


def test_the_upper_bound_learns_from_a_template_that_adds_more_than_it_allows_for() -> None:
    tokens = Tokens(settings())
    teach(tokens, said("Hi"), 2000)
    assert tokens.prompt(said("Hi")).upper_bound >= 2000


def test_what_an_image_costs_is_learned() -> None:
    tokens = Tokens(settings())
    picture = {"type": "image_url", "image_url": {"url": PIXELS[:100]}}
    call = said([picture, picture])
    for _ in range(300):
        teach(tokens, call, 170)
    assert 60 <= tokens.prompt(said([picture])).tokens <= 110


def test_each_model_learns_for_itself() -> None:
    document = {
        "upstreams": {"e": {"adapter": "echo"}},
        "models": {name: {"targets": [{"upstream": "e"}]} for name in "mn"},
    }
    tokens = Tokens(parse(json.dumps(document), "settings"))
    before = tokens.prompt(said("x" * 900, model="n"))
    for _ in range(100):
        teach(tokens, said("x" * 900), 900)
    assert tokens.prompt(said("x" * 900, model="n")) == before
    assert tokens.prompt(said("x" * 900)).tokens > before.tokens


# The answer.


def test_a_limit_is_what_is_expected_for_each_choice() -> None:
    tokens = Tokens(settings())
    assert tokens.expected_output(said("Hi", max_tokens=7)) == 7
    assert tokens.expected_output(said("Hi", max_completion_tokens=7, n=3)) == 21
    assert tokens.expected_output(asked(COMPLETIONS)) == 16
    assert tokens.expected_output(asked(COMPLETIONS, prompt=["a", "b"], max_tokens=5, n=2, best_of=3)) == 30
    assert tokens.expected_output(asked(COMPLETIONS, prompt=[[1, 2], [3]], max_tokens=5)) == 10
    assert tokens.expected_output(asked(COMPLETIONS, prompt=[1, 2, 3], max_tokens=5)) == 5
    assert tokens.expected_output(asked(COMPLETIONS, max_tokens=0, echo=True)) == 0
    assert tokens.expected_output(asked(EMBEDDINGS)) == 0


def test_without_a_limit_the_default_is_expected_until_past_answers_tell() -> None:
    tokens = Tokens(settings(default_output_tokens=300))
    assert tokens.expected_output(said("Hi", n=2)) == 600
    for number in range(1, 101):
        teach(tokens, said("Hi"), 5, number)
    assert 90 <= tokens.expected_output(said("Hi")) <= 100
    for _ in range(300):
        teach(tokens, said("Hi"), 5, 10)
    assert tokens.expected_output(said("Hi")) == 10


def test_answers_to_requests_with_a_limit_or_cut_short_say_nothing_about_those_without() -> None:
    tokens = Tokens(settings(default_output_tokens=300))
    for _ in range(100):
        teach(tokens, said("Hi", max_tokens=2), 5, 2)
        gone = answered(said("Hi"), 5, 3)
        gone.outcome = "client_gone"
        tokens.settle(gone)
    assert tokens.expected_output(said("Hi")) == 300


def test_a_cap_of_the_gateways_own_grows_where_it_cuts() -> None:
    tokens = Tokens(settings(default_output_tokens=50))
    for _ in range(100):
        call = said("Hi")
        cap = tokens.expected_output(call)
        call = said("Hi", max_completion_tokens=cap)
        call.output_cap = cap
        teach(tokens, call, 5, min(cap, 400))
    assert 400 <= tokens.expected_output(said("Hi")) <= 1000


def test_no_more_is_expected_than_the_context_leaves() -> None:
    tokens = Tokens(settings(context_tokens=100))
    call = asked(COMPLETIONS, prompt=list(range(90)), max_tokens=50, n=2)
    tokens.prompt(call)
    assert tokens.expected_output(call) == 20
    call = asked(COMPLETIONS, prompt=list(range(200)))
    tokens.prompt(call)
    assert tokens.expected_output(call) == 0


def test_the_context_is_what_upstreams_say_where_the_configuration_does_not() -> None:
    tokens, told = Tokens(settings()), [ModelFacts(id="m", context_tokens=100), ModelFacts(id="x", context_tokens=900)]
    call = asked(COMPLETIONS, prompt=list(range(90)), max_tokens=5000)
    tokens.prompt(call)
    tokens.probed("other", UpstreamFacts(kind="", models=told))
    assert tokens.expected_output(call) == 5000
    tokens.probed("e", UpstreamFacts(kind="", models=told))
    assert tokens.expected_output(call) == 10
    alone = Tokens(settings())
    alone.probed("e", UpstreamFacts(kind="", models=[ModelFacts(id="org/whatever", context_tokens=95)]))
    assert alone.expected_output(call) == 5
    configured = Tokens(settings(context_tokens=200))
    configured.probed("e", UpstreamFacts(kind="", models=told))
    assert configured.expected_output(call) == 110


def test_under_strict_an_estimate_takes_nothing_off_the_room_that_is_left() -> None:
    tokens = Tokens(settings(context_tokens=1000))
    call = said("x" * 1000, max_tokens=5000, n=2)
    estimate = tokens.prompt(call)
    assert tokens.expected_output(call) == (1000 - estimate.tokens) * 2
    assert tokens.expected_output(call, strict=True) == 999 * 2
    call = asked(COMPLETIONS, prompt=list(range(90)), max_tokens=5000)
    tokens.prompt(call)
    assert tokens.expected_output(call, strict=True) == 910


def test_what_was_generated_is_known_while_it_is_under_way() -> None:
    tokens = Tokens(settings())
    call = cut_short(said("Hi"), pieces("A", "b", usage=Usage(prompt_tokens=9, completion_tokens=5)))
    assert tokens.generated(call) == 5
    cut_short(call, pieces("c"))
    assert tokens.generated(call) == 6


# What nobody counted.


def cut_short(call: Call, *parts: list[Part[Any]]) -> Call:
    call.attempts.append(Attempt(TARGET, 0.0))
    for arrived in parts:
        call.arrived(arrived)
    call.outcome = "client_gone"
    return call


def test_a_stream_that_nobody_counted_has_at_least_a_token_a_piece() -> None:
    tokens = Tokens(settings())
    call = cut_short(said("Hi"), pieces("", "A", "b"), pieces("c"))
    tokens.settle(call)
    assert call.usage is not None
    assert (call.usage.prompt_tokens, call.usage.completion_tokens) == (tokens.prompt(call).tokens, 3)
    assert call.reckoned


def test_what_a_client_was_told_is_what_it_is_billed_and_teaches_nothing() -> None:
    tokens = Tokens(settings())
    call = cut_short(said("Hi", stream=True, stream_options={"include_usage": True}), pieces("A", "b"), pieces("c"))
    before = tokens.prompt(said("Hi")).tokens
    tokens.ended(call)
    told, call.outcome = call.usage, "completed"
    tokens.settle(call)
    assert told is not None
    assert told.completion_tokens == 3
    assert (call.usage, call.reckoned, tokens.prompt(said("Hi")).tokens) == (told, True, before)


def test_pieces_of_many_tokens_are_counted_by_what_the_model_has_shown() -> None:
    tokens = Tokens(settings())
    for _ in range(200):
        call = said("Hi")
        call.heard.add([*pieces("x" * 1000), *pieces("", usage=Usage(prompt_tokens=5))])
        teach(tokens, call, 5, 250)
    call = cut_short(said("Hi"), pieces("x" * 400))
    tokens.settle(call)
    assert call.usage is not None
    assert call.usage.completion_tokens == pytest.approx(100, abs=5)


def test_what_came_after_the_last_count_is_added_to_it() -> None:
    tokens = Tokens(settings())
    counted = Usage(prompt_tokens=9, completion_tokens=5)
    call = cut_short(said("Hi"), pieces("A", "b", usage=counted), pieces("c", "d"))
    tokens.settle(call)
    assert call.usage == Usage(prompt_tokens=9, completion_tokens=7, total_tokens=16)
    assert call.reckoned


def test_what_upstreams_counted_to_the_end_stays_as_they_say() -> None:
    tokens = Tokens(settings())
    counted = Usage(prompt_tokens=9, completion_tokens=5)
    call = cut_short(said("Hi"), pieces("A", "b"), pieces("c", usage=counted))
    tokens.settle(call)
    assert call.usage is counted
    assert not call.reckoned


def test_a_prompt_that_is_counted_only_at_the_end_is_estimated_where_that_never_came() -> None:
    tokens = Tokens(settings())
    call = cut_short(said("Hi"), pieces("A", usage=Usage(prompt_tokens=0, completion_tokens=1)))
    tokens.settle(call)
    assert call.usage is not None
    assert (call.usage.prompt_tokens, call.usage.completion_tokens) == (tokens.prompt(call).tokens, 1)


def test_reasoning_and_calls_of_tools_are_heard_too() -> None:
    tool = {"index": 0, "function": {"name": "f", "arguments": '{"a": 1}'}}
    call = said("Hi")
    for delta in (Delta(reasoning_content="Hm."), Delta(tool_calls=[tool]), Delta(tool_calls=[{"function": None}])):
        call.heard.add([Part.encode(ChatChunk(choices=[ChunkChoice(delta=delta)]))])
    assert (call.heard.pieces, call.heard.text_bytes) == (2, 3 + 9)


def test_a_piece_need_not_be_decoded_to_be_counted() -> None:
    (first,) = pieces("a")
    mould = Mould.of(first.wire)
    assert mould is not None
    alike: Part[Any] = Part(CHAT.chunks, first.wire.replace(b'"a"', b'"bcd"'), None, mould, b"bcd")
    call = cut_short(said("Hi"), [first, alike])
    assert (call.heard.pieces, call.heard.text_bytes) == (2, 4)
    assert alike._value is CHAT.chunks


def test_what_was_never_dispatched_or_failed_before_its_first_part_used_nothing() -> None:
    tokens = Tokens(settings())
    never = said("Hi")
    failed = said("Hi")
    failed.attempts.append(Attempt(TARGET, 0.0))
    failed.error = UpstreamFailed("no")
    for call in (never, failed):
        tokens.settle(call)
        assert call.usage is None


def test_the_error_of_estimates_is_a_metric_of_what_upstreams_counted() -> None:
    telemetry = Telemetry(settings())
    told, short = answered(said("Hi"), 10), cut_short(said("Hi"), pieces("A"))
    tokens = Tokens(settings())
    for call in (told, short):
        tokens.prompt(call)
        call.estimate = Estimate(5, 300)
        telemetry.begin(call, [])
        tokens.settle(call)
        telemetry.over(call)
    telemetry.metrics.settle()
    text = telemetry.metrics.render().decode()
    assert 'suiron_token_estimate_error_count{model="m"} 1.0' in text
    assert 'suiron_token_estimate_error_sum{model="m"} 0.5' in text


# Counted.


class Counting:
    """A target's adapter that counts, or fails to."""

    extra_fields: frozenset[str] = frozenset()

    def __init__(self, tokens: int | Exception) -> None:
        self.tokens = tokens
        self.asked = 0

    async def count(self, endpoint: Endpoint, request: Payload[Any], model: str) -> int:
        self.asked += 1
        if isinstance(self.tokens, Exception):
            raise self.tokens
        return self.tokens


def target(adapter: Any) -> Target:
    counting: Adapter = adapter
    return Target("e", "m", counting)


async def test_under_strict_the_first_target_that_counts_is_asked() -> None:
    tokens, counting = Tokens(settings()), Counting(42)
    call = said("Hi")
    estimate = await tokens.estimate(call, [TARGET, target(Counting(UpstreamFailed("no"))), target(counting)])
    assert not estimate.exact
    assert counting.asked == 0
    targets = [TARGET, target(Counting(UpstreamFailed("no"))), target(counting)]
    estimate = await tokens.estimate(call, targets, strict=True)
    assert (estimate.tokens, estimate.upper_bound, estimate.exact) == (42, 42, True)
    assert call.estimate is estimate


async def test_where_none_can_count_the_estimate_stands_with_its_bound() -> None:
    tokens, call = Tokens(settings()), said("Hi")
    estimate = await tokens.estimate(call, [target(Counting(UpstreamFailed("no")))], strict=True)
    assert estimate == tokens.prompt(call)


def byte_level(name: str, merges: list[bytes]) -> tiktoken.Encoding:
    ranks = {bytes([byte]): byte for byte in range(256)}
    for merge in merges:
        for end in range(2, len(merge) + 1):
            ranks.setdefault(merge[:end], len(ranks))
    return tiktoken.Encoding(name, pat_str=r"\w+|\W", mergeable_ranks=ranks, special_tokens={})


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """
    tiktoken's cache with a table in its own format, and a plugin of tiktoken's that names it: what is downloaded in
    the world cannot be had here.
    """
    folder = tmp_path_factory.mktemp("tiktoken")
    (folder / "tiktoken_ext").mkdir()
    (folder / "tiktoken_ext" / "tables.py").write_text(PLUGIN)
    ranks = [*(bytes([byte]) for byte in range(256)), *MERGES]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks)]
    cached(folder, "tiny").write_text("\n".join(lines))
    cached(folder, "garbled").write_text("no table\n")
    sys.path.insert(0, str(folder))
    before, os.environ["TIKTOKEN_CACHE_DIR"] = os.environ.get("TIKTOKEN_CACHE_DIR"), str(folder)
    yield folder
    sys.path.remove(str(folder))
    os.environ.pop("TIKTOKEN_CACHE_DIR")
    if before is not None:
        os.environ["TIKTOKEN_CACHE_DIR"] = before


def cached(folder: Path, name: str) -> Path:
    return folder / hashlib.sha1(TABLE_URL.format(name).encode()).hexdigest()


async def loaded(name: str) -> Tokens:
    tokens = Tokens(settings(encoding=name))
    tokens.load()
    async with asyncio.timeout(30):
        await tokens.loaded()
    return tokens


async def test_an_encoding_counts_text_exactly(tables: Path) -> None:
    tokens = await loaded("tiny")
    estimate = await tokens.estimate(asked(COMPLETIONS, prompt=["the inn", "の"]), [])
    assert (estimate.tokens, estimate.upper_bound, estimate.exact) == (5, 5, True)
    estimate = await tokens.estimate(asked(EMBEDDINGS, input="the"), [])
    assert (estimate.tokens, estimate.exact) == (1, True)
    tokens.close()


async def test_an_encoding_counts_a_chat_with_what_stands_around_its_messages(tables: Path) -> None:
    tokens = await loaded("tiny")
    one = await tokens.estimate(said("the"), [])
    two = await tokens.estimate(asked(messages=[{"role": "user", "content": "the"}] * 2), [])
    role = len("user")
    assert one.tokens == role + 1 + 3 + 3
    assert two.tokens == 2 * (role + 1 + 3) + 3
    assert one.tokens < one.upper_bound <= Tokens(settings()).prompt(said("the")).upper_bound
    assert not one.exact
    tools = [{"type": "function", "function": {"name": "f", "description": "x" * 30}}]
    assert (await tokens.estimate(said("the", tools=tools), [])).tokens > one.tokens + 30
    tokens.close()


async def test_the_text_of_a_special_token_is_text(tables: Path) -> None:
    tokens = await loaded("tiny")
    assert (await tokens.estimate(asked(COMPLETIONS, prompt="<|end|>"), [])).tokens == 7
    tokens.close()


async def test_a_long_text_and_media_are_not_counted_by_an_encoding(tables: Path) -> None:
    tokens = await loaded("tiny")
    estimate = await tokens.estimate(asked(COMPLETIONS, prompt="the " * (MAX_COUNTED_BYTES // 4)), [])
    assert not estimate.exact
    picture = said([{"type": "image_url", "image_url": {"url": PIXELS}}])
    assert await tokens.estimate(picture, []) == tokens.prompt(picture)
    tokens.close()


async def test_while_a_thread_counts_the_event_loop_goes_on(tables: Path) -> None:
    tokens = await loaded("tiny")
    counting = [asyncio.create_task(tokens.estimate(asked(COMPLETIONS, prompt="a b" * 80_000), [])) for _ in range(3)]
    turns = 0
    while not all(task.done() for task in counting):
        await asyncio.sleep(0)
        turns += 1
    assert turns > 3
    assert all(task.result().exact for task in counting)
    tokens.close()


@pytest.mark.parametrize("name", ["absent", "garbled", "no-such-encoding"])
async def test_without_its_table_a_model_is_estimated_and_the_log_says_so(
    tables: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    with caplog.at_level(logging.WARNING, "suiron.tokens"):
        tokens = await loaded(name)
    (line,) = caplog.messages
    assert name in line
    assert "TIKTOKEN_CACHE_DIR" in line
    call = said("the")
    assert await tokens.estimate(call, []) == tokens.prompt(call)
    tokens.close()


def test_a_table_is_never_fetched_and_without_encodings_tiktoken_is_not_even_imported(tmp_path: Path) -> None:
    code = """
import asyncio, sys
from gateway.settings import parse
from gateway.telemetry import Telemetry
from gateway.tokens import Tokens

def watch(event, args):
    assert not event.startswith(("socket.getaddrinfo", "socket.connect", "urllib")), (event, args)

sys.addaudithook(watch)
for encoding in "", ", encoding: o200k_base":
    model = f"{{targets: [{{upstream: e}}]{encoding}}}"
    made = Tokens(parse(f"upstreams: {{e: {{adapter: echo}}}}\\nmodels: {{m: {model}}}", "x"))
    made.load()
    asyncio.run(made.loaded())
    made.close()
    print("tiktoken" in sys.modules)
"""
    environment = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["False", "True"]
    assert "is not on this disk" in done.stderr
    assert list(tmp_path.iterdir()) == []


# Through the front door.


def under_limits(server: UpstreamServer, limit: str, **model: Any) -> Settings:
    document = {
        "auth": {"keys": [{"name": "alice", "sha256": KEY.sha256, "limits": {"tokens_per_minute": json.loads(limit)}}]},
        "upstreams": {"v": {"adapter": "vllm", "base_url": f"http://127.0.0.1:{server.port}/v1"}},
        "models": {"smart": {"targets": [{"upstream": "v"}], "default_output_tokens": 50, **model}},
    }
    return parse(json.dumps(document), "settings")


async def as_vllm(received: Received, writer: asyncio.StreamWriter) -> None:
    counted = {"count": 7, "max_model_len": 4096, "tokens": [1] * 7}
    await json_reply(counted if received.path == "/tokenize" else completion())(received, writer)


@pytest.mark.parametrize(
    ("limit", "asked", "left"),
    [
        ('{"limit": 1000, "strict": true}', ["/tokenize", "/v1/chat/completions"], 1000 - 7 - 50),
        ("1000", ["/v1/chat/completions"], 1000 - 5 - 50),
    ],
    ids=["strict", "plain"],
)
async def test_only_a_strict_limit_costs_a_request_an_exchange_more(limit: str, asked: list[str], left: int) -> None:
    async with upstream(as_vllm) as server, running(under_limits(server, limit)) as house:
        server.requests.clear()
        response = await house.post()
        assert response.status_code == 200
        posts = [request for request in server.requests if request.method == "POST"]
        assert [request.path for request in posts if request.json.get("max_tokens") != 0] == asked  # 0: a probe's
        assert response.headers["x-ratelimit-remaining-tokens"] == str(left)


async def test_it_is_ready_when_its_encodings_are_loaded_and_not_before(tables: Path) -> None:
    """Making one keeps the interpreter for half a second."""
    os.mkfifo(tables / "gate")
    async with (
        upstream(as_vllm) as server,
        running(under_limits(server, "1000", encoding="gated")) as house,
    ):
        assert (await house.post()).status_code == 200
        await until(
            lambda: any(request.method == "POST" and request.json.get("max_tokens") == 0 for request in server.requests)
        )
        assert (await house.post()).status_code == 200
        not_yet = await house.http.get(f"{house.url}/health/ready")
        (tables / "gate").write_bytes(b"open")
        await probed(house)
    assert not_yet.json() == {"status": "loading"}


async def test_how_far_off_estimates_are_is_in_the_metrics() -> None:
    async with upstream(json_reply(completion())) as server, running(settings_for(server.settings())) as house:
        assert (await house.post()).status_code == 200
        async with asyncio.timeout(10):
            text = ""
            while "suiron_token_estimate_error_count" not in text:
                text = (await house.http.get(f"{house.url}/metrics")).text
        assert 'suiron_token_estimate_error_count{model="smart"} 1.0' in text
