"""What does our server know of a client beyond what ASGI tells?"""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

CLIENT = "suiron.client"


class Client(Protocol):
    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...

    def body(self) -> bytes | None:
        """The request's body if all of it is here, which saves a wait; it is then read."""
        ...

    def when_gone(self, tell: Callable[[], None] | None) -> None:
        """*tell* is called when the client leaves before its answer is complete, at once if it has; None: no longer."""
        ...


class _Stranger:
    """The client of a server that is not ours, such as a test's: nothing more is known of it."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    def body(self) -> bytes | None:
        return None

    def when_gone(self, tell: Callable[[], None] | None) -> None: ...


def client_of(scope: Any) -> Client:
    client: Client = scope["extensions"][CLIENT] if "extensions" in scope else _Stranger()
    return client
