"""Calls as the pipeline would leave them, and ledgers to put them in."""

import re
import sqlite3
from pathlib import Path

from msgspec import structs

from gateway import settings
from gateway.auth import Principal
from gateway.call import Attempt, Call
from gateway.database.record import UsageRecord
from gateway.models import Model, Target
from gateway.prices import Prices
from gateway.schema.chat import ChatRequest, Message
from gateway.schema.common import Usage
from gateway.schema.endpoint import CHAT
from gateway.schema.payload import Payload
from tests.house import ScriptedAdapter

PRICES = Prices(input=2_000_000_000, output=6_000_000_000, cached_input=500_000_000)
ALICE = Principal("alice-app", "t", user="alice", team="red")
TARGET = Target("up", "model-1", ScriptedAdapter())
REQUEST = Payload.encode(ChatRequest(model="smart", messages=[Message(role="user", content="Hi")]))


def a_call(
    usage: Usage | None = None,
    *,
    principal: Principal = ALICE,
    model: str = "smart",
    prices: Prices | None = PRICES,
    dispatched: bool = True,
) -> Call:
    call = Call(CHAT, principal, REQUEST, set(), model=Model(model, (TARGET,), prices))
    if dispatched:
        call.attempts.append(Attempt(TARGET, call.clock(), call.clock()))
    if usage is not None:
        call.usage = usage
        call.first_at = call.clock()
    return call


def sqlite_at(folder: Path, journal_mib: int = 1) -> settings.Database:
    return settings.Database(url=f"sqlite:///{folder}/ledger.db", journal_mib=journal_mib)


def rows_at(folder: Path) -> list[sqlite3.Row]:
    return ask(folder, "SELECT * FROM usage ORDER BY seq")


def ask(folder: Path, question: str) -> list[sqlite3.Row]:
    connection = sqlite3.connect(folder / "ledger.db")
    connection.row_factory = sqlite3.Row
    try:
        return connection.execute(question).fetchall()
    finally:
        connection.close()


SUMS = """
    count(*), sum(prompt_tokens), sum(cached_tokens), sum(completion_tokens), sum(reasoning_tokens),
    sum(charged_tokens), coalesce(sum(cost_nano), 0), sum(cost_nano IS NULL),
    sum(CASE WHEN cache IN ('hit', 'shared') THEN 1 ELSE 0 END), sum(saved_nano)
"""
DIFFERENCE = f"""
    WITH summed AS (
        SELECT started_ms / 3600000 * 3600, key_name, user_name, team_name, model, target, outcome, {SUMS}
        FROM usage GROUP BY 1, 2, 3, 4, 5, 6, 7
    )
    SELECT * FROM (SELECT * FROM summed EXCEPT SELECT * FROM usage_hour)
    UNION ALL SELECT * FROM (SELECT * FROM usage_hour EXCEPT SELECT * FROM summed)
"""
"""What the hourly sums have otherwise than the rows; in SQLite's SQL."""


def a_record(request_id: str, **changes: object) -> UsageRecord:
    """A record as another replica may have left it."""
    record = UsageRecord(
        request_id=request_id,
        started_ms=1_800_000_000_000,
        key="bob-app",
        user="",
        team="red",
        endpoint="chat/completions",
        model="smart",
        stream=1,
        price_input=PRICES.input,
        price_cached_input=PRICES.cached_input,
        price_output=PRICES.output,
        ended_ms=1_800_000_001_000,
        outcome="completed",
        usage_source="upstream",
        prompt_tokens=10,
        completion_tokens=5,
        charged_tokens=15,
        cost_nano=50_000,
    )
    return structs.replace(record, **changes)


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
THE_BILL, FORGETTING = re.findall(r"^```sql\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
"""How the README says that the bill is read, and that old rows are deleted."""
NOVEMBER_MS = 1_793_491_200_000


def for_a_bill() -> list[UsageRecord]:
    """Of November: two teams and a model without prices; and one of the month before."""
    records = [
        a_record("req_1", cost_nano=1_500_000_000),
        a_record("req_2", cost_nano=500_000_001),
        a_record("req_3", model="free", price_input=None, price_output=None, cost_nano=None),
        a_record("req_4", team="blue", cost_nano=3_000_000_000),
        a_record("req_5", cost_nano=7_000_000_000, started_ms=NOVEMBER_MS - 1),
    ]
    return [structs.replace(each, started_ms=min(each.started_ms, NOVEMBER_MS)) for each in records]


BILL = [("blue", "smart", 1, 15, 3.0, 0), ("red", "smart", 2, 30, 2.000000001, 0), ("red", "free", 1, 15, 0.0, 1)]
