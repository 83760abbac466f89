"""What does a request through the gateway cost, next to nginx and next to no proxy at all?

    python -m tests.bench.run [--seconds 5] [--rounds 3] [--connections 32] [--only gateway,nginx] [--one-by-one]
    python -m tests.bench.run --paced [--interval-ms 5] [--connections 64]

One run starts every server in front of the same mock upstream and measures them in turns (A B C A B C ...), so that a
noisy machine is noisy to all; the table shows the median over the rounds and (lowest-highest). The server under test
has one core, the mock and the load share another.

CPU is user + system time of the server's processes divided by requests, from /proc: the figure to trust. "Added" is
the server's latency less that of the mock in the same round, at one connection. Every answer is checked (status 200,
a stream ends in [DONE]), and those that fail are counted as errors. Nothing is asserted: the exit status is 0.

`relay` is a bare relay (tests/bench/relay.py) to tell the machine's speed by. `foundation` checks a key,
keeps metrics and writes a log line a request; `gateway` is what `suiron serve` starts, with its ledger in SQLite;
`everything` is that with limits of requests, tokens and money on the key and its team in a
Redis on the load's core, prices, and metrics that are scraped every second.

A stream is 34 events. They come all at once; with `--one-by-one` each in a write of its own as fast as the mock can,
so that the server chooses what leaves together; with `--paced` each alone. Needs Linux; `wrk`, `nginx` and
`redis-server` are used where they are installed.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from tests.bench import load
from tests.bench.mock_upstream import Dialogue

ROOT = Path(__file__).parents[2]
KEY = "sk-bench"
SERVERS = ("direct", "nginx", "relay", "foundation", "gateway", "everything")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
NGINX_CONF = """
worker_processes 1;
error_log stderr;
pid {folder}/nginx.pid;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  keepalive_requests 100000000;
  upstream mock {{ server 127.0.0.1:{upstream}; keepalive 256; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://mock; proxy_buffering off; proxy_http_version 1.1; proxy_set_header Connection "";
    }}
  }}
}}
"""
GATEWAY_CONF = """
server: {{host: 127.0.0.1, port: {port}}}
telemetry: {{log: json}}
auth: {{keys: [{{name: bench, sha256: {key_sha256}}}]}}
upstreams: {{mock: {{adapter: openai, base_url: "http://127.0.0.1:{upstream}/v1"}}}}
models: {{mock: {{targets: [{{upstream: mock, model: mock-upstream-model}}]}}}}
"""
LEDGER_CONF = """
database: {{url: "sqlite:///{folder}/{name}.db", journal: "{folder}/{name}-journal"}}
"""
EVERYTHING_CONF = """
server: {{host: 127.0.0.1, port: {port}}}
telemetry: {{log: json}}
auth:
  keys:
    - name: bench
      sha256: {key_sha256}
      team: red
      limits: {{requests_per_minute: 100000000, tokens_per_minute: 10000000000, concurrent_requests: 1000000}}
  teams: {{red: {{limits: {{usd_per_month: 9000000}}}}}}
upstreams: {{mock: {{adapter: openai, base_url: "http://127.0.0.1:{upstream}/v1"}}}}
models:
  mock:
    targets: [{{upstream: mock, model: mock-upstream-model}}]
    prices: {{input: 0.10, cached_input: 0.05, output: 0.30}}
store: {{url: "redis://127.0.0.1:{redis}/0"}}
"""
SCRAPE_S = 1.0
COLUMNS = {
    "plain: CPU µs": "{:.0f}",
    "req/s": "{:,.0f}",
    "stream: CPU µs": "{:.0f}",
    "streams/s": "{:,.0f}",
    "added p50 ms": "{:.2f}",
    "added p99 ms": "{:.2f}",
    "added to first event p50 ms": "{:.2f}",
    "resident MiB": "{:.0f}",
    "errors": "{:.0f}",
}
Figures = dict[str, float]


class Server:
    """A process that listens, and what it and its children have used so far."""

    def __init__(self, name: str, command: list[str], port: int, log: Path) -> None:
        self.name, self.port, self.log = name, port, log
        with log.open("wb") as output:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)

    def wait_until_ready(self) -> None:
        """Raises RuntimeError with the end of its log if the server ends, or gives no good answer within 30 s."""
        problem: object = "no answer"
        for _ in range(300):
            if self._process.poll() is not None:
                break
            try:
                check_answers(self.port)
            except (OSError, ValueError) as exc:
                problem = exc
                time.sleep(0.1)
            else:
                return
        raise RuntimeError(f"{self.name} is not ready ({problem}): {self.log.read_text()[-2000:]}")

    def stop(self) -> None:
        stop(self._process)

    def cpu_s(self) -> float:
        return sum(map(cpu_ticks, self._family())) / TICKS_PER_S

    def resident_mib(self) -> float:
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self._family())
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def _family(self) -> list[int]:
        family = [self._process.pid]
        for pid in family:
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                family += map(int, children.read_text().split())
        return family


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def cpu_ticks(pid: int) -> int:
    """User and system time of the process, its threads, and children it has waited for: fields 14-17 in proc(5)."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, after_name[11:15]))


def check_answers(port: int) -> None:
    """Raises OSError or ValueError if a plain answer or a stream is not, to the letter, what the mock says."""
    expected = Dialogue("mock", 32, chat=True).text
    plain = json.loads(ask(port, stream=False))["choices"][0]["message"]["content"]
    events = ask(port, stream=True).decode().split("\n\n")
    if events[-2:] != ["data: [DONE]", ""]:
        raise ValueError("a stream does not end in [DONE]")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    streamed = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    if plain != expected or streamed != expected:
        raise ValueError("the text is not the mock's")


def ask(port: int, *, stream: bool) -> bytes:
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    with urllib.request.urlopen(urllib.request.Request(url, load.chat_body(stream), headers), timeout=10) as answer:
        content: bytes = answer.read()
        return content


@contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """Processes started inside have this core only; None changes nothing."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, allowed if core is None else {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def start_redis(folder: Path) -> subprocess.Popen[bytes]:
    """On the port that `redis.port` in *folder* then tells; it keeps nothing."""
    port = free_port()
    (folder / "redis.port").write_text(str(port))
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)


@contextmanager
def scraped(server: Server) -> Iterator[None]:
    """Its metrics are read every second."""
    over = threading.Event()

    def scrape() -> None:
        while not over.wait(SCRAPE_S):
            urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10).read()

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def start(name: str, upstream: int, pace: list[str], folder: Path) -> Server:
    port = upstream if name == "direct" else free_port()
    key_sha256 = hashlib.sha256(KEY.encode()).hexdigest()
    conf = folder / f"{name}.conf"
    text = {
        "nginx": NGINX_CONF,
        "foundation": GATEWAY_CONF,
        "gateway": GATEWAY_CONF + LEDGER_CONF,
        "everything": EVERYTHING_CONF + LEDGER_CONF,
    }.get(name, "")
    redis = (folder / "redis.port").read_text() if name == "everything" else ""
    conf.write_text(
        text.format(name=name, folder=folder, upstream=upstream, port=port, key_sha256=key_sha256, redis=redis)
    )
    python = [sys.executable, "-m"]
    serve = [*python, "gateway", "serve", "--config", str(conf), "--host", "127.0.0.1", "--port", str(port)]
    command = {
        "direct": [*python, "tests.bench.mock_upstream", "--port", str(port), *pace],
        "nginx": ["nginx", "-p", str(folder), "-c", str(conf), "-g", "daemon off;"],
        "relay": [*python, "tests.bench.relay", "--port", str(port), "--upstream", str(upstream)],
        "foundation": [*python, "tests.bench.foundation", str(conf)],
        "gateway": serve,
        "everything": serve,
    }[name]
    return Server(name, command, port, folder / f"{name}.log")


def cost(server: Server, stream: bool, options: argparse.Namespace, folder: Path) -> tuple[float, load.Load]:
    """CPU µs per request under full load, and what the load saw."""
    with scraped(server) if server.name == "everything" else nullcontext():
        return _cost(server, stream, options, folder)


def _cost(server: Server, stream: bool, options: argparse.Namespace, folder: Path) -> tuple[float, load.Load]:
    before_s = server.cpu_s()
    if load.has_wrk() and not options.paced:
        seen = load.wrk(server.port, KEY, stream, options.connections, options.seconds, folder)
    else:
        seen = load.python_load(server.port, KEY, stream, options.connections, options.seconds)
    return (server.cpu_s() - before_s) * 1e6 / max(1, seen.requests), seen


def measure(server: Server, direct: dict[str, load.Load], options: argparse.Namespace, folder: Path) -> Figures:
    """One round of one server. `direct` is filled by the round of the mock itself, which comes first."""
    figures: Figures = {}
    figures["stream: CPU µs"], streams = cost(server, True, options, folder)
    figures["streams/s"] = streams.requests / streams.seconds
    runs = [streams]
    if not options.paced:
        figures["plain: CPU µs"], plain = cost(server, False, options, folder)
        figures["req/s"] = plain.requests / plain.seconds
        alone = {
            kind: load.python_load(server.port, KEY, kind == "stream", 1, options.seconds / 2)
            for kind in ("plain", "stream")
        }
        if server.name == "direct":
            direct.update(alone)
        else:
            figures["added p50 ms"] = alone["plain"].p50_ms - direct["plain"].p50_ms
            figures["added p99 ms"] = alone["plain"].p99_ms - direct["plain"].p99_ms
            first_byte_ms = alone["stream"].first_byte_p50_ms - direct["stream"].first_byte_p50_ms
            figures["added to first event p50 ms"] = first_byte_ms
        runs += [plain, *alone.values()]
    figures["errors"] = sum(run.errors for run in runs)
    figures["resident MiB"] = server.resident_mib()
    return figures


def table(rounds: dict[str, list[Figures]]) -> str:
    titles = [title for title in COLUMNS if any(title in figures for all_ in rounds.values() for figures in all_)]
    lines = [f"| server | {' | '.join(titles)} |", "| --- |" + " ---: |" * len(titles)]
    for name, measured in rounds.items():
        cells = [cell(COLUMNS[title], [figures[title] for figures in measured if title in figures]) for title in titles]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(form: str, values: list[float]) -> str:
    if not values:
        return "-"
    middle, low, high = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low}-{high})"


def servers(options: argparse.Namespace, stack: ExitStack, folder: Path, server_core: int | None) -> list[Server]:
    """Those that can be started, the mock first; the others are named with the reason."""
    ready: list[Server] = []
    pace = ["--interval-ms", str(options.interval_ms)] + ["--one-by-one"] * options.one_by_one
    for name in SERVERS:
        if name != "direct" and name not in options.only.split(","):
            continue
        needs = {"nginx": "nginx", "everything": "redis-server"}.get(name)
        if needs is not None and not shutil.which(needs):
            print(f"{name} left out: {needs} is not installed", file=sys.stderr)
            continue
        if name == "everything":
            stack.callback(stop, start_redis(folder))
        with pinned(None if name == "direct" else server_core):
            upstream = ready[0].port if ready else free_port()
            server = start(name, upstream, pace, folder)
        stack.callback(server.stop)
        try:
            server.wait_until_ready()
            ready.append(server)
        except RuntimeError as exc:
            print(f"{name} left out: {exc}", file=sys.stderr)
    return ready


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int)
    parser.add_argument("--only", default=",".join(SERVERS))
    parser.add_argument("--paced", action="store_true")
    parser.add_argument("--interval-ms", type=float, default=5.0)
    parser.add_argument("--one-by-one", action="store_true")
    options = parser.parse_args()
    options.connections = options.connections or (64 if options.paced else 32)
    options.interval_ms *= options.paced
    cores = sorted(os.sched_getaffinity(0))
    server_core, load_core = (cores[0], cores[1]) if len(cores) > 1 else (None, None)
    rounds: dict[str, list[Figures]] = {}
    with tempfile.TemporaryDirectory() as temporary, pinned(load_core), ExitStack() as stack:
        folder = Path(temporary)
        under_test = servers(options, stack, folder, server_core)
        for server in under_test:
            load.python_load(server.port, KEY, True, options.connections, 1.0)  # what is slow only once is not counted
        for _ in range(options.rounds):
            direct: dict[str, load.Load] = {}
            for server in under_test:
                rounds.setdefault(server.name, []).append(measure(server, direct, options, folder))
    print(table(rounds))
    pins = f"server on core {server_core}, mock and load on core {load_core}" if load_core is not None else "not pinned"
    tool = "wrk" if load.has_wrk() and not options.paced else "tests.bench.load"
    pace = f"every {options.interval_ms:g} ms" if options.paced else "one by one" if options.one_by_one else "at once"
    print(
        f"\n{len(cores)} cores ({pins}), Python {platform.python_version()}, {platform.machine()}; load by {tool}: "
        f"{options.connections} connections, {options.rounds} rounds of {options.seconds:g} s; events {pace}"
    )


if __name__ == "__main__":
    main()
