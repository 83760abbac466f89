"""Does OpenAI's SDK get OpenAI's answers from a real `transformers serve`, whatever happens to that?"""

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from gateway.settings import Timeouts, Upstream
from tests.engines.engine import Engine, Front, exhaust, free_port, in_front_of, started
from tests.models import make_model

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

HASTY = Timeouts(first_token_s=3.0, idle_s=1.0)
PLAIN: Any = {"temperature": 0, "max_completion_tokens": 24}


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Its model is in the folder `model-1`, which is its name too: the server takes no other."""
    folder = tmp_path_factory.mktemp("transformers")
    make_model(folder / "model-1", context_tokens=4096, head_size=32, seed=3)
    port = free_port()
    command = [str(Path(sys.executable).parent / "transformers"), "serve", "model-1"]
    options = f"--host 127.0.0.1 --port {port} --device cpu".split()
    with started(Engine([*command, *options], port, folder / "log", HF_HOME=str(folder / "no cache"))) as engine:
        yield engine


def upstream(serve: Engine, timeouts: Timeouts | None = None) -> Upstream:
    return Upstream(
        adapter="openai",
        base_url=f"{serve.url}/v1",
        options={"engine": "transformers"},
        timeouts=timeouts or Timeouts(),
    )


@pytest.fixture
async def front(serve: Engine, tmp_path: Path) -> AsyncIterator[Front]:
    async with in_front_of(upstream(serve), tmp_path) as front:
        yield front


@pytest.fixture
async def hasty(serve: Engine, tmp_path: Path) -> AsyncIterator[Front]:
    """With little patience."""
    async with in_front_of(upstream(serve, HASTY), tmp_path) as front:
        yield front


def said(chunks: list[Any]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


async def test_a_stream_says_what_a_plain_answer_does_up_to_any_stop_string(front: Front) -> None:
    plain = await front.chat(**PLAIN)
    full = plain.choices[0].message.content
    assert plain.usage.completion_tokens == 24
    assert plain.usage.total_tokens == plain.usage.prompt_tokens + 24
    early, late = re.findall(r"[!-~]{2}", full[1:])[:2]  # at others, which no token of its own spells, it fails
    for stop in ([early], [late, early[1]], [late, early + late]):
        end = min([at for each in stop if (at := full.find(each)) >= 0], default=len(full))
        whole, chunks = await front.chat(stop=stop, **PLAIN), await front.chunks(stop=stop, **PLAIN)
        expected = (full[:end], "stop")
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == expected
        assert (said(chunks), chunks[-1].choices[0].finish_reason) == expected


async def test_a_stream_has_openais_order_and_its_usage_where_it_is_asked_for(front: Front) -> None:
    plain = await front.chat(**PLAIN)
    *chunks, last = await front.chunks(stream_options={"include_usage": True}, **PLAIN)
    assert last.choices == []
    assert last.usage == plain.usage
    assert {(chunk.id, chunk.model, chunk.created) for chunk in chunks} == {(last.id, "smart", last.created)}
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert all(chunk.usage is None for chunk in await front.chunks(**PLAIN))


async def test_completions_are_answered_and_billed(front: Front) -> None:
    asked: Any = {"model": "smart", "prompt": "The quick", "max_tokens": 12, "temperature": 0}
    completions = front.house.openai.completions
    plain = await completions.create(**asked)
    chunks = [chunk async for chunk in await completions.create(stream=True, **asked)]
    streamed = "".join(chunk.choices[0].text for chunk in chunks)
    assert streamed in (plain.choices[0].text, plain.choices[0].text.rstrip("\ufffd"))  # it drops the half at the end
    row = await front.billed(2)
    assert (row.outcome, row.usage_source, row.completion_tokens) == ("completed", "upstream", 12)


async def test_what_it_cannot_do_is_done_here_or_refused_by_name(front: Front) -> None:
    several = await front.chat(n=3, **PLAIN)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.usage.completion_tokens == 72
    prompts = await front.house.openai.completions.create(model="smart", prompt=["a", "b"], max_tokens=2)
    assert [choice.index for choice in prompts.choices] == [0, 1]
    default = await front.house.openai.completions.create(
        model="smart", prompt="a", temperature=0, logit_bias={}, stop=[]
    )
    assert default.usage is not None
    assert default.usage.completion_tokens == 16
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    assert (await front.chat(tools=tools, tool_choice="auto", max_completion_tokens=4)).choices
    assert (await front.chat(messages=[{"role": "developer", "content": "Hi"}], max_completion_tokens=1)).choices
    schema = {"type": "json_schema", "json_schema": {"name": "unit", "schema": {"type": "object"}}}
    refused: list[tuple[str, Any]] = [
        ("tool_choice", {"tools": tools, "tool_choice": "required"}),
        ("response_format", {"response_format": schema}),
        ("logprobs", {"logprobs": True}),
        ("presence_penalty", {"presence_penalty": 1}),
        ("logit_bias", {"logit_bias": {"5": 1}}),
    ]
    for param, asked in refused:
        with pytest.raises(openai.BadRequestError) as caught:
            await front.chat(**asked)
        assert caught.value.param == param


async def test_openais_temperature_is_the_default_and_not_the_models(front: Front) -> None:
    """The model's own of 0.3 would say the same nearly every time."""
    said_ = [(await front.chat(max_completion_tokens=12)).choices[0].message.content for _ in range(4)]
    assert len(set(said_)) == 4


async def test_a_client_that_leaves_is_billed_for_what_it_got_and_the_next_is_answered(front: Front) -> None:
    stream = await front.chat(stream=True, max_completion_tokens=400)
    chunks = aiter(stream)
    for _ in range(3):
        await anext(chunks)
    await stream.close()
    row = await front.billed()
    assert row.outcome == "client_gone"
    assert row.completion_tokens > 0
    assert (await front.chat(max_completion_tokens=1)).choices


async def test_a_frozen_engine_is_a_504_before_the_first_token_and_an_error_event_after(
    serve: Engine, hasty: Front
) -> None:
    with serve.frozen(), pytest.raises(openai.InternalServerError) as caught:
        await hasty.chunks(max_completion_tokens=4)
    assert (caught.value.status_code, caught.value.code) == (504, "upstream_timeout")
    chunks = aiter(await hasty.chat(stream=True, max_completion_tokens=2000))
    for _ in range(3):
        await anext(chunks)
    with serve.frozen(), pytest.raises(openai.APIError) as broken:
        await exhaust(chunks)
    assert broken.value.code == "upstream_timeout"


async def test_an_engine_that_is_killed_ends_streams_with_an_error_and_answers_again_once_it_is_back(
    serve: Engine, front: Front
) -> None:
    chunks = aiter(await front.chat(stream=True, max_completion_tokens=2000))
    for _ in range(3):
        await anext(chunks)
    serve.kill()
    with pytest.raises(openai.APIError) as caught:
        await exhaust(chunks)
    assert caught.value.code == "upstream_error"
    for streamed in (False, True):
        with pytest.raises(openai.InternalServerError) as refused:
            await front.chat(stream=streamed)
        assert (refused.value.status_code, refused.value.code) == (502, "upstream_connect_error")
    await asyncio.to_thread(serve.start)
    assert (await front.chat(max_completion_tokens=1)).choices
