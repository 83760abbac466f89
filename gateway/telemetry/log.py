"""Where do log lines go, and what do they look like? Out by a thread of their own, never in a request's way."""

import logging
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from gateway.telemetry.record import NONE, Record

CAPACITY = 10_000
TOGETHER_S = 0.05
CLOSE_S = 1.0
MAX_MESSAGE = 1000
MAX_FRAMES = 50

Format = Literal["json", "text"]
Said = Record | logging.LogRecord

_encode = msgspec.json.Encoder().encode


class Log:
    """
    Lines on their way to a file descriptor.

    A request only puts its record into a queue. A thread writes, those of a twentieth of a second together; where
    nobody reads, the queue fills up, and then lines are lost, each of which *dropped* is told of.
    """

    def __init__(self, fd: int, format: Format, *, capacity: int = CAPACITY) -> None:
        self.dropped: Callable[[], None] = lambda: None
        self._fd = fd
        self._render = {"json": json_line, "text": text_line}[format]
        self._capacity = capacity
        self._lines: deque[Said | threading.Event] = deque()
        self._some = threading.Event()
        self._closing = threading.Event()
        self._writer = threading.Thread(target=self._write, name="log", daemon=True)
        self._writer.start()

    def put(self, said: Said) -> None:
        if len(self._lines) >= self._capacity:
            self.dropped()
            return
        self._lines.append(said)
        if not self._some.is_set():
            self._some.set()

    def flush(self) -> None:
        """Waits a moment for what was put so far to be written, so that what goes out elsewhere comes after it."""
        written = threading.Event()
        self._lines.append(written)
        self._some.set()
        written.wait(CLOSE_S)

    def close(self) -> None:
        """Waits a moment for what is still to be written."""
        self._closing.set()
        self._some.set()
        self._writer.join(CLOSE_S)

    def _write(self) -> None:
        while not self._closing.is_set() or self._lines:
            self._some.wait()
            self._closing.wait(TOGETHER_S)
            self._some.clear()
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            try:
                _write_all(self._fd, b"".join(map(self._rendered, lines)))
            except OSError:  # the other side is gone; this has nowhere to be told
                self.dropped()
            for line in lines:
                if isinstance(line, threading.Event):
                    line.set()

    def _rendered(self, said: Said | threading.Event) -> bytes:
        try:
            return b"" if isinstance(said, threading.Event) else self._render(said)
        except Exception:  # one line less is better than none any more
            self.dropped()
            return b""


def _write_all(fd: int, block: bytes) -> None:
    """Not by `sys.stderr`: a thread that is stuck in it keeps the interpreter from ending."""
    view = memoryview(block)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            select.select([], [fd], [])


class LogHandler(logging.Handler):
    """Takes what the standard library's loggers say to *log*."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.put(record)


def take_over(log: Log) -> None:
    """Everything that any logger says goes to *log*, warnings of Python too."""
    logging.basicConfig(level=logging.INFO, handlers=[LogHandler(log)], force=True)
    logging.captureWarnings(True)


def to_stderr(format: Format) -> Log:
    return Log(sys.stderr.fileno(), format)


def json_line(said: Said) -> bytes:
    if isinstance(said, Record):
        if isinstance(said.ts, float):
            said.ts = datetime.fromtimestamp(said.ts, UTC)
        return _encode(said) + b"\n"
    return _encode(_members(said)) + b"\n"


def _members(said: logging.LogRecord) -> dict[str, Any]:
    members = {
        "event": "log",
        "ts": datetime.fromtimestamp(said.created, UTC),
        "level": said.levelname.lower(),
        "logger": said.name,
        "message": _message(said),
    }
    exc = said.exc_info[1] if said.exc_info else None
    return members if exc is None else {**members, "exception": _names(exc), "frames": _frames(exc)}


def text_line(said: Said) -> bytes:
    if isinstance(said, Record):
        return _request(said).encode() + b"\n"
    lines = [_message(said)]
    if exc := said.exc_info[1] if said.exc_info else None:
        lines[0] += f": {_names(exc)}"
        lines += [f"  {frame}" for frame in _frames(exc)]
    return "\n".join(lines).encode(errors="replace") + b"\n"


def _request(record: Record) -> str:
    error = f" {record.error}" if record.error else ""
    tokens = "" if record.prompt_tokens is None else f" {record.prompt_tokens}+{record.completion_tokens} tokens"
    return (
        f"{_time_of_day(record.ts)} {record.status or NONE} {record.outcome}{error} {record.endpoint} {record.model} "
        f"{record.target or NONE} {record.total_ms:.1f} ms{tokens} {record.id}"
    )


def _time_of_day(ts: datetime | float) -> str:
    local = time.localtime(ts if isinstance(ts, float) else ts.timestamp())
    return f"{local.tm_hour:02}:{local.tm_min:02}:{local.tm_sec:02}"


def _message(record: logging.LogRecord) -> str:
    """One line without control characters: asyncio goes on with the `repr` of exceptions, which may quote anything."""
    first = record.getMessage()[: 10 * MAX_MESSAGE].strip("\n").partition("\n")[0]
    return "".join(char if char.isprintable() else "�" for char in first[:MAX_MESSAGE])


def _names(exc: BaseException) -> str:
    """The exception and its causes by their types: what they say may quote a prompt, an answer or a key."""
    return " from ".join(type(link).__qualname__ for link in _causes(exc))


def _frames(exc: BaseException) -> list[str]:
    frames = []
    for link in _causes(exc):
        trace = link.__traceback__
        while trace is not None:
            code = trace.tb_frame.f_code
            frames.append(f"{code.co_filename}:{trace.tb_lineno} {code.co_qualname}")
            trace = trace.tb_next
    return frames[-MAX_FRAMES:]


def _causes(exc: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = exc
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
