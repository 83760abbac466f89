"""A model comes from the hub: its files, progress by bytes, and the second start without a network."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

ROOT = Path(__file__).parents[2]
COMMIT = "a" * 40
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"\0" * 200_000,
    "pytorch_model.bin": b"code",
    "onnx/model.safetensors": b"again",
    "README.md": b"# Tiny",
}
FETCH = """
import sys
from adapters.local.options import read_options
from adapters.local.sources import CannotLoad, find

try:
    folder = find(read_options({"model": sys.argv[1]}), lambda loading: sys.stdout.write(f"{loading.fraction}\\n"))
    print(*sorted(file.name for file in folder.iterdir()))
except CannotLoad as exc:
    print(exc)
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as a download needs."""

    def do_GET(self) -> None:
        self.answer(*self.find())

    def do_HEAD(self) -> None:
        status, body, headers = self.find()
        self.answer(status, b"", {**headers, "content-length": str(len(body))})

    def log_message(self, format: str, *args: object) -> None: ...

    def find(self) -> tuple[int, bytes, dict[str, str]]:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/tiny/tree/"):
            listed = [
                {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for name, body in FILES.items()
            ]
            return 200, json.dumps(listed).encode(), {"content-type": "application/json"}
        if path.startswith("/api/models/org/tiny"):
            return 200, json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": []}).encode(), {}
        file = FILES.get(path.removeprefix(f"/org/tiny/resolve/{COMMIT}/"))
        if file is None:
            return 404, b"", {"x-error-code": "RepoNotFound"}
        return 200, file, {"x-repo-commit": COMMIT, "etag": f'"{hashlib.sha1(file).hexdigest()}"'}

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def fetch(model: str, hub: str, home: Path) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub, "HF_HOME": str(home)}
    fetched = subprocess.run(
        [sys.executable, "-c", FETCH, model], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return fetched.stdout.splitlines()


def test_weights_and_texts_are_fetched_once(hub: str, tmp_path: Path) -> None:
    *progress, names = fetch("org/tiny", hub, tmp_path)
    assert names == "config.json model.safetensors"
    assert max(map(float, progress)) == 1.0
    assert fetch("org/tiny", "http://127.0.0.1:9", tmp_path) == [names]


def test_a_name_that_the_hub_does_not_know(hub: str, tmp_path: Path) -> None:
    (said,) = fetch("org/other", hub, tmp_path)
    assert said == "there is no model org/other on the hub, or it is private and HF_TOKEN is not set"
