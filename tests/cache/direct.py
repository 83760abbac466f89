"""A cache without a gateway around it."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec

from gateway.auth import ANONYMOUS, Principal
from gateway.call import Call
from gateway.schema.endpoint import CHAT, Endpoint
from gateway.schema.payload import Parts
from gateway.schema.reading import read_request
from tests.cache.conftest import STREAM


def a_call(
    body: dict[str, Any] | None = None, endpoint: Endpoint = CHAT, principal: Principal = ANONYMOUS, **more: Any
) -> Call:
    payload, unknown = read_request(endpoint, msgspec.json.encode(STREAM if body is None else body))
    return Call(endpoint, principal, payload, unknown, **more)


async def all_of(parts: AsyncGenerator[Parts]) -> list[Parts]:
    async with aclosing(parts):
        return [arrived async for arrived in parts]
