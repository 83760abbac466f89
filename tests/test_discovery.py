"""What is found out about upstreams, and what becomes of it."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from adapters import vllm
from adapters.openai import Adapter as OpenAI
from adapters.vllm.adapter import REPAIRS
from gateway.adapter import Adapter, Dispatch, Features, ModelFacts, Repair, UpstreamFacts, load_adapter
from gateway.discovery import AGAIN_S, EVERY_S, JITTER, Discovery, changes, describe
from gateway.errors import UpstreamError, UpstreamUnreachable
from gateway.schema.endpoint import CHAT
from gateway.schema.payload import Part, Parts, Payload
from gateway.settings import Auth, Model, Secret, Settings, Target, Upstream
from tests.house import HELLO, KEY, Received, ScriptedAdapter, completion, head, running, upstream
from tests.test_cli import suiron

pytestmark = pytest.mark.anyio

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
SEEN = {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, IMAGE]}]}


class Told:
    """An adapter whose probes follow a script; the last line goes on."""

    extra_fields: frozenset[str] = frozenset()

    def __init__(self, *lines: UpstreamFacts | Exception) -> None:
        self.lines = list(lines)
        self.asked = 0

    async def probe(self) -> UpstreamFacts:
        self.asked += 1
        line = self.lines[min(self.asked, len(self.lines)) - 1]
        if isinstance(line, Exception):
            raise line
        return line

    async def aclose(self) -> None: ...


class Naps:
    """Sleeps that end when the test says so."""

    def __init__(self) -> None:
        self.lengths: list[float] = []
        self._go: asyncio.Queue[None] = asyncio.Queue()

    async def __call__(self, seconds: float) -> None:
        self.lengths.append(seconds)
        await self._go.get()

    async def end(self, count: int = 1) -> None:
        for _ in range(count):
            self._go.put_nowait(None)
            for _ in range(10):
                await asyncio.sleep(0)


def facts(*models: str, **changes: Any) -> UpstreamFacts:
    return UpstreamFacts(**{"kind": "vLLM", "models": [ModelFacts(id=model) for model in models], **changes})


DOWN = UpstreamUnreachable("The upstream could not be reached.")


async def test_each_is_asked_again_and_only_what_is_new_is_told(caplog: pytest.LogCaptureFixture) -> None:
    adapter, naps, told = Told(facts("a"), facts("a"), DOWN, DOWN, facts("b", version="2")), Naps(), []
    discovery = Discovery({"up": adapter}, lambda name, found: told.append((name, found)), sleep=naps, draw=lambda: 0.5)
    caplog.set_level(logging.INFO)
    assert await discovery.first() == {"up": facts("a")}
    keeping = asyncio.ensure_future(discovery.keep_up())
    await naps.end(5)
    keeping.cancel()
    assert told == [("up", facts("a")), ("up", facts("b", version="2"))]
    assert naps.lengths == [EVERY_S, EVERY_S, AGAIN_S, 2 * AGAIN_S, EVERY_S, EVERY_S]
    assert [record.getMessage() for record in caplog.records if record.name == "suiron"] == [
        "upstream up: The upstream could not be reached.",
        "upstream up is there: vLLM 2: b",
        "upstream up is vLLM 2 now, and was vLLM",
        "upstream up does not have a any more",
        "upstream up has b too",
    ]


async def test_one_that_is_down_or_broken_holds_nobody_up() -> None:
    adapters = {"down": Told(DOWN), "odd": Told(KeyError("a prompt")), "well": Told(facts("a"))}
    found = await Discovery(adapters, lambda name, facts: None).first()
    assert found["well"] == facts("a")
    assert found["down"] is DOWN
    assert "a prompt" not in str(found["odd"])


def test_pauses_are_jittered_and_bounded() -> None:
    drawn = [0.0, 0.999]
    for draw in drawn:
        discovery = Discovery({}, lambda name, facts: None, draw=lambda draw=draw: draw)  # type: ignore[misc]
        pauses = [discovery._pause_s(failures) for failures in range(2000)]
        assert max(pauses) <= EVERY_S * (1 + JITTER)
        assert min(pauses) >= AGAIN_S * (1 - JITTER)


def test_changes_are_told_in_words() -> None:
    before = facts("a", "b", version="1")
    after = facts(version="1", models=[ModelFacts(id="a", context_tokens=4096), ModelFacts(id="c")])
    assert changes(before, before) == []
    assert changes(before, after) == [
        "does not have b any more",
        "has c too",
        "gives a a context of 4096 tokens, and gave None",
    ]


def test_what_was_found_is_said_in_a_line() -> None:
    features = Features(tools=True, logprobs=True, vision=False, usage_on_abort=True)
    model = ModelFacts(id="llama", context_tokens=8192, features=features)
    repairs = tuple(Repair(f"repair {number}", "chat") for number in range(11))
    found = UpstreamFacts(kind="vLLM", version="0.32", models=[model], repairs=repairs)
    assert describe(found) == (
        "vLLM 0.32: llama (8192 tokens); tools ✓ logprobs ✓ images ✗ usage on abort ✓, 11 deviations repaired"
    )
    assert describe(UpstreamFacts(kind="echo")) == "echo: tells no models"
    assert describe(facts(*map(str, range(30)))).endswith("8, 9, and 20 more")


def server(answers: dict[str, Any]) -> Any:
    """A server that answers paths; what is an integer is a status."""

    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        answer = answers.get(received.path, 404)
        if callable(answer):
            answer = answer(received.json)
        status, body = (
            (answer, b"{}") if isinstance(answer, int) else answer if isinstance(answer, tuple) else (200, answer)
        )
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {"content-type": "application/json", "content-length": str(len(sent))}
        writer.write(head(status, fields) + sent)

    return script


def listed(owner: str, *names: str, **more: Any) -> Any:
    return {"object": "list", "data": [{"id": name, "owned_by": owner, **more} for name in names]}


SHOWN = {
    "llava": {
        "capabilities": ["completion", "vision"],
        "parameters": 'stop "<eos>"\nnum_ctx                        8192',
    },
    "qwen": {"capabilities": ["completion", "tools"]},
}
PROPS = {
    "default_generation_settings": {"n_ctx": 4096, "params": {}},
    "modalities": {"vision": True, "audio": False},
    "build_info": "b6123-abc",
    "total_slots": 4,
}


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        pytest.param(
            {"/v1/models": listed("sglang", "m"), "/get_server_info": {"version": "0.5.23", "context_length": 9000}},
            "SGLang 0.5.23: m (9000 tokens)",
            id="SGLang",
        ),
        pytest.param(
            {"/v1/models": listed("sglang", "m", max_model_len=7), "/get_server_info": 500},
            "SGLang: m (7 tokens)",
            id="SGLang that tells little",
        ),
        pytest.param(
            {"/v1/models": listed("llamacpp", "m"), "/props": PROPS},
            "llama.cpp b6123-abc: m (4096 tokens), 4 requests at a time; images ✓",
            id="llama.cpp",
        ),
        pytest.param(
            {
                "/v1/models": listed("library", "llava", "qwen"),
                "/api/version": {"version": "0.9"},
                "/api/show": lambda asked: SHOWN[asked["model"]],
            },
            "Ollama 0.9: llava (8192 tokens), qwen; tools ✓ images ✓",
            id="Ollama",
        ),
        pytest.param(
            {"/v1/models": listed("library", "m"), "/api/version": b"<html>", "/api/show": {"capabilities": 7}},
            "Ollama: m",
            id="nonsense",
        ),
    ],
)
async def test_each_engine_tells_what_it_can(answers: Any, said: str) -> None:
    async with upstream(server(answers)) as up:
        adapter = OpenAI(up.settings())
        found = await adapter.probe()
        await adapter.aclose()
    assert describe(found).startswith(said)


def tagged(digest: str) -> Any:
    return {"/v1/models": listed("library", "m"), "/api/tags": {"models": [{"name": "m", "digest": digest}]}}


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param(lambda what: {"/v1/models": listed("vllm", "m", root=what)}, id="vLLM, as another server"),
        pytest.param(
            lambda what: {"/v1/models": listed("sglang", "m"), "/get_server_info": {"model_path": what}}, id="SGLang"
        ),
        pytest.param(
            lambda what: {"/v1/models": listed("llamacpp", "m"), "/props": {**PROPS, "model_path": what}},
            id="llama.cpp",
        ),
        pytest.param(tagged, id="Ollama"),
    ],
)
async def test_another_model_under_the_same_name_is_told_apart(answers: Any) -> None:
    found = []
    for what in ("models/one", "models/two"):
        async with upstream(server(answers(what))) as up:
            adapter = OpenAI(up.settings())
            found.append(await adapter.probe())
            await adapter.aclose()
    before, after = found
    assert [model.revision for model in before.models] == ["models/one"]
    assert changes(before, after) == ["has another model under the name m"]
    assert changes(after, after) == []


async def test_transformers_serves_although_its_list_fails() -> None:
    async with upstream(server({"/v1/models": 500, "/health": {"status": "ok"}})) as up:
        adapter = OpenAI(up.settings(options={"engine": "transformers"}))
        found = await adapter.probe()
        unknown = OpenAI(up.settings())
        with pytest.raises(UpstreamError):
            await unknown.probe()
        await asyncio.gather(adapter.aclose(), unknown.aclose())
    assert (found.kind, found.models) == ("transformers serve", [])
    assert len(found.repairs) > 8


NO_PARSER = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'


@pytest.mark.parametrize(
    ("says", "tools"),
    [(NO_PARSER, False), ("max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)", True), ("?", None)],
)
async def test_vllm_is_asked_for_tools_by_a_request_that_it_must_refuse(says: str, tools: bool | None) -> None:
    refusal = (400, {"error": {"message": says, "type": "BadRequestError", "param": None, "code": 400}})
    answers = {"/v1/models": listed("vllm", "m"), "/version": {"version": "0.32.0"}, "/v1/chat/completions": refusal}
    async with upstream(server(answers)) as up:
        adapter = vllm.Adapter(up.settings("vllm"))
        found = await adapter.probe()
        assert found.models[0].features.tools is tools
        await adapter.probe()
        await adapter.aclose()
        asked = [received.json for received in up.requests if received.method == "POST"]
    assert [body["max_tokens"] for body in asked] == [0]  # once, and not every minute


class Seeing(ScriptedAdapter):
    def __init__(self, features: Features) -> None:
        super().__init__()
        self._features = features

    def features(self, model: str) -> Features:
        return self._features

    async def chat(self, request: Payload[Any], dispatch: Dispatch) -> AsyncGenerator[Parts]:
        self.requests.append(request.value)
        wire = json.dumps(completion()).encode()
        yield [Part(CHAT.answers.decode(wire), wire)]


@pytest.mark.parametrize(
    ("feature", "asks", "param"),
    [
        ("vision", SEEN, "messages[0].content[1].image_url"),
        ("tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ("logprobs", {"logprobs": True}, "logprobs"),
        (
            "json_schema",
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}},
            "response_format",
        ),
    ],
)
async def test_only_who_can_is_asked_and_what_nobody_can_is_refused_by_name(
    feature: str, asks: Any, param: str
) -> None:
    blind, able, unknown = Seeing(Features(**{feature: False})), Seeing(Features(**{feature: True})), Seeing(Features())
    by_name: dict[str, Adapter] = {"blind": blind, "able": able, "unknown": unknown}
    settings = Settings(
        auth=Auth(keys=[KEY]),
        upstreams={name: Upstream(adapter="scripted") for name in by_name},
        models={
            "some": Model(targets=[Target(upstream="blind"), Target(upstream="able", tier=1)]),
            "none": Model(targets=[Target(upstream="blind")]),
            "perhaps": Model(targets=[Target(upstream="unknown")]),
        },
    )
    async with running(settings, by_name) as house:
        assert (await house.post(HELLO | asks | {"model": "some"})).status_code == 200
        assert (await house.post(HELLO | asks | {"model": "perhaps"})).status_code == 200
        refused = await house.post(HELLO | asks | {"model": "none"})
        error = refused.json()["error"]
        assert (refused.status_code, error["param"], error["code"]) == (400, param, "unsupported_parameter")
        assert (await house.post(HELLO | {"model": "none"})).status_code == 200
    assert (blind.calls, able.calls, unknown.calls) == (1, 1, 1)


async def test_check_asks_every_upstream_and_names_what_is_to_be_mended(tmp_path: Path) -> None:
    file = tmp_path / "g.yaml"
    answers = {"/v1/models": listed("vllm", "llama", max_model_len=64), "/version": {"version": "0.32.0"}}
    async with upstream(server(answers)) as up:
        file.write_text(
            f"""
upstreams:
  gpu: {{adapter: vllm, base_url: "http://127.0.0.1:{up.port}/v1"}}
models:
  good: {{targets: [{{upstream: gpu, model: llama}}]}}
"""
        )
        done = await asyncio.to_thread(suiron, "check", "--probe", str(file))
        assert done.returncode == 0, done.stderr
        assert "gpu: vLLM 0.32.0: llama (64 tokens); logprobs ✓ json_schema ✓" in done.stdout
        repaired = f"{len(REPAIRS)} deviations repaired\n  repaired: {REPAIRS[0].says}\n"
        assert f"usage on abort ✓, {repaired}" in done.stdout
        file.write_text(
            f"""
upstreams:
  gpu: {{adapter: vllm, base_url: "http://127.0.0.1:{up.port}/v1"}}
  dead: {{adapter: openai, base_url: "http://127.0.0.1:1/v1"}}
models:
  bad: {{targets: [{{upstream: gpu, model: lama}}, {{upstream: dead}}]}}
"""
        )
        done = await asyncio.to_thread(suiron, "check", "--probe", str(file))
        assert done.returncode == 1
        assert "upstream dead: The upstream could not be reached." in done.stderr
        assert "models.bad.targets[0]: gpu does not list 'lama', but llama" in done.stderr
        file.write_text(f"upstreams: {{gpu: {{adapter: openai, base_url: 'http://127.0.0.1:{up.port}/v1'}}}}")
        done = await asyncio.to_thread(suiron, "check", "--probe", str(file))
        assert (done.returncode, done.stderr) == (0, "")
        assert "  better with `adapter: vllm`: more of its deviations are repaired\n" in done.stdout


@pytest.mark.parametrize(
    ("status", "key", "said"),
    [
        (404, None, "It has no models below its base_url, which mostly ends in /v1."),
        (401, None, "It wants a credential: give it an api_key."),
        (401, Secret(env="HOME"), "It refuses the credential in api_key."),
    ],
)
@pytest.mark.parametrize("adapter", ["openai", "vllm"])
async def test_a_probe_says_what_the_operator_has_to_mend(
    adapter: str, status: int, key: Secret | None, said: str
) -> None:
    async def refusing(received: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(head(status, {"content-length": "0"}))

    async with upstream(refusing) as up:
        asked = load_adapter(up.settings(adapter, api_key=key))
        with pytest.raises(UpstreamError, match=f"^{said}$"):
            await asked.probe()
        await asked.aclose()


async def test_the_context_that_an_upstream_tells_holds_where_the_configuration_says_none() -> None:
    answers = {"/v1/models": listed("sglang", "m", max_model_len=64), "/v1/completions": completed()}
    async with upstream(server(answers)) as up:
        settings = Settings(
            auth=Auth(keys=[KEY]),
            upstreams={"up": up.settings()},
            models={
                "told": Model(targets=[Target(upstream="up", model="m")]),
                "given": Model(targets=[Target(upstream="up", model="m")], context_tokens=100),
            },
        )
        async with running(settings) as house:
            statuses = {}
            for model in ("told", "given"):
                for limit in (64, 65, 101):
                    asked = {"model": model, "prompt": "a", "max_tokens": limit}
                    answer = await house.post(asked, "completions")
                    statuses[model, limit] = answer.status_code
            error = answer.json()["error"]
    assert statuses == {
        ("told", 64): 200,
        ("told", 65): 400,
        ("told", 101): 400,
        ("given", 64): 200,
        ("given", 65): 200,
        ("given", 101): 400,
    }
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    assert "100 tokens" in error["message"]


def completed() -> Any:
    choice = {"index": 0, "text": "b", "finish_reason": "stop", "logprobs": None}
    return {"id": "x", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}
