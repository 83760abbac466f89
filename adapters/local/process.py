"""How is the engine's process started, spoken to, kept alive, and ended?"""

import asyncio
import itertools
import logging
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from adapters.local.frames import (
    REPORTS,
    Cancel,
    Command,
    Counted,
    Failed,
    Generate,
    LoadFailed,
    Loading,
    Piece,
    Ready,
    Report,
    Step,
    encode,
)
from adapters.local.options import Options
from gateway import errors

FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 30.0
CALM_S = 60.0
"""A process that lived this long earns the first back-off again."""
GRACE_S = 5.0
MAX_FRAME_BYTES = 64 * 1024 * 1024
SOURCES = Path(__file__).parents[2]

logger = logging.getLogger("suiron.local")

Mailbox = asyncio.Queue[list[Piece] | errors.GatewayError]


class EngineProcess:
    """
    A child process with a model in it, one over its whole life however often it has to be started anew.

    A model that can not be loaded is not tried again. *on_progress* is called while it loads.
    """

    def __init__(self, options: Options, on_progress: Callable[[Loading], None] | None = None) -> None:
        self._options = options
        self._on_progress = on_progress
        self._ids = itertools.count()
        self._mailboxes: dict[int, Mailbox] = {}
        self._counts: dict[int, asyncio.Future[int]] = {}
        self._waiting: set[int] = set()
        self._supervisor: asyncio.Task[None] | None = None
        self._process: Process | None = None
        self._facts: Ready | None = None
        self._fault: str | None = None
        self._been_ready = False
        self._settled = asyncio.Event()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Does nothing if it was started before."""
        if self._supervisor is None:
            self._supervisor = asyncio.create_task(self._supervise(), name="suiron.local")

    async def ready(self) -> Ready:
        """Starts the process and waits until the model is loaded. Raises CannotLoad if it can not be."""
        self.start()
        await self._settled.wait()
        if self._facts is None:
            raise errors.CannotLoad(self._fault or "The model's process has ended.")
        return self._facts

    async def aclose(self) -> None:
        """Ends the process. Requests in flight get UpstreamFailed."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])

    async def generate(self, request: Generate, choices: int) -> AsyncGenerator[list[Piece]]:
        """
        What each of the *choices* gained since the last time, at most one piece for each.

        Raises Overloaded, UpstreamFailed or InvalidRequest. Closing the generator cancels the request.
        """
        self._admit()
        request.id = next(self._ids)
        mailbox = self._mailboxes[request.id] = Mailbox()
        self._waiting.add(request.id)
        try:
            await self._send(request)
            while choices:
                pieces = await _collect(mailbox)
                choices -= sum(piece.finish is not None for piece in pieces)
                if not choices:
                    self._forget(request.id)
                yield pieces
        finally:
            if self._forget(request.id):
                await self._send(Cancel(request.id))

    async def count(self, request: Generate) -> int:
        """Tokens of all its prompts. Raises what `generate` does."""
        self._admit()
        request.id, request.counting = next(self._ids), True
        counted: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._counts[request.id] = counted
        self._waiting.add(request.id)
        try:
            await self._send(request)
            return await counted
        finally:
            self._waiting.discard(request.id)
            del self._counts[request.id]

    def _admit(self) -> None:
        self.start()
        if self._fault is not None:
            raise errors.UpstreamFailed("The model could not be loaded. Ask the gateway's operator.")
        if self._facts is None:
            raise errors.Overloaded("The model is loading. Try again soon.", code="model_loading", retry_after_s=2)
        if len(self._waiting) > self._options.max_waiting:
            raise errors.Overloaded("The model has too many requests waiting. Try again later.")

    def _forget(self, id: int) -> bool:
        """Whether the engine was still at work for this request."""
        self._waiting.discard(id)
        return self._mailboxes.pop(id, None) is not None

    async def _send(self, command: Command) -> None:
        """To a process that has just ended, nothing is sent: the supervisor tells the mailboxes."""
        stdin = self._process.stdin if self._process else None
        if stdin is None or stdin.is_closing():
            return
        stdin.write(encode(command))
        if isinstance(command, Generate):
            with suppress(ConnectionError):
                await stdin.drain()

    # The supervisor: one task from start to end.

    async def _supervise(self) -> None:
        try:
            await self._keep_running()
        except Exception:
            logger.exception("%s: its process cannot be run", self._options.name)
        finally:
            self._fault = self._fault or "The model's process has ended."
            self._settled.set()

    async def _keep_running(self) -> None:
        loop = asyncio.get_running_loop()
        backoff_s = FIRST_BACKOFF_S
        while True:
            started = loop.time()
            ending = await self._run()
            if self._fault is None and not self._been_ready:
                self._fault = f"the process for {self._options.name} ended while loading it ({ending})"
            if self._fault is not None:
                return
            if loop.time() - started > CALM_S:
                backoff_s = FIRST_BACKOFF_S
            logger.warning("%s: its process ended (%s); starting another", self._options.name, ending)
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, LONGEST_BACKOFF_S)

    async def _run(self) -> str:
        """One process from its start to its end; returns how it ended."""
        process = self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "adapters.local.child",
            msgspec.json.encode(self._options).decode(),
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            limit=MAX_FRAME_BYTES,
            env=_environment(self._options),
            start_new_session=True,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        murmur = asyncio.create_task(_log(process.stderr))
        try:
            async for line in process.stdout:
                self._take(REPORTS.decode(line))
        except ValueError:  # no frame, or one without an end
            logger.exception("%s: its process is not understood", self._options.name)
        finally:
            self._facts, self._process = None, None
            self._settled.clear()
            self._fail_all()
            await _end(process)
            murmur.cancel()
        return _ending(process.returncode)

    def _take(self, report: Report) -> None:
        if isinstance(report, Step):
            by_request: dict[int, list[Piece]] = {}
            for piece in report.pieces:
                by_request.setdefault(piece.id, []).append(piece)
            for id, pieces in by_request.items():
                self._deliver(id, pieces)
        elif isinstance(report, Counted):
            if (counted := self._counts.get(report.id)) and not counted.done():
                counted.set_result(report.tokens)
        elif isinstance(report, Failed):
            self._deliver(report.id, _error(report))
            self._forget(report.id)
        elif isinstance(report, Loading):
            logger.info("loading %s: %s %.0f %%", self._options.name, report.stage, 100 * report.fraction)
            if self._on_progress is not None:
                self._on_progress(report)
        elif isinstance(report, LoadFailed):
            self._fault = report.message
        else:
            self._facts, self._been_ready = report, True
            self._settled.set()
            logger.info("%s is ready: %s on %s", report.model, report.dtype, report.device)

    def _deliver(self, id: int, arrived: list[Piece] | errors.GatewayError) -> None:
        self._waiting.discard(id)
        if mailbox := self._mailboxes.get(id):
            mailbox.put_nowait(arrived)
        if isinstance(arrived, Exception) and (counted := self._counts.get(id)) and not counted.done():
            counted.set_exception(arrived)

    def _fail_all(self) -> None:
        for id in [*self._mailboxes, *self._counts]:
            self._deliver(id, errors.UpstreamFailed("The model's process ended before its answer was complete."))
            self._forget(id)


async def _collect(mailbox: Mailbox) -> list[Piece]:
    """All that has arrived, at least something: pieces of one choice become one. Raises what was delivered to raise."""
    merged: dict[int, Piece] = {}
    arrived = await mailbox.get()
    while True:
        if isinstance(arrived, errors.GatewayError):
            if merged:
                mailbox.put_nowait(arrived)
                break
            raise arrived
        for piece in arrived:
            earlier = merged.get(piece.index)
            text = earlier.text + piece.text if earlier else piece.text
            merged[piece.index] = msgspec.structs.replace(piece, text=text)
        if mailbox.empty():
            break
        arrived = mailbox.get_nowait()
    return list(merged.values())


def _error(failed: Failed) -> errors.GatewayError:
    if failed.kind == "context":
        return errors.ContextLengthExceeded(failed.message, param=failed.param)
    if failed.kind == "invalid":
        return errors.InvalidRequest(failed.message, param=failed.param, code=failed.code)
    return errors.UpstreamFailed(failed.message)


def _environment(options: Options) -> dict[str, str]:
    paths = [str(SOURCES), os.environ.get("PYTHONPATH", "")]
    return {
        "OMP_NUM_THREADS": str(options.threads),
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TOKENIZERS_PARALLELISM": "false",
    }


async def _log(stderr: asyncio.StreamReader) -> None:
    async for line in stderr:
        logger.debug("%s", line.decode(errors="replace").rstrip())


async def _end(process: Process) -> None:
    if process.returncode is not None:
        return
    if process.stdin is not None:
        process.stdin.close()
    try:
        await asyncio.wait_for(process.wait(), GRACE_S)
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        hint = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}"
    return f"exit status {code}"
