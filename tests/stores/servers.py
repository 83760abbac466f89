"""Real Redis servers on ports of their own, and a clock that only tests turn."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest


def redis_binary() -> str:
    found = shutil.which("redis-server")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("CI needs a redis-server")
        pytest.skip("needs a redis-server")
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@dataclass(eq=False)
class RedisServer:
    """A redis-server of the test's own."""

    port: int
    folder: Path
    options: tuple[str, ...] = ()
    config: Path | None = None
    process: subprocess.Popen[bytes] = field(init=False)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [redis_binary(), *([str(self.config)] if self.config else [])]
        command += ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder), *self.options]
        command += [] if self.config else ["--save", ""]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.wait()

    def wait(self) -> None:
        give_up = time.monotonic() + 20
        while not self.said("PING").startswith(b"+PONG"):
            if time.monotonic() > give_up:
                raise RuntimeError("redis-server did not come up")
            time.sleep(0.02)

    def said(self, *command: str) -> bytes:
        """The beginning of the reply to a command, as it is on the wire; nothing where nobody answers."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(" ".join(command).encode() + b"\r\n")
                return connection.recv(65536)
        except OSError:
            return b""

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def redis_server(*options: str, port: int = 0, config: Path | None = None) -> Iterator[RedisServer]:
    """*config* is a file, of which a sentinel needs one."""
    with TemporaryDirectory() as folder:
        server = RedisServer(port or free_port(), Path(folder), options, config)
        server.start()
        try:
            yield server
        finally:
            server.kill()


@dataclass
class Clock:
    """The time, in ms since 1970, as a test says it is."""

    now_ms: int = 1_800_000_000_000

    def __call__(self) -> int:
        return self.now_ms

    def monotonic_s(self) -> float:
        return self.now_ms / 1000

    def forward(self, ms: int) -> None:
        self.now_ms += ms
