"""A process killed at any line of what records: is each request that was dispatched one row, and only one?"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway import settings
from tests.ledger import test_postgres
from tests.ledger.calls import DIFFERENCE, ask, rows_at, sqlite_at
from tests.ledger.servers import PostgresDatabase, a_postgres

pytestmark = pytest.mark.slow

SEED = 20261127


def sacrifice(database: settings.Database, points: int) -> dict[str, Any]:
    asked = {"database": msgspec.to_builtins(database), "points": points, "seed": SEED}
    command = [sys.executable, "-m", "tests.ledger.victims"]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def judge(told: list[str], rows: list[tuple[str, str, int]]) -> Counter[str]:
    """How the requests ended, of which those that were dispatched have one row each, and no others have any."""
    said: dict[str, set[str]] = {}
    for line in told:
        word, _, request_id = line.partition(" ")
        said.setdefault(word, set()).add(request_id)
    found = {request_id: (outcome, tokens) for request_id, outcome, tokens in rows}
    dispatched, over = said["dispatched"], said["over"]

    assert len(found) == len(rows)
    assert dispatched - found.keys() == set()
    assert found.keys() - said["opening"] == set()
    assert found.keys() & said["refused"] == set()
    for request_id, (outcome, tokens) in found.items():
        if request_id in over:
            assert (outcome, tokens) in [("completed", 15), ("client_gone", 15)]
        else:
            assert (outcome, tokens) in [("completed", 15), ("client_gone", 15), ("abandoned", 0), ("abandoned", 14)]
    return Counter(outcome for outcome, _ in found.values())


def test_with_sqlite(tmp_path: Path) -> None:
    found = sacrifice(sqlite_at(tmp_path), points=100)

    rows = [(row["request_id"], row["outcome"], row["charged_tokens"]) for row in rows_at(tmp_path)]
    outcomes = judge(found["told"], rows)
    assert found["killed"] >= 80
    assert min(outcomes[outcome] for outcome in ("completed", "client_gone", "abandoned")) > 20
    assert ask(tmp_path, DIFFERENCE) == []


def test_with_postgresql(tmp_path: Path) -> None:
    with a_postgres() as server:
        database = PostgresDatabase(server, "victims", tmp_path)
        found = sacrifice(database.settings(), points=50)

        rows: Any = database.ask("SELECT request_id, outcome, charged_tokens FROM usage")
        judge(found["told"], rows)
        assert found["killed"] >= 40
        assert database.ask(test_postgres.DIFFERENCE) == []
