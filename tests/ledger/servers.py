"""A PostgreSQL of the tests' own, to be killed and frozen."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from gateway import settings

PASSWORD = "pg-secret"
PATIENCE_S = 30.0


def binaries() -> Path:
    """Where PostgreSQL's programs are; without them the test is skipped, or fails in CI."""
    newest = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), reverse=True)
    found = newest[0] if newest else shutil.which("postgres")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("CI needs a PostgreSQL")
        pytest.skip("needs a PostgreSQL")
    return Path(found).resolve().parent


class Postgres:
    """A cluster in *folder*, which its own user, as it does not run as root, can reach."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._binaries = binaries()
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            self._as = {"user": "nobody", "group": "nogroup", "extra_groups": []}
            shutil.chown(folder, "nobody", "nogroup")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        secret = folder / "password"
        secret.write_text(PASSWORD)
        self._run("initdb", "-D", str(folder / "data"), "-U", "suiron", "-A", "scram-sha-256", "--pwfile", str(secret))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        given = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        command = [str(self._binaries / "postgres"), "-D", str(self.folder / "data"), *given.split()]
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with (self.folder / "log").open("ab") as log:
                self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, **self._as)
            while self.process.poll() is None:
                try:
                    self.connect(connect_timeout=1).close()
                    return
                except psycopg.OperationalError:
                    time.sleep(0.02)
            if time.monotonic() > deadline:  # for a while, what is left of a killed one may be in its way
                raise RuntimeError((self.folder / "log").read_text())
            time.sleep(0.05)

    def connect(self, database: str = "postgres", **options: Any) -> psycopg.Connection:
        where = {"host": "127.0.0.1", "port": self.port, "user": "suiron", "password": PASSWORD, "dbname": database}
        return psycopg.connect(**where, **options, autocommit=True)

    def signal(self, which: signal.Signals) -> None:
        """To the server and to each process that serves a connection, all at once."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for process in (self.process.pid, *map(int, children)):
            os.kill(process, which)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()
        self.process = None

    def _run(self, program: str, *args: str) -> None:
        done = subprocess.run(
            [str(self._binaries / program), *args],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            **self._as,
        )
        assert done.returncode == 0, done.stderr


@contextmanager
def a_postgres() -> Iterator[Postgres]:
    folder = Path(tempfile.mkdtemp(prefix="suiron-postgres-"))
    try:
        server = Postgres(folder)
        server.start()
        yield server
        if server.process is not None:
            server.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class PostgresDatabase:
    """A database of its own for one test, in a cluster that it shares."""

    def __init__(self, server: Postgres, name: str, journal: Path) -> None:
        self.server = server
        self.name = name
        self.journal = journal
        with server.connect() as connection:
            connection.execute(f'CREATE DATABASE "{name}"')

    def settings(self, journal_mib: int = 1) -> settings.Database:
        secret = self.journal / "password"
        secret.write_text(PASSWORD)
        return settings.Database(
            url=f"postgresql://suiron@127.0.0.1:{self.server.port}/{self.name}",
            password=settings.Secret(file=str(secret)),
            journal=str(self.journal),
            journal_mib=journal_mib,
        )

    def ask(self, question: str) -> list[tuple[Any, ...]]:
        with self.server.connect(self.name) as connection:
            return connection.execute(question.encode()).fetchall()
