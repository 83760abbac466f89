"""Nothing that was asked, answered or sent as a header is found in anything that is watched."""

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
from asyncio import StreamWriter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from gateway.settings import Auth, Model, Settings, Target, Timeouts, Upstream
from gateway.settings import Telemetry as Asked
from gateway.telemetry import Telemetry
from gateway.telemetry.log import Log, LogHandler
from gateway.telemetry.traces import Tracing
from tests.house import (
    AUTH,
    KEY,
    TOKEN,
    Received,
    Script,
    UpstreamServer,
    chunk,
    completion,
    head,
    hello_stream,
    json_reply,
    running,
    stream_reply,
    upstream,
)

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parent.parent
CANARY = "canary7"
SECRETS = (CANARY, CANARY.upper(), TOKEN)

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": f"{CANARY}_tool", "parameters": {"type": "object", "description": CANARY}},
}
QUESTION: dict[str, Any] = {
    "model": "smart",
    "user": CANARY,
    "metadata": {CANARY: CANARY},
    "stop": [CANARY * 2],
    "tools": [TOOL],
    f"{CANARY}_member": 1,
    "messages": [
        {"role": "system", "content": CANARY},
        {"role": "user", "content": f"{CANARY}\r\n\x1b[31m"},
        {
            "role": "assistant",
            "tool_calls": [{"id": CANARY, "type": "function", "function": {"name": "f", "arguments": CANARY}}],
        },
        {"role": "tool", "tool_call_id": CANARY, "content": CANARY},
    ],
}
HEADERS = {
    "content-type": "application/json",
    "user-agent": CANARY,
    "cookie": CANARY,
    "x-request-id": CANARY,
    "openai-organization": CANARY,
    "tracestate": f"a={CANARY}",
    "traceparent": CANARY,
}
ADDRESS = f"http://{CANARY}.internal:8000/v1/{CANARY}"
ERROR = {"error": {"message": f"no route to {ADDRESS}", "type": CANARY, "code": ADDRESS}}


async def hangs_up(_: Received, writer: StreamWriter) -> None:
    writer.close()


async def talks_nonsense(_: Received, writer: StreamWriter) -> None:
    writer.write(CANARY.encode() + b"\r\n\r\n")
    writer.close()


async def is_html(_: Received, writer: StreamWriter) -> None:
    body = f"<html>{CANARY}</html>".encode()
    writer.write(head(200, {"content-type": "text/html", "content-length": str(len(body)), "x-powered-by": CANARY}))
    writer.write(body)


CALL = {"index": 0, "id": CANARY, "type": "function", "function": {"name": CANARY, "arguments": CANARY}}
STREAM = [chunk({"role": "assistant", "content": CANARY}), chunk({"tool_calls": [CALL]})]
SCRIPTS: dict[str, Script] = {
    "answers": json_reply(completion(CANARY), x_upstream=CANARY),
    "streams": stream_reply(*STREAM, *hello_stream()[1:]),
    "streams, and breaks": stream_reply(*STREAM, cut=True),
    "streams, and is wrong": stream_reply(*STREAM, b'data: {"error": {"message": "%b"}}\n\n' % ADDRESS.encode()),
    "streams nonsense": stream_reply(*STREAM, b"data: %b\n\n" % CANARY.encode()),
    "fails": json_reply(ERROR, 500),
    "refuses the request": json_reply(ERROR, 400),
    "refuses the credential": json_reply(ERROR, 401),
    "is full": json_reply(ERROR, 429, retry_after=CANARY),
    "hangs up": hangs_up,
    "talks nonsense": talks_nonsense,
    "is HTML": is_html,
    "answers half": json_reply(completion(CANARY, finish_reason=None)),
    "is not JSON": json_reply(CANARY.encode()),
}


@dataclass
class Stage:
    url: str
    http: httpx2.AsyncClient
    first: UpstreamServer
    seen: list[bytes]
    """What was answered where nothing of the upstream's may be in it."""

    async def ask(self, body: Any, key: str = TOKEN, path: str = "chat/completions") -> httpx2.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = HEADERS | {"authorization": f"Bearer {key}"}
        return await self.http.post(f"{self.url}/v1/{path}", content=content, headers=headers)


async def every_way(stage: Stage) -> None:
    """Requests that go well and that go wrong, in all the ways there are."""
    for script in SCRIPTS.values():
        stage.first.script = script
        for model in ("smart", "spare"):
            for stream in (False, True):
                response = await stage.ask(QUESTION | {"model": model, "stream": stream})
                if response.status_code >= 400:
                    stage.seen.append(response.content)
    for body in (QUESTION | {"temperature": CANARY}, QUESTION | {"n": 0}, CANARY.encode(), b'{"model":"\xff' + b"}"):
        await stage.ask(body)
    await stage.ask(QUESTION | {"model": CANARY})
    stage.seen.append((await stage.ask(QUESTION, key=CANARY)).content)
    await stage.ask({"model": "smart", "input": CANARY}, path="embeddings")
    await stage.http.get(f"{stage.url}/{CANARY}", headers=HEADERS)
    stage.first.script = stream_reply(*STREAM, asyncio.Event())
    request = QUESTION | {"stream": True}
    url = f"{stage.url}/v1/chat/completions"
    async with stage.http.stream("POST", url, json=request, headers=HEADERS | AUTH) as begun:
        await anext(begun.aiter_bytes())
    await stage.first.requests[-1].gone.wait()


@asynccontextmanager
async def two_upstreams() -> AsyncIterator[tuple[UpstreamServer, dict[str, Upstream]]]:
    async with upstream(json_reply({})) as first, upstream(json_reply(completion(CANARY))) as second:
        hasty = Timeouts(first_token_s=2, idle_s=2)
        yield first, {"one": first.settings(timeouts=hasty), "two": second.settings(timeouts=hasty)}


MODELS = {
    "smart": Model(targets=[Target(upstream="one")]),
    "spare": Model(targets=[Target(upstream="one"), Target(upstream="two", tier=1)]),
}


@pytest.mark.parametrize("log", ["json", "text"])
async def test_no_log_line_no_metric_no_span_and_no_error_has_a_canary(
    tmp_path: Path, log: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "httpx2")  # the test's own client, which names the addresses that it asks
    exporter = InMemorySpanExporter()
    fd = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY)
    lines = Log(fd, log)
    handler = LogHandler(lines)
    logging.getLogger().addHandler(handler)
    try:
        async with two_upstreams() as (first, upstreams):
            settings = Settings(auth=Auth(keys=[KEY]), upstreams=upstreams, models=MODELS, telemetry=Asked(log=log))
            telemetry = Telemetry(settings, log=lines, tracing=Tracing(SimpleSpanProcessor(exporter)))
            async with running(settings, telemetry=telemetry) as house:
                stage = Stage(house.url, house.http, first, [])
                await every_way(stage)
                metrics = (await house.http.get(f"{house.url}/metrics")).text
    finally:
        logging.getLogger().removeHandler(handler)
        lines.close()
        os.close(fd)

    written = (tmp_path / "log").read_text()
    spans = "".join(span.to_json() for span in exporter.get_finished_spans())
    for sink in (written, metrics, spans, *(body.decode() for body in stage.seen)):
        assert [sink[:2000] for secret in SECRETS if secret in sink] == []
    outcomes = ("completed", "client_error", "upstream_error", "client_gone")
    for sink in (written, metrics, spans):
        assert [outcome for outcome in outcomes if outcome not in sink] == []
    assert CANARY in first.requests[-1].body.decode()
    assert CANARY not in first.requests[-1].headers["traceparent"]


@contextmanager
def process(document: Any, folder: Path) -> Iterator[Callable[[], str]]:
    """A gateway of its own with the configuration *document*; what it has written so far. It must end well."""
    (folder / "g.yaml").write_text(json.dumps(document))
    with (folder / "out").open("wb") as out:
        command = [sys.executable, "-m", "gateway", "serve", "--config", str(folder / "g.yaml"), "--port", "0"]
        running = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        try:
            yield (folder / "out").read_text
            running.send_signal(signal.SIGTERM)
            assert running.wait(20) == 0
        finally:
            running.kill()
            running.wait()


@pytest.mark.parametrize("log", ["json", "text"])
async def test_a_process_writes_no_canary(tmp_path: Path, log: str) -> None:
    async with two_upstreams() as (first, upstreams):
        document = {
            "auth": {"keys": [{"name": KEY.name, "sha256": KEY.sha256}]},
            "telemetry": {"log": log},
            "upstreams": {
                name: {"adapter": "openai", "base_url": server.base_url, "timeouts": {"first_token_s": 2, "idle_s": 2}}
                for name, server in upstreams.items()
            },
            "models": {
                name: {"targets": [{"upstream": one.upstream} for one in model.targets]}
                for name, model in MODELS.items()
            },
        }
        with process(document, tmp_path) as written:
            async with httpx2.AsyncClient(timeout=20) as http:
                await every_way(Stage(f"http://127.0.0.1:{await port_in(written)}", http, first, []))
    text = written()

    assert [secret for secret in SECRETS if secret in text] == []
    assert "client_gone" in text
    if log == "json":
        assert {json.loads(line)["event"] for line in text.splitlines()} == {"log", "request"}


async def port_in(written: Callable[[], str]) -> str:
    async with asyncio.timeout(30):
        while True:
            if found := re.search(r"(?:Base URL +http://127.0.0.1:|ready on port )(\d+)", written()):
                return found[1]
            await asyncio.sleep(0.05)
