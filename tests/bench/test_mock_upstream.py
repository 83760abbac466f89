"""Does the benchmark's upstream speak OpenAI? The real SDK says."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from openai import AsyncOpenAI

from tests.bench.mock_upstream import PROMPT_TOKENS, VECTOR, Connection, Mock

pytestmark = pytest.mark.anyio


@pytest.fixture
def mock() -> Mock:
    return Mock(tokens=4)


@pytest.fixture
async def client(mock: Mock) -> AsyncIterator[AsyncOpenAI]:
    server = await asyncio.get_running_loop().create_server(lambda: Connection(mock), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, AsyncOpenAI(api_key="none", base_url=f"http://127.0.0.1:{port}/v1", max_retries=0) as client:
        yield client


async def test_a_plain_answer_has_text_and_usage(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="any", messages=[{"role": "user", "content": "Hello"}])
    assert answer.model == "mock-upstream-model"
    assert answer.choices[0].message.content == " w0 w1 w2"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == PROMPT_TOKENS + 4


@pytest.mark.parametrize(("at_once", "interval_s"), [(True, 0.0), (False, 0.0), (False, 0.001)])
async def test_a_stream_is_the_plain_answer_in_pieces(
    client: AsyncOpenAI, mock: Mock, at_once: bool, interval_s: float
) -> None:
    mock.at_once, mock.interval_s = at_once, interval_s
    stream = await client.chat.completions.create(
        model="any",
        messages=[{"role": "user", "content": "Hello"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert choices[0].delta.role == "assistant"
    assert [choice.delta.content for choice in choices] == ["", " w0", " w1", " w2", None]
    assert choices[-1].finish_reason == "stop"
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [4]


async def test_the_other_endpoints_answer_too(client: AsyncOpenAI) -> None:
    completion = await client.completions.create(model="any", prompt="Hello")
    assert completion.choices[0].text == " w0 w1 w2"
    embedding = await client.embeddings.create(model="any", input=["one", "two"])
    assert [tuple(row.embedding) for row in embedding.data] == [VECTOR, VECTOR]
    assert [model.id async for model in client.models.list()] == ["mock-upstream-model"]


async def test_what_was_generated_is_counted(client: AsyncOpenAI, mock: Mock) -> None:
    await client.completions.create(model="any", prompt="Hello")
    async for _ in await client.completions.create(model="any", prompt="Hello", stream=True):
        pass
    assert (mock.stats.requests, mock.stats.completion_tokens, mock.stats.cut_short) == (2, 8, 0)
