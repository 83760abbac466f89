"""What can be watched: metrics, log lines and traces, as they are seen from outside."""

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from prometheus_client.parser import text_string_to_metric_families

from gateway.adapter import Adapter, Dispatch
from gateway.app import create_app
from gateway.errors import (
    GatewayError,
    InvalidRequest,
    Overloaded,
    UpstreamFailed,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from gateway.schema.chat import ChatChunk, ChunkChoice, Delta
from gateway.schema.common import PromptTokensDetails, Usage
from gateway.schema.endpoint import CHAT
from gateway.schema.payload import Part, Parts, Payload
from gateway.settings import Settings, Upstream, parse
from gateway.settings import Telemetry as Asked
from gateway.telemetry import Telemetry
from gateway.telemetry.lag import PERIOD_S, supervised, watch_lag
from gateway.telemetry.log import Log, LogHandler
from gateway.telemetry.traces import Tracing
from tests.house import (
    HELLO,
    TOKEN,
    ScriptedAdapter,
    completion,
    json_reply,
    running,
    settings_for,
    upstream,
)

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parent.parent
LABELS = {"model": "smart", "target": "upstream-1/model-1"}
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
BODY = json.dumps(completion()).encode()
WHOLE: Parts = [
    Part(
        CHAT.answers.decode(BODY),
        BODY,
        Usage(prompt_tokens=3, completion_tokens=2, prompt_tokens_details=PromptTokensDetails(cached_tokens=1)),
    )
]
HALF = BODY.replace(b'"finish_reason": "stop"', b'"finish_reason": null')


def piece(text: str, finish: str | None = None) -> Parts:
    return [Part.encode(ChatChunk(choices=[ChunkChoice(delta=Delta(content=text), finish_reason=finish)]))]


class Clock:
    """Stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def move(self, seconds: float) -> None:
        self.now += seconds


class Slow(ScriptedAdapter):
    """Takes *wait_s* before each part, and half a second that are the gateway's own before the first dispatch."""

    def __init__(self, clock: Clock, *script: Parts, wait_s: float) -> None:
        super().__init__(*script)
        self._clock = clock
        self._wait_s = wait_s
        self._looked_for = False

    def __getattribute__(self, name: str) -> Any:
        if name == "chat" and not self._looked_for:
            self._looked_for = True
            self._clock.move(0.5)
        return super().__getattribute__(name)

    async def chat(self, request: Payload[Any], dispatch: Dispatch) -> AsyncGenerator[Parts]:
        async for parts in super().chat(request, dispatch):
            self._clock.move(self._wait_s)
            yield parts


ASKED = Asked()


def settings(upstreams: int = 1, asked: Asked = ASKED) -> Settings:
    return settings_for(*(Upstream(adapter="scripted") for _ in range(upstreams)), telemetry=asked)


class Watched:
    """A gateway without a socket, and what it tells."""

    def __init__(self, *adapters: Adapter, telemetry: Telemetry | None = None, asked: Asked = ASKED) -> None:
        self.settings = settings(len(adapters), asked)
        by_name = dict(zip(self.settings.upstreams, adapters, strict=True))
        self.app = create_app(self.settings, adapters=by_name, telemetry=telemetry)

    async def ask(self, on_send: Callable[[], None] = lambda: None, key: str = TOKEN, **changes: Any) -> int:
        """The status; *on_send* is called when a part is sent."""
        headers = [(b"authorization", b"Bearer " + key.encode()), (b"content-type", b"application/json")]
        body = json.dumps(HELLO | changes).encode()
        status, _ = await call(self.app, "POST", "/v1/chat/completions", headers, body, on_send=on_send)
        return status

    async def metrics(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        status, text = await call(self.app, "GET", "/metrics", [(b"host", b"127.0.0.1")])
        assert status == 200
        return samples(text)

    async def value(self, name: str, **labels: str) -> float | None:
        return (await self.metrics()).get((name, frozenset(labels.items())))

    async def requests(self) -> dict[tuple[str, ...], float]:
        """Their number by model, target, status and outcome."""
        return {
            tuple(dict(labels)[name] for name in ("model", "target", "status", "outcome")): number
            for (name, labels), number in (await self.metrics()).items()
            if name == "suiron_requests_total"
        }


async def call(
    app: Any,
    method: str,
    path: str,
    headers: list[tuple[bytes, bytes]],
    body: bytes = b"",
    client: str = "127.0.0.1",
    on_send: Callable[[], None] = lambda: None,
) -> tuple[int, bytes]:
    sent: list[Any] = []
    received = False

    async def receive() -> Any:
        nonlocal received
        if received:
            await asyncio.Event().wait()  # the client stays
        received = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        on_send()
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "server": ("127.0.0.1", 80),
        "client": (client, 1),
        "scheme": "http",
        "root_path": "",
        "headers": headers,
        "state": {},
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
    }
    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


def samples(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


async def until(told: Callable[[], Awaitable[float | None]]) -> None:
    """Waits for a number other than 0."""
    async with asyncio.timeout(20 * PERIOD_S):
        while True:
            if await told():
                return
            await asyncio.sleep(0.02)


@contextmanager
def logged(path: Path, told: Settings, **options: Any) -> Iterator[tuple[Telemetry, Callable[[], list[str]]]]:
    """Telemetry that writes to *path*, and what it wrote in the end."""
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)
    log = Log(fd, "json" if told.telemetry.log == "json" else "text")

    def lines() -> list[str]:
        log.close()
        return path.read_text().splitlines()

    try:
        yield Telemetry(told, log=log, **options), lines
    finally:
        log.close()
        os.close(fd)


# Metrics.


async def test_a_request_is_counted_with_its_tokens() -> None:
    watched = Watched(ScriptedAdapter(WHOLE))

    assert await watched.ask() == 200

    assert await watched.requests() == {("smart", "upstream-1/model-1", "200", "completed"): 1}
    assert await watched.value("suiron_tokens_total", model="smart", kind="prompt") == 3
    assert await watched.value("suiron_tokens_total", model="smart", kind="completion") == 2
    assert await watched.value("suiron_tokens_total", model="smart", kind="cached") == 1
    assert await watched.value("suiron_requests_in_flight", model="smart") == 0
    assert {labels for name, labels in await watched.metrics() if name == "suiron_build_info"}


async def test_what_a_client_writes_never_becomes_a_label() -> None:
    watched = Watched(ScriptedAdapter(WHOLE))

    assert await watched.ask(model="no such model") == 404
    assert await watched.ask(key="no such key") == 401
    assert await watched.ask(messages=7) == 400

    assert await watched.requests() == {
        ("unknown", "none", "404", "client_error"): 1,
        ("unknown", "none", "401", "client_error"): 1,
        ("unknown", "none", "400", "client_error"): 1,
    }


async def test_the_time_between_dispatch_and_answer_is_the_upstreams_and_the_rest_overhead() -> None:
    clock = Clock()
    watched = Watched(Slow(clock, WHOLE, wait_s=2.0), telemetry=Telemetry(settings(), clock=clock))

    await watched.ask()

    assert await watched.value("suiron_request_duration_seconds_sum", **LABELS) == 2.5
    assert await watched.value("suiron_gateway_overhead_seconds_sum", model="smart") == 0.5
    assert await watched.value("suiron_time_to_first_token_seconds_count", **LABELS) is None


async def test_a_slow_client_is_neither_overhead_nor_hidden_from_the_whole() -> None:
    clock = Clock()
    adapter = Slow(clock, piece("a"), piece("b"), piece("c", "stop"), wait_s=2.0)
    watched = Watched(adapter, telemetry=Telemetry(settings(), clock=clock))

    await watched.ask(stream=True, on_send=lambda: clock.move(10))

    assert await watched.value("suiron_gateway_overhead_seconds_sum", model="smart") == 0.5
    assert await watched.value("suiron_time_to_first_token_seconds_sum", **LABELS) == 2.5
    assert await watched.value("suiron_time_between_tokens_seconds_count", **LABELS) == 2
    assert await watched.value("suiron_time_between_tokens_seconds_bucket", **LABELS, le="10.0") == 0
    assert await watched.value("suiron_request_duration_seconds_sum", **LABELS) == 56.5


async def test_the_times_between_tokens_are_counted_by_size() -> None:
    clock = Clock()
    adapter = Slow(clock, piece("a"), piece("b"), piece("c", "stop"), wait_s=0.04)
    watched = Watched(adapter, telemetry=Telemetry(settings(), clock=clock))

    await watched.ask(stream=True)
    await watched.ask(stream=True)

    assert await watched.value("suiron_time_between_tokens_seconds_bucket", **LABELS, le="0.025") == 0
    assert await watched.value("suiron_time_between_tokens_seconds_bucket", **LABELS, le="0.05") == 4
    assert await watched.value("suiron_time_between_tokens_seconds_sum", **LABELS) == pytest.approx(0.16)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UpstreamUnreachable(""), "upstream_connect_error"),
        (UpstreamFailed(""), "upstream_error"),
        (Overloaded(""), "overloaded"),
        (UpstreamTimeout(""), "upstream_timeout"),
    ],
)
async def test_upstream_errors_are_counted_by_target_and_kind(error: GatewayError, kind: str) -> None:
    watched = Watched(ScriptedAdapter(error), ScriptedAdapter(WHOLE))

    assert await watched.ask() == 200

    assert await watched.value("suiron_upstream_errors_total", target="upstream-1/model-1", kind=kind) == 1
    assert await watched.requests() == {("smart", "upstream-2/model-2", "200", "completed"): 1}


async def test_a_clients_mistake_that_an_upstream_finds_is_no_upstream_error() -> None:
    watched = Watched(ScriptedAdapter(InvalidRequest("no")))

    assert await watched.ask() == 400

    assert await watched.requests() == {("smart", "upstream-1/model-1", "400", "client_error"): 1}
    assert not any(name == "suiron_upstream_errors_total" for name, _ in await watched.metrics())


async def test_half_an_answer_is_an_upstream_error_though_the_upstream_did_not_say_so() -> None:
    watched = Watched(ScriptedAdapter([Part(CHAT.answers.decode(HALF), HALF)]))

    assert await watched.ask() == 502

    labels = {"target": "upstream-1/model-1", "kind": "upstream_error"}
    assert await watched.value("suiron_upstream_errors_total", **labels) == 1


async def test_a_stream_that_breaks_is_an_upstream_error_with_status_200() -> None:
    watched = Watched(ScriptedAdapter(piece("a"), UpstreamFailed("")))

    assert await watched.ask(stream=True) == 200

    assert await watched.requests() == {("smart", "upstream-1/model-1", "200", "upstream_error"): 1}


async def test_a_fault_of_ours_is_a_failure() -> None:
    watched = Watched(ScriptedAdapter(KeyError("x")))

    assert await watched.ask() == 500

    assert await watched.requests() == {("smart", "upstream-1/model-1", "500", "failed"): 1}


async def test_a_client_that_leaves_is_told_apart_and_no_longer_in_flight() -> None:
    adapter = ScriptedAdapter(piece("a"), asyncio.Event())
    async with running(settings(), {"upstream-1": adapter}) as house:

        async def seen(name: str, **labels: str) -> float | None:
            text = (await house.http.get(f"{house.url}/metrics")).content
            return samples(text).get((name, frozenset(labels.items())))

        stream = await house.openai.chat.completions.create(**HELLO, stream=True)
        assert await seen("suiron_requests_in_flight", model="smart") == 1
        await stream.close()
        await until(lambda: seen("suiron_requests_total", **LABELS, status="200", outcome="client_gone"))
        assert await seen("suiron_requests_in_flight", model="smart") == 0


async def test_a_worker_tells_of_all_where_they_share_a_directory(tmp_path: Path) -> None:
    code = """
import asyncio, sys
from tests.test_telemetry import WHOLE, ScriptedAdapter, Watched
async def main():
    watched = Watched(ScriptedAdapter(WHOLE))
    for _ in range(int(sys.argv[1])):
        await watched.ask()
    print(int(await watched.value("suiron_requests_total", model="smart", target="upstream-1/model-1",
                                  status="200", outcome="completed")),
          int(await watched.value("suiron_request_duration_seconds_count", model="smart", target="upstream-1/model-1")))
asyncio.run(main())
"""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}

    def worker(requests: int) -> str:
        command = [sys.executable, "-c", code, str(requests)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert worker(2) == "2 2"
    assert worker(3) == "5 5"


def test_a_shared_directory_that_is_not_there_is_said_at_the_start(tmp_path: Path) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "missing")}
    code = "from gateway.telemetry import Telemetry; from gateway.settings import Settings; Telemetry(Settings())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert "is no directory: make it" in done.stderr


# Who may read them.

HOST = (b"host", b"127.0.0.1:8000")
KEY = (b"authorization", b"Bearer " + TOKEN.encode())


@pytest.mark.parametrize(
    ("client", "headers", "status"),
    [
        ("127.0.0.1", [HOST], 200),
        ("::1", [(b"host", b"localhost")], 200),
        ("127.0.0.1", [(b"host", b"gateway.example.com")], 401),
        ("127.0.0.1", [HOST, (b"x-forwarded-for", b"10.0.0.7")], 401),
        ("10.0.0.7", [HOST], 401),
        ("10.0.0.7", [HOST, (b"authorization", b"Bearer wrong")], 401),
        ("10.0.0.7", [HOST, KEY], 200),
    ],
)
async def test_metrics_are_for_this_machine_and_for_holders_of_a_key(
    client: str, headers: list[tuple[bytes, bytes]], status: int
) -> None:
    watched = Watched(ScriptedAdapter())

    assert (await call(watched.app, "GET", "/metrics", headers, client=client))[0] == status


@pytest.mark.parametrize(("metrics", "status"), [("open", 200), ("off", 404)])
async def test_metrics_can_be_opened_and_turned_off(metrics: Any, status: int) -> None:
    watched = Watched(ScriptedAdapter(), asked=Asked(metrics=metrics))

    assert (await call(watched.app, "GET", "/metrics", [HOST], client="10.0.0.7"))[0] == status


def test_off_needs_no_quotes_in_the_configuration() -> None:
    assert parse("telemetry: {metrics: off, log: off, traces: true}", "g.yaml").telemetry == Asked(
        metrics="off", log="off", traces=True
    )


# The event loop.


async def test_the_lag_is_by_how_much_the_event_loop_is_late() -> None:
    clock, seen = Clock(), list[float]()
    delays = iter([0.0, 0.75])

    async def sleep(seconds: float) -> None:
        clock.move(seconds + next(delays))

    with pytest.raises(RuntimeError):  # no more delays: StopIteration, as a coroutine raises it
        await watch_lag(seen.append, clock, sleep)

    assert seen == [0.0, 0.75]


async def test_work_that_fails_is_begun_anew() -> None:
    begun = 0
    pauses = []

    async def work() -> None:
        nonlocal begun
        begun += 1
        raise ValueError if begun == 1 else asyncio.CancelledError

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    with pytest.raises(asyncio.CancelledError):
        await supervised("work", work, sleep)

    assert (begun, len(pauses)) == (2, 1)


async def test_the_lag_is_watched_while_the_app_runs() -> None:
    async with running(settings(), {"upstream-1": ScriptedAdapter()}) as house:

        async def counted() -> float | None:
            text = (await house.http.get(f"{house.url}/metrics")).content
            return samples(text)["suiron_event_loop_lag_seconds_count", frozenset()]

        await until(counted)


# The log.


async def test_a_request_is_one_line_of_json(tmp_path: Path) -> None:
    clock = Clock()
    adapters = (ScriptedAdapter(Overloaded("")), Slow(clock, WHOLE, wait_s=2.0))
    with logged(tmp_path / "log", settings(2, Asked(log="json")), clock=clock) as (telemetry, lines):
        watched = Watched(*adapters, telemetry=telemetry)
        await watched.ask()
        await watched.ask(key="wrong")

        first, second = map(json.loads, lines())

    assert first.pop("ts").startswith("20")
    assert first.pop("id").startswith("req_")
    assert first == {
        "event": "request",
        "level": "info",
        "key": "alice",
        "endpoint": "chat/completions",
        "model": "smart",
        "target": "upstream-2/model-2",
        "attempts": 2,
        "status": 200,
        "outcome": "completed",
        "error": None,
        "stream": False,
        "cache": None,
        "ttft_ms": 2500.0,
        "total_ms": 2500.0,
        "upstream_ms": 2000.0,
        "overhead_ms": 500.0,
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "cached_tokens": 1,
    }
    assert (second["status"], second["error"], second["key"]) == (401, "invalid_api_key", None)


async def test_a_request_is_one_line_of_text(tmp_path: Path) -> None:
    clock = Clock()
    adapter = ScriptedAdapter(WHOLE)
    with logged(tmp_path / "log", settings(), clock=clock) as (telemetry, lines):
        await Watched(adapter, telemetry=telemetry).ask()

        (line,) = lines()

    assert " 200 completed chat/completions smart upstream-1/model-1 0.0 ms 3+2 tokens req_" in line


async def test_a_code_that_an_upstream_made_up_is_not_repeated(tmp_path: Path) -> None:
    adapter = ScriptedAdapter(InvalidRequest("", code="Secret 7"))
    with logged(tmp_path / "log", settings()) as (telemetry, lines):
        await Watched(adapter, telemetry=telemetry).ask()

        (line,) = lines()

    assert " 400 client_error invalid_request_error " in line


def test_what_goes_out_elsewhere_can_wait_for_the_log(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        log = Log(file.fileno(), "text")
        log.put(logging.makeLogRecord({"msg": "loading: 100 %"}))
        log.flush()
        assert (tmp_path / "log").read_text() == "loading: 100 %\n"
        log.close()


async def test_requests_go_on_where_nobody_reads_the_log_and_what_is_lost_is_counted() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(writing, True)
    adapter = ScriptedAdapter(WHOLE)
    log = Log(writing, "text", capacity=10)
    watched = Watched(adapter, telemetry=Telemetry(settings(), log=log))

    for _ in range(100):
        assert await watched.ask() == 200

    lost = await watched.value("suiron_log_lines_dropped_total")
    assert lost is not None
    assert lost >= 80  # ten in the queue, and as many in the writer's hands
    os.close(reading)
    log.close()
    os.close(writing)


@pytest.mark.parametrize("format", ["json", "text"])
def test_what_loggers_say_is_one_line_and_exceptions_do_not_speak(tmp_path: Path, format: Any) -> None:
    fd = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY)
    log = Log(fd, format)
    logger = logging.Logger("test")
    logger.addHandler(LogHandler(log))
    try:
        try:
            raise ValueError("secret")
        except ValueError as exc:
            raise KeyError("secret") from exc
    except KeyError as exc:
        logger.error("it\x1b[31m broke\u2028here\nsecret", exc_info=exc)
    logger.info("%d", "does not fit: secret")
    log.close()
    os.close(fd)

    text = (tmp_path / "log").read_text()
    assert "it�[31m broke�here" in text
    assert "KeyError from ValueError" in text
    assert "test_what_loggers_say" in text
    assert "secret" not in text


# Traces.


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


def traced(exporter: InMemorySpanExporter, told: Settings) -> Telemetry:
    return Telemetry(told, tracing=Tracing(SimpleSpanProcessor(exporter)))


async def test_a_trace_has_a_span_for_the_request_and_one_for_each_attempt(exporter: InMemorySpanExporter) -> None:
    adapters = ScriptedAdapter(UpstreamTimeout("")), ScriptedAdapter(WHOLE)
    watched = Watched(*adapters, telemetry=traced(exporter, settings(2)))

    await watched.ask()

    failed, answered, request = exporter.get_finished_spans()
    assert (request.name, request.kind) == ("chat smart", SpanKind.SERVER)
    assert request.attributes is not None
    measured = ("gen_ai.response.id", "suiron.overhead_ms", "suiron.time_to_first_token_ms")
    assert {name: value for name, value in request.attributes.items() if name not in measured} == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "suiron",
        "gen_ai.request.model": "smart",
        "gen_ai.response.model": "smart",
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.usage.cache_read.input_tokens": 1,
        "http.response.status_code": 200,
        "suiron.outcome": "completed",
        "suiron.attempts": 2,
    }
    assert set(measured) <= set(request.attributes)
    for attempt, number, error in ((failed, 1, "upstream_timeout"), (answered, 2, None)):
        assert (attempt.name, attempt.kind) == (f"chat model-{number}", SpanKind.CLIENT)
        assert attempt.parent is not None
        assert request.context is not None
        assert attempt.parent.span_id == request.context.span_id
        assert attempt.attributes is not None
        assert attempt.attributes["gen_ai.provider.name"] == f"upstream-{number}"
        assert attempt.attributes.get("error.type") == error
        assert request.start_time is not None
        assert attempt.start_time is not None
        assert attempt.end_time is not None
        assert request.end_time is not None
        assert request.start_time <= attempt.start_time <= attempt.end_time <= request.end_time


@pytest.mark.parametrize(
    ("given", "followed"),
    [
        ([TRACEPARENT], True),
        ([TRACEPARENT, TRACEPARENT], False),
        ([TRACEPARENT.upper()], False),
        ([TRACEPARENT + "-more"], False),
        (["00-" + "0" * 32 + "-b7ad6b7169203331-01"], False),
        (["ff" + TRACEPARENT[2:]], False),
        (["x" * 10_000], False),
    ],
)
async def test_a_clients_trace_is_continued_if_it_is_well_formed(
    exporter: InMemorySpanExporter, given: list[str], followed: bool
) -> None:
    adapter = ScriptedAdapter(WHOLE)
    watched = Watched(adapter, telemetry=traced(exporter, settings()))
    headers = [KEY, (b"content-type", b"application/json"), *((b"traceparent", one.encode()) for one in given)]

    await call(watched.app, "POST", "/v1/chat/completions", headers, json.dumps(HELLO).encode())

    request = exporter.get_finished_spans()[-1]
    assert (request.parent is not None) == followed
    assert request.context is not None
    assert (f"{request.context.trace_id:032x}" == TRACEPARENT[3:35]) == followed


@pytest.mark.parametrize("on", [False, True])
async def test_an_upstream_gets_a_traceparent_only_where_there_are_traces(
    exporter: InMemorySpanExporter, on: bool
) -> None:
    async with upstream(json_reply(completion())) as server:
        with_server = settings_for(server.settings())
        telemetry = traced(exporter, with_server) if on else Telemetry(with_server)
        async with running(with_server, telemetry=telemetry) as house:
            await house.post(traceparent=TRACEPARENT)

    sent = server.requests[-1].headers.get("traceparent")
    if on:
        attempt = exporter.get_finished_spans()[0]
        assert attempt.context is not None
        assert sent == f"{TRACEPARENT[:36]}{attempt.context.span_id:016x}-01"
    else:
        assert sent is None


def test_traces_without_opentelemetry_are_refused_with_what_to_install() -> None:
    code = """
import sys
sys.modules["opentelemetry"] = None
from gateway.settings import Settings, SettingsError, Telemetry as Asked
from gateway.telemetry import Telemetry
try:
    Telemetry(Settings(telemetry=Asked(traces=True)))
except SettingsError as exc:
    print(exc)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pip install 'suiron[traces]'" in done.stdout


def test_opentelemetry_is_not_loaded_where_nothing_is_traced() -> None:
    code = "import sys, gateway.app; print('opentelemetry' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
