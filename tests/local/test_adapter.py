"""A model in a child process: what the gateway sees of it, and what happens when it dies."""

import asyncio
import logging
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from adapters.local import Adapter
from adapters.local.frames import Loading
from gateway import errors
from gateway.adapter import Dispatch
from gateway.schema.endpoint import CHAT, COMPLETIONS, Endpoint
from gateway.schema.payload import Part, Parts
from gateway.schema.reading import read_request
from gateway.settings import SettingsError, Timeouts, Upstream
from tests.models import make_model

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
HELLO = [{"role": "user", "content": "Hello!"}]
CONTEXT_TOKENS = 65_536
LONG = {"max_tokens": 150, "logit_bias": {"2": -100}, "seed": 1}
PATIENCE_S = 60.0


def build(model: Path, **options: Any) -> Adapter:
    return Adapter(Upstream(adapter="local", options={"model": str(model), "threads": 1, "device": "cpu", **options}))


@pytest.fixture(scope="module")
async def adapter(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Adapter]:
    roomy = make_model(tmp_path_factory.mktemp("models") / "roomy", context_tokens=CONTEXT_TOKENS)
    adapter = build(roomy, max_waiting=2)
    await adapter.probe()
    yield adapter
    await adapter.aclose()


def answer(
    adapter: Adapter, endpoint: Endpoint, members: dict[str, Any], timeouts: Timeouts | None = None
) -> AsyncGenerator[Parts]:
    request, _ = read_request(endpoint, msgspec.json.encode({"model": "tiny", **members}))
    dispatch = Dispatch(
        model="tiny",
        request_id="r",
        attempt=0,
        tenant="t",
        deadline=asyncio.get_running_loop().time() + PATIENCE_S,
        timeouts=timeouts or Timeouts(),
    )
    parts: AsyncGenerator[Parts] = getattr(adapter, endpoint.verb)(request, dispatch)
    return parts


async def chunks(adapter: Adapter, endpoint: Endpoint, **members: Any) -> list[Part[Any]]:
    async with aclosing(answer(adapter, endpoint, {"stream": True, **members})) as arrivals:
        return [part async for parts in arrivals for part in parts]


async def exhaust(stream: AsyncGenerator[Parts]) -> None:
    async for _ in stream:
        pass


async def whole(adapter: Adapter, endpoint: Endpoint, **members: Any) -> Any:
    (part,) = [part async for parts in answer(adapter, endpoint, members) for part in parts]
    assert part.usage == part.value.usage
    return part.value


async def test_a_chat_streams_role_text_and_finish(adapter: Adapter) -> None:
    parts = await chunks(adapter, CHAT, messages=HELLO, max_tokens=12, seed=1)
    first, *middle, last = [msgspec.json.decode(part.wire)["choices"][0] for part in parts]
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert all(set(choice["delta"]) == {"content"} and choice["delta"]["content"] for choice in middle)
    assert last["delta"] == {}
    assert last["finish_reason"] in ("stop", "length")
    assert all(choice["finish_reason"] is None for choice in [first, *middle])
    counts = [part.usage.completion_tokens for part in parts if part.usage]
    assert counts == sorted(counts)
    assert len(counts) == len(parts)


async def test_streamed_and_whole_are_the_same_answer(adapter: Adapter) -> None:
    for endpoint, asked in ((CHAT, {"messages": HELLO}), (COMPLETIONS, {"prompt": ["The", "fox"], "echo": True})):
        members = {**asked, "n": 2, "seed": 3, "max_tokens": 20, "stop": ["e"]}
        once = await whole(adapter, endpoint, **members)
        parts = await chunks(adapter, endpoint, **members)
        for choice in once.choices:
            mine = [part.value.choices[0] for part in parts if part.value.choices[0].index == choice.index]
            said = choice.message.content if endpoint is CHAT else choice.text
            assert "".join((each.delta.content or "") if endpoint is CHAT else each.text for each in mine) == said
            assert mine[-1].finish_reason == choice.finish_reason
        assert [choice.index for choice in once.choices] == list(range(len(once.choices)))
        assert parts[-1].usage == once.usage


async def test_a_whole_chat_has_openais_shape(adapter: Adapter) -> None:
    request, _ = read_request(CHAT, msgspec.json.encode({"model": "m", "messages": HELLO, **LONG, "max_tokens": 4}))
    dispatch = Dispatch("m", "r", 0, "t", asyncio.get_running_loop().time() + PATIENCE_S, Timeouts())
    ((part,),) = [parts async for parts in adapter.chat(request, dispatch)]
    document = msgspec.json.decode(part.wire)
    (choice,) = document["choices"]
    assert choice | {"message": None} == {"index": 0, "message": None, "finish_reason": "length", "logprobs": None}
    assert set(choice["message"]) == {"role", "content", "refusal"}
    usage = document["usage"]
    assert usage["completion_tokens"] == 4
    assert usage["total_tokens"] == usage["prompt_tokens"] + 4


async def test_faults_of_the_request_are_the_clients(adapter: Adapter) -> None:
    with pytest.raises(errors.ContextLengthExceeded, match="maximum context length is 65536 tokens") as exceeded:
        await whole(adapter, CHAT, messages=[{"role": "user", "content": "a b" * 33_000}])
    assert exceeded.value.param == "messages"
    with pytest.raises(errors.ContextLengthExceeded):
        await whole(adapter, COMPLETIONS, prompt="a", max_tokens=CONTEXT_TOKENS)
    with pytest.raises(errors.InvalidRequest) as invalid:
        await whole(adapter, COMPLETIONS, prompt=[5, 100_000])
    assert invalid.value.param == "prompt"
    assert (await whole(adapter, COMPLETIONS, prompt="a")).choices


async def test_closing_a_stream_frees_the_engine(adapter: Adapter) -> None:
    endless = {"messages": HELLO, "stream": True, **LONG, "max_tokens": CONTEXT_TOKENS}
    async with asyncio.timeout(20):  # the endless ones would take minutes
        for _ in range(5):
            async with aclosing(answer(adapter, CHAT, endless)) as arrivals:
                await anext(arrivals)
            last = await whole(adapter, CHAT, messages=HELLO, max_tokens=1)
            assert last.usage.completion_tokens == 1


async def test_requests_wait_their_turn_and_too_many_are_told_to_come_back(adapter: Adapter) -> None:
    tasks = [asyncio.create_task(whole(adapter, CHAT, messages=HELLO, **LONG)) for _ in range(12)]
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, errors.Overloaded)]
    answered = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
    assert len(refused) + len(answered) == 12
    assert refused
    assert len({outcome.choices[0].message.content for outcome in answered}) == 1
    assert all(refusal.headers["retry-after"] for refusal in refused)


async def test_waiting_too_long_is_a_timeout_and_frees_the_engine(adapter: Adapter) -> None:
    impatient = Timeouts(total_s=0.001)
    with pytest.raises(errors.UpstreamTimeout):
        await anext(answer(adapter, CHAT, {"messages": HELLO, **LONG, "max_tokens": CONTEXT_TOKENS}, impatient))
    assert (await whole(adapter, CHAT, messages=HELLO, max_tokens=1)).choices


async def test_what_it_is_can_be_asked_again(adapter: Adapter) -> None:
    facts = await adapter.probe()
    assert facts.kind == "transformers"
    assert [(model.id, model.context_tokens) for model in facts.models] == [("roomy", CONTEXT_TOKENS)]


async def test_a_killed_process_fails_its_requests_and_is_replaced(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "suiron.local")
    told: list[Loading] = []
    upstream = Upstream(adapter="local", options={"model": str(tiny), "threads": 1, "device": "cpu"})
    adapter = Adapter(upstream, on_progress=told.append)
    try:
        with pytest.raises(errors.Overloaded) as loading:
            await whole(adapter, CHAT, messages=HELLO)
        assert (loading.value.code, loading.value.status) == ("model_loading", 503)
        await adapter.probe()
        assert told[-1] == Loading("warm-up", 1.0)
        assert "loading tiny: weights 100 %" in caplog.messages

        first = adapter.engine.pid
        assert first is not None
        stream = answer(adapter, CHAT, {"messages": HELLO, "stream": True, **LONG})
        await anext(stream)
        os.kill(first, signal.SIGKILL)
        with pytest.raises(errors.UpstreamFailed):
            await exhaust(stream)
        with pytest.raises(errors.Overloaded):
            await whole(adapter, CHAT, messages=HELLO)
        await adapter.probe()
        assert adapter.engine.pid != first
        assert (await whole(adapter, CHAT, messages=HELLO, max_tokens=2)).choices
        second = adapter.engine.pid
    finally:
        await adapter.aclose()
    assert second is not None
    assert not alive(second)
    with pytest.raises(errors.UpstreamFailed):
        await whole(adapter, CHAT, messages=HELLO)


async def test_a_model_that_cannot_be_loaded_is_said_once_and_not_tried_again(tmp_path: Path) -> None:
    adapter = build(tmp_path / "none")
    try:
        for _ in range(2):
            with pytest.raises(errors.UpstreamFailed, match="there is no folder"):
                await adapter.probe()
        with pytest.raises(errors.UpstreamFailed, match="could not be loaded") as failed:
            await whole(adapter, CHAT, messages=HELLO)
        assert str(tmp_path) not in failed.value.message
    finally:
        await adapter.aclose()


async def test_a_hub_model_without_a_network_names_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    adapter = Adapter(Upstream(adapter="local", options={"model": "someone/some-model"}))
    try:
        with pytest.raises(errors.UpstreamFailed) as failed:
            await adapter.probe()
    finally:
        await adapter.aclose()
    assert failed.value.message == (
        "cannot download someone/some-model: no network; download it once where there is one "
        "(`hf download someone/some-model`), copy the folder here and start with "
        "`suiron serve --model ./some-model`"
    )


def test_without_torch_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SettingsError, match=r"pip install 'suiron\[local\]'"):
        Adapter(Upstream(adapter="local"))


GATEWAY = """
import asyncio, sys
from adapters.local import Adapter
from gateway.settings import Upstream

async def main():
    adapter = Adapter(Upstream(adapter="local", options={"model": sys.argv[1], "threads": 1, "device": "cpu"}))
    await adapter.probe()
    assert not {"torch", "transformers"} & sys.modules.keys()
    print(adapter.engine.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for another process's child")
async def test_a_killed_gateway_which_never_imported_torch_leaves_no_orphan(tiny: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    gateway = subprocess.Popen(  # noqa: ASYNC220 - it is waited for by reading a line
        [sys.executable, "-c", GATEWAY, str(tiny)], stdout=subprocess.PIPE, env=environment
    )
    try:
        assert gateway.stdout is not None
        child = int(await asyncio.to_thread(gateway.stdout.readline))
        handle = os.pidfd_open(child)
    finally:
        gateway.kill()
        gateway.communicate()
    ended, _, _ = await asyncio.to_thread(select.select, [handle], [], [], 10)
    os.close(handle)
    assert ended


def alive(pid: int) -> bool:
    """Whether it runs; a zombie, which nobody waited for yet, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_a_prompt_is_counted_as_the_answer_to_it_counts_it(adapter: Adapter) -> None:
    asked: list[tuple[Endpoint, dict[str, Any]]] = [
        (CHAT, {"messages": HELLO}),
        (COMPLETIONS, {"prompt": "Hello, world"}),
        (COMPLETIONS, {"prompt": ["Hello", "world"]}),
        (COMPLETIONS, {"prompt": [1, 2, 3]}),
    ]
    for endpoint, members in asked:
        request, _ = read_request(endpoint, msgspec.json.encode({"model": "tiny", **members}))
        answered = await whole(adapter, endpoint, max_tokens=1, **members)
        assert await adapter.count(endpoint, request, "tiny") == answered.usage.prompt_tokens


async def test_what_cannot_be_read_is_not_counted_either(adapter: Adapter) -> None:
    request, _ = read_request(COMPLETIONS, msgspec.json.encode({"model": "tiny", "prompt": [2**31 - 1]}))
    with pytest.raises(errors.InvalidRequest):
        await adapter.count(COMPLETIONS, request, "tiny")
    assert not adapter.engine._counts
