"""How does the gateway listen, and how do answers leave?"""

import asyncio
import gc
import logging
import os
import signal
import socket
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.settings import Server, SettingsError

KEEP_ALIVE_S = 75  # longer than clients keep an idle connection, so that none is closed under a request
GRACE_S = 5
GC_THRESHOLDS = (20_000, 20, 50)  # a request makes hardly any cycles; the default looks for them every few requests


def listen(server: Server) -> socket.socket:
    """Raises SettingsError where that is not possible."""
    try:
        family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
        return socket.create_server((server.host, server.port), family=family, backlog=2048)
    except OSError as exc:
        hint = "; is another one running? Choose another with --port" if server.port else ""
        why = os.strerror(exc.errno) if exc.errno else str(exc)
        raise SettingsError(f"cannot listen on {server.host}:{server.port}: {why}{hint}") from None


def server_for(app: Any) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=CorkedProtocol,
            lifespan="on",
            log_config=None,
            log_level=logging.WARNING,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=GRACE_S,
        )
    )


def run(app: Any, listener: socket.socket) -> bool:
    """Serves until SIGINT or SIGTERM; whether it had come up."""
    server = server_for(app)
    gc.collect()
    gc.freeze()  # what is there now stays: the collector need not look at it again
    gc.set_threshold(*GC_THRESHOLDS)
    signal.signal(signal.SIGINT, _ended)
    signal.signal(signal.SIGTERM, _ended)
    server.run(sockets=[listener])
    return server.started


def _ended(signum: int, _: FrameType | None) -> None:
    """uvicorn raises the signal that ended it again; by then all is done."""


class CorkedProtocol(HttpToolsProtocol):
    """uvicorn's, but what is written in one turn of the event loop leaves in one piece: one system call, one packet."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(Corked(transport, self.loop))  # type: ignore[arg-type]


class Corked:
    """A transport whose writes leave together, at the end of the event loop's turn."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._held:
            self._transport.write(b"".join(self._held))
            self._held.clear()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
