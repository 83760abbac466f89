"""The ledger: a row for each request, and the sums of each hour."""

from alembic import op
from sqlalchemy import BigInteger, Column, Integer, PrimaryKeyConstraint, Text

revision = "0001"
down_revision = None

WHOLE = BigInteger().with_variant(Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "usage",
        Column("seq", WHOLE, primary_key=True, autoincrement=True),
        Column("request_id", Text, nullable=False, unique=True),
        Column("started_ms", WHOLE, nullable=False),
        Column("key_name", Text, nullable=False),
        Column("user_name", Text, nullable=False),
        Column("team_name", Text, nullable=False),
        Column("endpoint", Text, nullable=False),
        Column("model", Text, nullable=False),
        Column("stream", WHOLE, nullable=False),
        Column("price_input", WHOLE),
        Column("price_cached_input", WHOLE),
        Column("price_output", WHOLE),
        Column("ended_ms", WHOLE, nullable=False),
        Column("target", Text, nullable=False),
        Column("outcome", Text, nullable=False),
        Column("usage_source", Text, nullable=False),
        Column("prompt_tokens", WHOLE, nullable=False),
        Column("cached_tokens", WHOLE, nullable=False),
        Column("completion_tokens", WHOLE, nullable=False),
        Column("reasoning_tokens", WHOLE, nullable=False),
        Column("charged_tokens", WHOLE, nullable=False),
        Column("cost_nano", WHOLE),
        Column("ttft_ms", WHOLE),
        Column("total_ms", WHOLE, nullable=False),
        Column("cache", Text, nullable=False),
        Column("attempts", Text, nullable=False),
        sqlite_strict=True,
        sqlite_autoincrement=True,
    )
    op.create_table(
        "usage_hour",
        Column("hour", WHOLE, nullable=False),
        Column("key_name", Text, nullable=False),
        Column("user_name", Text, nullable=False),
        Column("team_name", Text, nullable=False),
        Column("model", Text, nullable=False),
        Column("target", Text, nullable=False),
        Column("outcome", Text, nullable=False),
        Column("requests", WHOLE, nullable=False),
        Column("prompt_tokens", WHOLE, nullable=False),
        Column("cached_tokens", WHOLE, nullable=False),
        Column("completion_tokens", WHOLE, nullable=False),
        Column("reasoning_tokens", WHOLE, nullable=False),
        Column("charged_tokens", WHOLE, nullable=False),
        Column("cost_nano", WHOLE, nullable=False),
        Column("unpriced", WHOLE, nullable=False),
        PrimaryKeyConstraint("hour", "key_name", "user_name", "team_name", "model", "target", "outcome"),
        sqlite_strict=True,
    )
    op.create_index("usage_hour_of_key", "usage_hour", ["key_name", "hour"])
    op.create_index("usage_hour_of_user", "usage_hour", ["user_name", "hour"])
    op.create_index("usage_hour_of_team", "usage_hour", ["team_name", "hour"])
