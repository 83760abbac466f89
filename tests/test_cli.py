"""What can I do from the shell? What serves, or ends by a signal, is a process of its own here."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from click.testing import CliRunner

from gateway.adapter import UpstreamFacts
from gateway.cli import main, recognise
from tests.house import Received, head, json_reply, upstream

ROOT = Path(__file__).parent.parent
PATIENCE_S = 60
ECHO = "upstreams: {echo: {adapter: echo}}\nmodels: {parrot: {targets: [{upstream: echo}]}}\n"
QUESTION = {"model": "parrot", "messages": [{"role": "user", "content": "Polly"}]}


def suiron(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gateway", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def models_of(owner: str) -> dict[str, Any]:
    return {"object": "list", "data": [{"id": "llama", "object": "model", "created": 1, "owned_by": owner}]}


@dataclass
class Served:
    """A gateway that has said it is ready; `said` is what it printed, `log` what it wrote to stderr by its end."""

    process: subprocess.Popen[str]
    said: str
    base_url: str
    log: str = ""

    def end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        _, self.log = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode

    def run_snippet(self, **replaced: str) -> str:
        """What the example that it printed prints."""
        snippet = self.said[self.said.index("from openai") : self.said.index("\n\nServe a real model")]
        for old, new in replaced.items():
            snippet = snippet.replace(old.replace("_", " "), new)
        done = subprocess.run(
            [sys.executable, "-c", snippet], capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@contextmanager
def serving(*args: str | Path) -> Iterator[Served]:
    command = [sys.executable, "-m", "gateway", "serve", "--port", "0", *map(str, args)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    alarm = threading.Timer(PATIENCE_S, process.kill)
    alarm.start()
    try:
        assert process.stdout is not None
        said = ""
        while "or put a server here" not in said:
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            said += line
        found = re.search(r"Base URL +(\S+)", said)
        assert found is not None
        yield Served(process, said, found[1])
    finally:
        alarm.cancel()
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    file = tmp_path_factory.mktemp("parrot") / "g.yaml"
    file.write_text(ECHO)
    with serving("--config", file) as served:
        yield served


def test_serve_prints_what_to_paste_and_it_works(parrot: Served) -> None:
    assert parrot.base_url.startswith("http://127.0.0.1:")
    assert "parrot" in parrot.said
    assert "none needed from this machine" in parrot.said
    health = re.search(r"Health +(\S+)", parrot.said)
    assert health is not None
    assert httpx2.get(health[1]).json() == {"status": "ready"}
    assert parrot.run_snippet() == "Hello!"


def test_serve_in_front_of_a_server_says_what_it_found_and_serves_its_models(parrot: Served) -> None:
    with serving("--backend", parrot.base_url.removesuffix("/v1")) as served:
        assert served.run_snippet() == "Hello!"
        answer = httpx2.post(f"{served.base_url}/chat/completions", json=QUESTION).json()
        assert (answer["model"], answer["choices"][0]["message"]["content"]) == ("parrot", "Polly")
        assert served.end(signal.SIGTERM) == 0
    assert re.search(
        r"http://127.0.0.1:\d+: Suiron: parrot; images ✗ audio ✗ files ✗, 4 deviations repaired\n", served.log
    )
    assert "Traceback" not in served.log


SERVERS = {
    "vLLM 0.32.0": ("vllm", {"/v1/models": models_of("vllm"), "/version": {"version": "0.32.0"}}),
    "TGI 3.3.7": ("tgi", {"/v1/models": models_of("llama"), "/info": {"model_id": "llama", "version": "3.3.7"}}),
    "TGI 1.4.0": ("tgi", {"/info": {"model_id": "llama", "version": "1.4.0"}}),
    "llama.cpp": ("openai", {"/v1/models": models_of("llamacpp")}),
    "OpenAI-speaking server": ("openai", {"/v1/models": models_of("somebody")}),
}


@pytest.mark.anyio
@pytest.mark.parametrize(("kind", "adapter", "answers"), [(kind, *rest) for kind, rest in SERVERS.items()])
async def test_a_server_is_recognised_and_spoken_to_in_its_dialect(kind: str, adapter: str, answers: Any) -> None:
    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        found = answers.get(received.path)
        await json_reply(found if found is not None else {}, 200 if found is not None else 404)(
            Received("GET", "/", {}, b""), writer
        )

    async with upstream(script) as server:
        chosen, facts = await recognise(f"http://127.0.0.1:{server.port}/v1")

    assert isinstance(facts, UpstreamFacts)
    assert f"{facts.kind} {facts.version or ''}".strip() == kind
    assert (chosen.adapter, [model.id for model in facts.models]) == (adapter, ["llama"])


@pytest.mark.anyio
async def test_a_server_that_wants_a_credential_is_put_into_a_file() -> None:
    async def refuse(received: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(head(401, {"content-length": "0"}))

    async with upstream(refuse) as server:
        done = await asyncio.to_thread(suiron, "serve", "--port", "0", "--backend", f"127.0.0.1:{server.port}")
    assert (done.returncode, done.stdout) == (1, "")
    assert "It wants a credential: give it an api_key. For that it takes a file" in done.stderr


def test_a_model_that_cannot_be_loaded_ends_the_start_with_its_reason() -> None:
    done = suiron("serve", "--port", "0", "--model", "./nowhere")

    assert (done.returncode, done.stdout) == (1, "")
    assert "Error: there is no folder ./nowhere" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_quietly_with_connections_open(tmp_path: Path, how: signal.Signals) -> None:
    (tmp_path / "g.yaml").write_text(ECHO)
    with serving("--config", tmp_path / "g.yaml") as served, httpx2.Client() as client:
        assert client.get(f"{served.base_url}/models").status_code == 200
        assert served.end(how) == 0
        assert served.log == ""
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{served.base_url}/models")


def test_a_new_key_pasted_into_the_configuration_opens_it(tmp_path: Path) -> None:
    printed = suiron("key", "new", "--name", "alice").stdout
    key = re.search(r"sk-suiron-\S+", printed)
    assert key is not None
    file = tmp_path / "g.yaml"
    file.write_text(ECHO + printed.replace(key[0], "(not kept)"))
    assert suiron("check", file).returncode == 0
    with serving("--config", file) as served:
        assert "one of the keys alice" in served.said
        assert httpx2.get(f"{served.base_url}/models").status_code == 401
        assert (
            httpx2.get(f"{served.base_url}/models", headers={"authorization": "Bearer sk-suiron-x"}).status_code == 401
        )
        assert served.run_snippet(YOUR_KEY=key[0]) == "Hello!"
        assert served.end(signal.SIGTERM) == 0
        assert key[0] not in served.said + served.log


def test_the_manual_passes_the_check() -> None:
    done = suiron("check", "config/gateway.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    assert "fine" in done.stdout


def test_the_schema_is_json() -> None:
    assert json.loads(suiron("schema").stdout)["$ref"]


KEYLESS_UPSTREAM = "upstreams: {a: {adapter: openai, base_url: 'http://a', api_key: {env: HOME}}}\n"
KEY = f"auth: {{keys: [{{name: alice, sha256: {'a' * 64}}}]}}\n"
FAULTS = [
    # the arguments, a configuration for FILE, and what is said
    ("check FILE", ECHO.replace("adapter", "adaptor"), "FILE:1: upstreams.echo.adaptor: unknown key"),
    (
        "check FILE",
        "upstreams: {a: {adapter: nope}}",
        "FILE:1: upstreams.a.adapter: there is no adapter 'nope'; known are: echo, local, openai, ",
    ),
    (
        "check FILE",
        "upstreams: {a: {adapter: 'json:nope'}}",
        "FILE:1: upstreams.a.adapter: the adapter 'json:nope' cannot",
    ),
    ("check FILE", "upstreams: {a: {adapter: openai}}", "FILE:1: upstreams.a.base_url: .*needs one, such as http"),
    (
        "check FILE",
        KEYLESS_UPSTREAM.replace("HOME", "SUIRON_TEST_NONE"),
        "FILE:1: upstreams.a: the environment variable SUIRON_TEST_NONE is not set",
    ),
    (
        "check FILE",
        "upstreams:\n  a: {adapter: openai, base_url: 'http://a',\n    options: {engine: vllm}}",
        "FILE:3: upstreams.a.options.engine: expected one of openai, transformers, ",
    ),
    ("check FILE", KEYLESS_UPSTREAM, "it has no keys, but the upstream 'a' holds a credential.*suiron key new"),
    ("check MISSING", "", "MISSING: cannot be read: No such file or directory"),
    ("serve --config MISSING", "", "MISSING: cannot be read: No such file or directory"),
    ("serve --config FILE", "server: {port: x}", "FILE:1: server.port: expected a whole number, got text"),
    ("serve --config FILE --backend http://a", ECHO, "--config stands alone"),
    ("serve --config FILE --port USED", ECHO, "cannot listen on 127.0.0.1:USED: Address already in use.*--port"),
    ("serve --config FILE --port 0 --host nowhere.invalid", ECHO + KEY, "cannot listen on nowhere.invalid:0: .*--host"),
    ("serve --config FILE --port 0 --host 0.0.0.0", ECHO, "refusing to start without keys.*0.0.0.0.*suiron key new"),
    ("serve --backend http://127.0.0.1:DEAD --port 0", "", "--backend http://127.0.0.1:DEAD: .*could not be reached"),
    ("serve --backend ftp://a", "", "--backend ftp://a: not like http://host:port"),
    ("serve --backend http://a:b", "", "--backend http://a:b: not like http://host:port"),
    ("key new --name a/b", "", "--name: 1 to 64 of "),
    (
        "serve --config FILE --port 0",
        ECHO + "database: {url: 'sqlite:////proc/suiron/ledger.db'}\n",
        "the ledger cannot be kept in /proc/suiron/ledger.db: .*database.url: sqlite:////path/to/file",
    ),
]


@pytest.mark.parametrize(("command", "text", "said"), FAULTS, ids=[command for command, _, _ in FAULTS])
def test_a_fault_is_one_clear_line_and_exit_code_1(tmp_path: Path, command: str, text: str, said: str) -> None:
    (tmp_path / "g.yaml").write_text(text)
    with socket.create_server(("127.0.0.1", 0)) as used, socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # nobody listens there
        real = {
            "FILE": str(tmp_path / "g.yaml"),
            "MISSING": str(tmp_path / "missing.yaml"),
            "USED": str(used.getsockname()[1]),
            "DEAD": str(bound.getsockname()[1]),
        }
        for name, value in real.items():
            command, said = command.replace(name, value), said.replace(name, value)
        done = CliRunner().invoke(main, command.split())
    assert isinstance(done.exception, SystemExit), repr(done.exception)
    assert done.exit_code == 1
    assert re.match(f"Error: .*{said}", done.stderr), done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.slow
def test_serve_without_options_answers_with_the_demo_model() -> None:
    with serving() as served:
        assert "suiron-demo" in served.said
        assert served.run_snippet()
        assert served.end(signal.SIGINT) == 0
    assert "Traceback" not in served.log
