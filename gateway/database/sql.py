"""How are records written and summed, in the SQL that both databases speak? Core only, bound parameters only."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from msgspec.structs import astuple
from sqlalchemy import Connection, Insert, bindparam, case, delete, func, or_, select
from sqlalchemy.dialects.postgresql import insert as insert_postgresql
from sqlalchemy.dialects.sqlite import insert as insert_sqlite
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, StatementError

from gateway.database import DatabaseUnavailable, Inserted, Kind, Metric, Unwritable
from gateway.database.record import UsageRecord
from gateway.database.tables import KEYS, SUMS, usage, usage_hour

HOUR_MS = 3_600_000
COLUMNS = [column.name for column in usage.columns if column.name != "seq"]
SCOPES = {"key": usage_hour.c.key_name, "user": usage_hour.c.user_name, "team": usage_hour.c.team_name}
METRICS = {"requests": "requests", "tokens": "charged_tokens", "nano_usd": "cost_nano"}

_newest = select(func.coalesce(func.max(usage.c.seq), 0))
_since = usage.c.seq > bindparam("before")
_numbered = select(usage.c.request_id, usage.c.seq).where(_since)
_any_of = usage.c.request_id.in_(bindparam("ids", expanding=True))
_known = select(usage.c.request_id, usage.c.seq).where(_any_of)
_abandoned = select(usage.c.seq).where(_any_of, usage.c.outcome == "abandoned")
_these = usage.c.seq.in_(bindparam("seqs", expanding=True))
_forget = delete(usage).where(_these)
_is_hit = or_(usage.c.cache == "hit", usage.c.cache == "shared")  # IN would be compiled anew for each group
_hour = usage.c.started_ms // HOUR_MS * (HOUR_MS // 1000)
_forget_empty = delete(usage_hour).where(usage_hour.c.requests == 0, usage_hour.c.hour.in_(select(_hour).where(_these)))


class Statements:
    """What is said to a database of one dialect, by name. No more than *at_once* rows go in with one statement."""

    def __init__(self, dialect: Any, at_once: int = sys.maxsize) -> None:
        self._at_once = at_once
        insert: Any = insert_sqlite if dialect.name == "sqlite" else insert_postgresql
        rows = insert(usage).values({name: bindparam(name) for name in COLUMNS}).on_conflict_do_nothing()
        self._insert = str(rows.compile(dialect=dialect))  # as text, with tuples: Core's own way takes 10 µs a row
        self._sum_up = _summed(insert, _since)
        self._take_off = _summed(insert, _these, sign=-1)

    def commit(self, connection: Connection, records: Sequence[UsageRecord]) -> Inserted:
        """Within a transaction that no other writer is in at the same time."""
        rows = self._add(connection, records)
        new = len(rows)
        if new < len(records):
            self._overrule(connection, [record for record in records if record.outcome != "abandoned"])
            rows = dict(connection.execute(_known, {"ids": [record.request_id for record in records]}).all())
        return Inserted(rows, new)

    def _add(self, connection: Connection, records: Sequence[UsageRecord]) -> dict[str, int]:
        """The `seq` of each that was not there."""
        before = {"before": connection.scalar(_newest)}
        for first in range(0, len(records), self._at_once):
            some = records[first : first + self._at_once]
            connection.exec_driver_sql(self._insert, [astuple(record) for record in some])
        connection.execute(self._sum_up, before)
        return dict(connection.execute(_numbered, before).all())

    def _overrule(self, connection: Connection, records: Sequence[UsageRecord]) -> None:
        """Who was taken for dead, and was not, knows what came of it: better than who wrote that it was abandoned."""
        wrong = {"seqs": connection.scalars(_abandoned, {"ids": [record.request_id for record in records]}).all()}
        if wrong["seqs"]:
            connection.execute(self._take_off, wrong)
            connection.execute(_forget_empty, wrong)
            connection.execute(_forget, wrong)
            self._add(connection, records)


def _summed(insert: Any, which: Any, *, sign: int = 1) -> Insert:
    """Adds *which* rows to the sums of their hours; with a *sign* of -1, takes them off."""
    counts = {
        "requests": func.count(),
        "cost_nano": func.coalesce(func.sum(usage.c.cost_nano), 0),
        "unpriced": func.sum(case((usage.c.cost_nano.is_(None), 1), else_=0)),
        "hits": func.sum(case((_is_hit, 1), else_=0)),
    }
    sums = [(counts[name] if name in counts else func.sum(usage.c[name])) * sign for name in SUMS]
    keys = [_hour.label(KEYS[0]), *(usage.c[name] for name in KEYS[1:])]
    new = select(*keys, *sums).where(which).group_by(*KEYS)
    adding = insert(usage_hour).from_select([*KEYS, *SUMS], new)
    added = {name: usage_hour.c[name] + adding.excluded[name] for name in SUMS}
    statement: Insert = adding.on_conflict_do_update(index_elements=list(KEYS), set_=added)
    return statement


def used(
    connection: Connection, kind: Kind, name: str, model: str | None, metric: Metric, since_ms: int
) -> tuple[int, int]:
    """In one statement, so that both figures are of one moment."""
    total = func.coalesce(func.sum(usage_hour.c[METRICS[metric]]), 0)
    asked = select(total, _newest.scalar_subquery()).where(SCOPES[kind] == name, usage_hour.c.hour >= since_ms // 1000)
    if model is not None:
        asked = asked.where(usage_hour.c.model == model)
    row = connection.execute(asked).one()
    return int(row[0]), int(row[1])


@contextmanager
def translating() -> Iterator[None]:
    """At the door: what statements raise becomes DatabaseUnavailable or Unwritable."""
    try:
        yield
    except Exception as exc:
        raise translated(exc) from exc


def translated(exc: Exception) -> Exception:
    """What a failed statement means to the ledger."""
    what = str(exc.orig if isinstance(exc, DBAPIError) else exc).strip().splitlines()
    said = what[0] if what else type(exc).__name__
    if isinstance(exc, DataError | IntegrityError | UnicodeError | OverflowError):
        return Unwritable(said)
    if isinstance(exc, StatementError) and not isinstance(exc, DBAPIError):
        return Unwritable(said)
    return DatabaseUnavailable(said)
