"""A closed loop of clients: each sends its next request when the answer to the last one is whole.

`wrk` does the same for less CPU and is used for throughput where it is installed; this one needs nothing but Python,
takes the time to the first byte of the body, and lets every answer end before it counts.
"""

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import httptools
import msgspec
import uvloop

PLAIN_HAS = b'"total_tokens"'
STREAM_ENDS = b"data: [DONE]\n\n"
# wrk counts what it sent when the time is up, so at most one answer per connection is missing from `requests`.
WRK_SCRIPT = """
wrk.method = "POST"
local threads = {}
function setup(thread) table.insert(threads, thread) end
function init(arguments)
  wrk.headers["content-type"], wrk.headers["authorization"] = "application/json", "Bearer " .. arguments[1]
  wrk.body, expected, bad = arguments[2], arguments[3], 0
  streams = arguments[4] == "stream"
end
function response(status, headers, body)
  local from = streams and -#expected or 1
  if status ~= 200 or not body:find(expected, from, true) then bad = bad + 1 end
end
function done(summary, latency)
  local e, bad = summary.errors, 0
  for _, thread in ipairs(threads) do bad = bad + thread:get("bad") end
  io.write(string.format('\\n{"requests":%d,"errors":%d,"seconds":%f}\\n',
    summary.requests, bad + e.connect + e.read + e.write + e.timeout, summary.duration / 1e6))
end
"""


class Load(msgspec.Struct):
    """What one run saw. The times are empty where `wrk` ran."""

    requests: int
    errors: int
    seconds: float
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    first_byte_p50_ms: float = 0.0


@dataclass(slots=True)
class Tally:
    until_s: float
    errors: int = 0
    times_ms: list[float] = field(default_factory=list)
    first_byte_ms: list[float] = field(default_factory=list)


class Client(asyncio.Protocol):
    """One connection: asks until the time is up, or the server hangs up."""

    def __init__(self, request: bytes, stream: bool, tally: Tally) -> None:
        self._request, self._stream, self._tally = request, stream, tally
        self._parser = httptools.HttpResponseParser(self)
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is none by inheritance
        self._ask()

    def _ask(self) -> None:
        self._body = bytearray()
        self._asked_s = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.abort()

    def on_body(self, body: bytes) -> None:
        if not self._body:
            self._tally.first_byte_ms.append((time.perf_counter() - self._asked_s) * 1000)
        self._body += body

    def on_message_complete(self) -> None:
        now_s = time.perf_counter()
        self._tally.times_ms.append((now_s - self._asked_s) * 1000)
        whole = self._body.endswith(STREAM_ENDS) if self._stream else PLAIN_HAS in self._body
        if self._parser.get_status_code() != 200 or not whole:
            self._tally.errors += 1
        if now_s < self._tally.until_s:
            self._ask()
        else:
            self._asked_s = 0.0
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._asked_s:
            self._tally.errors += 1
        self.closed.set_result(None)


async def closed_loop(port: int, request: bytes, stream: bool, connections: int, seconds: float) -> Load:
    started_s = time.perf_counter()
    tally = Tally(started_s + seconds)
    loop = asyncio.get_running_loop()

    async def one_client() -> None:
        while time.perf_counter() < tally.until_s:
            _, client = await loop.create_connection(lambda: Client(request, stream, tally), "127.0.0.1", port)
            await client.closed

    await asyncio.gather(*(one_client() for _ in range(connections)))
    return Load(
        requests=len(tally.times_ms),
        errors=tally.errors,
        seconds=time.perf_counter() - started_s,
        p50_ms=percentile(tally.times_ms, 50),
        p99_ms=percentile(tally.times_ms, 99),
        first_byte_p50_ms=percentile(tally.first_byte_ms, 50),
    )


def percentile(times_ms: list[float], percent: int) -> float:
    ordered = sorted(times_ms)
    return ordered[len(ordered) * percent // 100] if ordered else 0.0


def chat_body(stream: bool) -> bytes:
    body = {"model": "mock", "messages": [{"role": "user", "content": "Say what a request costs."}], "stream": stream}
    return json.dumps(body).encode()


def chat_request(port: int, key: str, stream: bool) -> bytes:
    body = chat_body(stream)
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nauthorization: Bearer {key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode() + body


def has_wrk() -> bool:
    return shutil.which("wrk") is not None


def wrk(port: int, key: str, stream: bool, connections: int, seconds: float, folder: Path) -> Load:
    script = folder / "wrk.lua"
    script.write_text(WRK_SCRIPT)
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "20s", "-s", str(script)]
    command += [url, "--", key, chat_body(stream).decode(), (STREAM_ENDS if stream else PLAIN_HAS).decode()]
    command += ["stream" if stream else "plain"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 60).stdout
    return msgspec.json.decode(output.strip().splitlines()[-1], type=Load)


def python_load(port: int, key: str, stream: bool, connections: int, seconds: float) -> Load:
    """The same from a process of its own, on the cores that the caller is allowed."""
    command = [sys.executable, "-m", "tests.bench.load", "--port", str(port), "--key", key]
    command += ["--connections", str(connections), "--seconds", str(seconds)] + ["--stream"] * stream
    output = subprocess.run(command, capture_output=True, check=True, timeout=seconds + 60).stdout
    return msgspec.json.decode(output, type=Load)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--port", type=int, required=True)
    options.add_argument("--key", default="none")
    options.add_argument("--connections", type=int, default=32)
    options.add_argument("--seconds", type=float, default=5.0)
    options.add_argument("--stream", action="store_true")
    chosen = options.parse_args()
    request = chat_request(chosen.port, chosen.key, chosen.stream)
    result = uvloop.run(closed_loop(chosen.port, request, chosen.stream, chosen.connections, chosen.seconds))
    print(msgspec.json.encode(result).decode())


if __name__ == "__main__":
    main()
