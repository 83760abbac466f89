"""The engine's process: commands in, reports out, the model in between. It ends when its stdin does."""

import logging
import os
import sys
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from adapters.local.frames import COMMANDS, Cancel, Counted, Failed, Generate, LoadFailed, Loading, Report, encode
from adapters.local.options import Options

if TYPE_CHECKING:
    from adapters.local.desk import Desk
    from adapters.local.prompts import Prompt, PromptReader

NICENESS = 5

Inbox = SimpleQueue[tuple[Generate, "list[Prompt]"] | Cancel | Counted | Failed]


class Pipe:
    """Where reports go. The stdout it takes over is stderr from then on, so that no print can garble a frame."""

    def __init__(self) -> None:
        self._file: BinaryIO = os.fdopen(os.dup(1), "wb", buffering=0)
        os.dup2(2, 1)
        self._shown = ("", -1)

    def send(self, report: Report) -> None:
        frame = memoryview(encode(report))
        while frame:
            frame = frame[self._file.write(frame) :]

    def send_progress(self, loading: Loading) -> None:
        """In steps of ten percent, and never backwards."""
        stage, tenths = shown = (loading.stage, int(loading.fraction * 10))
        if stage != self._shown[0] or tenths > self._shown[1]:
            self._shown = shown
            self.send(Loading(stage, tenths / 10))


def main() -> None:
    pipe = Pipe()
    logging.basicConfig(level=logging.WARNING)
    with suppress(OSError, AttributeError):
        os.nice(NICENESS)
    inbox: Inbox = SimpleQueue()
    reader: Future[PromptReader] = Future()
    Thread(target=read_commands, args=(sys.stdin.buffer, reader, inbox), daemon=True).start()
    desk = open_desk(msgspec.json.decode(sys.argv[1], type=Options), pipe, reader)
    if desk is not None:
        serve(desk, inbox, pipe)


def open_desk(options: Options, pipe: Pipe, reader: "Future[PromptReader]") -> "Desk | None":
    """
    None, and said so, if the model can not be loaded.

    Imports come late: they may print, and torch takes seconds, which a misspelt name need not wait for.
    """
    from adapters.local.sources import CannotLoad, find

    try:
        folder = find(options, pipe.send_progress)

        from tokenizers import Tokenizer

        from adapters.local.desk import Desk
        from adapters.local.loading import load
        from adapters.local.prompts import PromptReader

        loaded = load(folder, options, pipe.send_progress)
    except CannotLoad as exc:
        pipe.send(LoadFailed(str(exc)))
        return None
    own_tokenizer = Tokenizer.from_str(loaded.tokenizer.backend_tokenizer.to_str())
    desk = Desk(loaded.engine, own_tokenizer, loaded.ends)
    context_tokens = loaded.facts.context_tokens
    reader.set_result(PromptReader(loaded.tokenizer, vocabulary=loaded.vocabulary, context_tokens=context_tokens))
    pipe.send(loaded.facts)
    return desk


def read_commands(stdin: BinaryIO, reader: "Future[PromptReader]", inbox: Inbox) -> None:
    """
    The thread that templates and tokenises, beside the engine.

    At the end of stdin the gateway is gone: the process ends at once, whatever it is doing.
    """
    try:
        for line in stdin:
            command = COMMANDS.decode(line)
            inbox.put(command if isinstance(command, Cancel) else read(command, reader.result()))
    finally:
        os._exit(0)


def read(request: Generate, reader: "PromptReader") -> "tuple[Generate, list[Prompt]] | Counted | Failed":
    from adapters.local.prompts import Refused

    try:
        prompts = reader.read(request)
        if request.counting:
            return Counted(request.id, sum(len(prompt.ids) for prompt in prompts))
        return request, prompts
    except Refused as exc:
        return exc.failure
    except Exception as exc:
        logging.getLogger(__name__).error("a request could not be read: %s", type(exc).__name__)
        return Failed(id=request.id, kind="failed", message="The model could not read this request.")


def serve(desk: "Desk", inbox: Inbox, pipe: Pipe) -> None:
    while True:
        while desk.idle or not inbox.empty():
            command = inbox.get()
            if isinstance(command, Cancel):
                desk.cancel(command.id)
            elif isinstance(command, Counted | Failed):
                pipe.send(command)
            else:
                desk.submit(*command)
        for report in desk.step():
            pipe.send(report)


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        main()
