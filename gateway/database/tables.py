"""Which tables are there? As the newest migration leaves them."""

from sqlalchemy import BigInteger, Column, Index, Integer, MetaData, PrimaryKeyConstraint, Table, Text

VERSION_TABLE = "suiron_version"
"""Where Alembic notes how far the tables are; its own name for it may be somebody else's."""

Whole = BigInteger().with_variant(Integer(), "sqlite")
"""64 bits; SQLite numbers rows by itself, and takes strict tables, only under this name."""

metadata = MetaData()

usage = Table(
    "usage",
    metadata,
    Column("seq", Whole, primary_key=True, autoincrement=True),
    Column("request_id", Text, nullable=False, unique=True),
    Column("started_ms", Whole, nullable=False),
    Column("key_name", Text, nullable=False),
    Column("user_name", Text, nullable=False),
    Column("team_name", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("stream", Whole, nullable=False),
    Column("price_input", Whole),
    Column("price_cached_input", Whole),
    Column("price_output", Whole),
    Column("ended_ms", Whole, nullable=False),
    Column("target", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("usage_source", Text, nullable=False),
    Column("prompt_tokens", Whole, nullable=False),
    Column("cached_tokens", Whole, nullable=False),
    Column("completion_tokens", Whole, nullable=False),
    Column("reasoning_tokens", Whole, nullable=False),
    Column("charged_tokens", Whole, nullable=False),
    Column("cost_nano", Whole),
    Column("ttft_ms", Whole),
    Column("total_ms", Whole, nullable=False),
    Column("cache", Text, nullable=False),
    Column("attempts", Text, nullable=False),
    Column("saved_nano", Whole, nullable=False, server_default="0"),
    sqlite_strict=True,
    sqlite_autoincrement=True,
)
"""One row a request: see `UsageRecord`, whose fields these are in order, behind `seq`."""

KEYS = ("hour", "key_name", "user_name", "team_name", "model", "target", "outcome")
SUMS = (
    "requests prompt_tokens cached_tokens completion_tokens reasoning_tokens charged_tokens cost_nano unpriced "
    "hits saved_nano"
).split()

usage_hour = Table(
    "usage_hour",
    metadata,
    Column("hour", Whole, nullable=False),
    *(Column(name, Text, nullable=False) for name in KEYS[1:]),
    *(Column(name, Whole, nullable=False) for name in SUMS[:-2]),
    *(Column(name, Whole, nullable=False, server_default="0") for name in SUMS[-2:]),
    PrimaryKeyConstraint(*KEYS),
    Index("usage_hour_of_key", "key_name", "hour"),
    Index("usage_hour_of_user", "user_name", "hour"),
    Index("usage_hour_of_team", "team_name", "hour"),
    sqlite_strict=True,
)
"""
The sums of each hour: its start, in seconds since 1970. `unpriced` are requests without a cost, `hits` those that the
cache answered.
"""
