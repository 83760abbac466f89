"""What the cache saved: in each row what it would have cost besides, in each hour's sums also how many were hits."""

from alembic import op
from sqlalchemy import BigInteger, Column, Integer

revision = "0002"
down_revision = "0001"

WHOLE = BigInteger().with_variant(Integer(), "sqlite")


def upgrade() -> None:
    op.add_column("usage", Column("saved_nano", WHOLE, nullable=False, server_default="0"))
    op.add_column("usage_hour", Column("hits", WHOLE, nullable=False, server_default="0"))
    op.add_column("usage_hour", Column("saved_nano", WHOLE, nullable=False, server_default="0"))
