"""Redis as a store: one atomic script a verb, one connection a server, nothing that a lost reply could count twice."""

from gateway.stores.redis.store import RedisStore

__all__ = ["RedisStore"]
