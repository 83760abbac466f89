"""Where does `suiron serve` keep the ledger, and what does it say when it cannot?"""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2

ROOT = Path(__file__).parent.parent.parent
QUESTION = {"model": "parrot", "messages": [{"role": "user", "content": "a canary's song"}]}


def configured(folder: Path, **changes: object) -> Path:
    config = {
        "upstreams": {"echo": {"adapter": "echo"}},
        "models": {"parrot": {"targets": [{"upstream": "echo"}], "prices": {"input": 1, "output": 2}}},
        **changes,
    }
    path = folder / "gateway.yaml"
    path.write_text(json.dumps(config))
    return path


def a_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def command(config: Path, port: int) -> list[str]:
    return [sys.executable, "-m", "gateway", "serve", "--config", str(config), "--port", str(port)]


@contextmanager
def serving(config: Path, port: int, state: Path) -> Iterator[str]:
    """What it says at the start; it has ended behind."""
    environment = {**os.environ, "XDG_STATE_HOME": str(state)}
    process = subprocess.Popen(command(config, port), cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    alarm = threading.Timer(60, process.kill)
    alarm.start()
    try:
        assert process.stdout is not None
        said = ""
        while "or put a server here" not in said:
            line = process.stdout.readline()
            assert line
            said += line
        yield said
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
    finally:
        alarm.cancel()
        process.kill()
        process.communicate()


def test_without_a_word_about_it_the_ledger_is_a_file_in_the_state_directory(tmp_path: Path) -> None:
    port = a_free_port()
    with serving(configured(tmp_path), port, tmp_path / "state") as said:
        answer = httpx2.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=QUESTION).json()
        metrics = httpx2.get(f"http://127.0.0.1:{port}/metrics").text

    path = tmp_path / "state" / "suiron" / f"{port}.db"
    assert f"Ledger    {path}\n" in said
    assert "suiron_ledger_written_total" in metrics
    connection = sqlite3.connect(path)
    rows = connection.execute("SELECT outcome, prompt_tokens, completion_tokens, cost_nano FROM usage").fetchall()
    connection.close()
    usage = answer["usage"]
    cost = usage["prompt_tokens"] * 1000 + usage["completion_tokens"] * 2000
    assert rows == [("completed", usage["prompt_tokens"], usage["completion_tokens"], cost)]
    assert [file.name for file in tmp_path.rglob("*") if file.is_file() and b"canary" in file.read_bytes()] == []


def test_a_second_gateway_on_the_same_file_is_refused_with_what_to_do(tmp_path: Path) -> None:
    config = configured(tmp_path, database={"url": f"sqlite:///{tmp_path}/ledger.db"})
    with serving(config, a_free_port(), tmp_path):
        second = subprocess.run(
            command(config, a_free_port()), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )

    assert second.returncode == 1
    assert "ledger.db is in use by another gateway (process " in second.stderr
    assert "stop that one, or give this one a file of its own, in database.url" in second.stderr
    assert "Traceback" not in second.stderr
