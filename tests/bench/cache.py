"""What does a kept answer cost, next to one that is generated? And how much room does it take?

    python -m tests.bench.cache [--seconds 3] [--rounds 3] [--connections 32]

Gateways in front of the same mock upstream, in turns: one keeps nothing, one keeps everything; the same question is
asked again and again, plain and as a stream of 34 events. CPU is user + system of the gateway's process per request,
from /proc. Latency is at one connection. The room is what the process grew by for so many different questions, beside
what the store itself counts. Nothing is asserted.
"""

import argparse
import asyncio
import hashlib
import os
import random
import sys
import tempfile
import tracemalloc
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from pathlib import Path

from gateway.auth import ANONYMOUS
from gateway.cache import Cache
from gateway.cache.question import Fingerprints
from gateway.call import Call
from gateway.schema.endpoint import CHAT
from gateway.schema.mould import Mould
from gateway.schema.payload import Part, Parts
from gateway.schema.reading import read_request
from gateway.settings import Caching, Model, Settings, Target, Upstream
from gateway.stores.answers import MemoryAnswers
from tests.bench import load
from tests.bench.mock_upstream import json_bytes
from tests.bench.run import KEY, Server, cell, free_port, pinned

CONF = """
server: {{host: 127.0.0.1, port: {port}}}
telemetry: {{log: off}}
auth: {{keys: [{{name: bench, sha256: {key_sha256}}}]}}
upstreams: {{mock: {{adapter: openai, base_url: "http://127.0.0.1:{upstream}/v1"}}}}
models: {{mock: {{targets: [{{upstream: mock, model: mock-upstream-model}}], cache: {{mode: {mode}}}}}}}
{redis}
"""
QUESTIONS = 2000


def server(name: str, mode: str, upstream: int, redis: int | None, folder: Path) -> Server:
    port = free_port()
    conf = folder / f"{name}.yaml"
    keys = {"key_sha256": hashlib.sha256(KEY.encode()).hexdigest(), "port": port, "upstream": upstream}
    shared = "" if redis is None else f'cache: {{url: "redis://127.0.0.1:{redis}"}}'
    conf.write_text(CONF.format(mode=mode, redis=shared, **keys))
    command = [sys.executable, "-m", "gateway", "serve", "--config", str(conf), "--port", str(port)]
    return Server(name, command, port, folder / f"{name}.log")


def measured(under_test: Server, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    figures = {}
    for kind in ("plain", "stream"):
        before_s = under_test.cpu_s()
        stream = kind == "stream"
        if load.has_wrk():
            seen = load.wrk(under_test.port, KEY, stream, options.connections, options.seconds, folder)
        else:
            seen = load.python_load(under_test.port, KEY, stream, options.connections, options.seconds)
        figures[f"{kind}: CPU µs"] = (under_test.cpu_s() - before_s) * 1e6 / max(1, seen.requests)
        alone = load.python_load(under_test.port, KEY, stream, 1, options.seconds / 2)
        figures[f"{kind}: p50 ms"], figures[f"{kind}: p99 ms"] = alone.p50_ms, alone.p99_ms
        figures["errors"] = figures.get("errors", 0.0) + seen.errors + alone.errors
    return figures


async def room(tokens: int) -> tuple[float, float]:
    """Bytes for each entry of a stream of so many tokens: by the store's own count, and as the process grows."""
    settings = Settings(
        upstreams={"mock": Upstream(adapter="openai", base_url="http://x")},
        models={"mock": Model(targets=[Target(upstream="mock")], cache=Caching(mode="all", coalesce=False))},
    )
    store = MemoryAnswers(2**30)
    cache = Cache(settings, store, Fingerprints(settings))

    async def produce(_: Call) -> AsyncGenerator[Parts]:
        mould: Mould | None = None
        for wire in chunks:
            text = None if mould is None else mould.text_of(wire)
            if text is None:
                mould, text = Mould.of(wire), b""
            yield [Part(CHAT.chunks, wire, None, mould, text)]

    chunks = [json_bytes(chunk) for chunk in a_stream(tokens)]
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for seed in range(QUESTIONS):
        body = {"model": "mock", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "seed": seed}
        payload, unknown = read_request(CHAT, json_bytes(body))
        async with aclosing(cache.through(Call(CHAT, ANONYMOUS, payload, unknown), produce)) as parts:
            async for _ in parts:
                pass
        await cache.settled()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(store) == QUESTIONS
    return store.size_bytes / QUESTIONS, (after - before) / QUESTIONS


def a_stream(tokens: int) -> list[dict[str, object]]:
    """Words as they come, not all the same, so that they compress like text."""
    chance = random.Random(tokens)
    words = [" " + "".join(chance.choices("etaoinshrdlu", k=chance.randint(1, 7))) for _ in range(2000)]
    said: list[dict[str, object]] = [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
    said += [{"delta": {"content": chance.choice(words)}, "finish_reason": None} for _ in range(tokens)]
    said.append({"delta": {}, "finish_reason": "stop"})
    envelope = {"id": "chatcmpl-x", "object": "chat.completion.chunk", "created": 1, "model": "mock"}
    return [{**envelope, "choices": [{"index": 0, "logprobs": None, **choice}]} for choice in said]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--redis", type=int, help="the port of a Redis, for a third gateway that keeps answers there")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    server_core, load_core = (cores[0], cores[1]) if len(cores) > 1 else (None, None)
    rounds: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary, pinned(load_core), ExitStack() as stack:
        folder, port = Path(temporary), free_port()
        mock = Server(
            "mock", [sys.executable, "-m", "tests.bench.mock_upstream", "--port", str(port)], port, folder / "m"
        )
        stack.callback(mock.stop)
        mock.wait_until_ready()
        kinds = {"generated": ("off", None), "kept": ("all", None)}
        if options.redis:
            kinds["kept in Redis"] = ("all", options.redis)
        servers = []
        for name, (mode, redis) in kinds.items():
            with pinned(server_core):
                under_test = server(name, mode, port, redis, folder)
            stack.callback(under_test.stop)
            under_test.wait_until_ready()
            load.python_load(under_test.port, KEY, True, options.connections, 1.0)
            servers.append(under_test)
        for _ in range(options.rounds):
            for under_test in servers:
                rounds.setdefault(under_test.name, []).append(measured(under_test, options, folder))
    titles = list(rounds["generated"][0])
    print(f"| answers | {' | '.join(titles)} |\n| --- |" + " ---: |" * len(titles))
    for name, figures in rounds.items():
        print(f"| {name} | " + " | ".join(cell("{:.2f}", [each[title] for each in figures]) for title in titles) + " |")
    for tokens in (32, 500):
        counted, grown = asyncio.run(room(tokens))
        print(
            f"a stream of {tokens} tokens: {counted:.0f} bytes an entry by the store's count, {grown:.0f} as measured"
        )


if __name__ == "__main__":
    main()
