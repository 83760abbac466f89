"""How do the chunks of one answer become a whole one?"""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from msgspec import Struct

from gateway.schema.common import Usage
from gateway.schema.payload import Part, Parts


async def gathered(parts: AsyncGenerator[Parts], whole: Callable[[list[Any]], Struct]) -> AsyncGenerator[Parts]:
    """The one part that *whole* makes of the values of all."""
    values: list[Any] = []
    usage: Usage | None = None
    async with aclosing(parts):
        async for arrived in parts:
            values += [part.value for part in arrived]
            usage = arrived[-1].usage
    yield [Part.encode(whole(values), usage)]
