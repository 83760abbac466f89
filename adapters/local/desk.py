"""How do requests become pieces of text? The engine's tokens, detokenised, cut at stop strings and counted."""

import logging
from typing import Any

from msgspec.structs import replace

from adapters.local.detokenizer import Detokenizer
from adapters.local.engine import Engine, Sequence, Token
from adapters.local.frames import Failed, Finish, Generate, Piece, Report, Step, Tally
from adapters.local.prompts import Prompt
from adapters.local.sampler import Chooser
from gateway.text import TextCutter

CONTINUED_TOKENS = 8
"""The end of a prompt that tells a tokenizer it is not at the beginning of a text."""
MAX_FAILURES = 3
"""Steps that may fail in a row: a device that has gone wrong stays wrong until its process ends."""

logger = logging.getLogger(__name__)


class _Job:
    """A request at work; `live` are its unfinished choices."""

    def __init__(self, request: Generate) -> None:
        self.id = request.id
        self.tally = Tally(prompt=0)
        self.live: list[Sequence] = []


class _Choice:
    """
    The text of one sequence, which owns it.

    `uncounted` are the prompt's tokens until they have been counted: with the first token of its first choice.
    """

    def __init__(
        self, job: _Job, index: int, uncounted: int, echo: str, decoded: Detokenizer, cutter: TextCutter
    ) -> None:
        self.job = job
        self.index = index
        self.uncounted = uncounted
        self._echo = echo
        self._decoded = decoded
        self._cutter = cutter

    def write(self, token: Token) -> tuple[str, Finish | None]:
        """The text that may go out after *token*, and why it is the last, if it is."""
        text, self._echo = self._echo, ""
        finish = token.finish
        if finish != "stop":
            text += self._cutter.feed(self._decoded.feed(token.id))
        if finish and not self._cutter.hit:
            text += self._cutter.feed(self._decoded.flush()) + self._cutter.flush()
        return text, "stop" if self._cutter.hit else finish


class Desk:
    """
    Takes requests in and gives reports out; synchronous, for one thread.

    *tokenizer* is a Rust tokenizer of the desk's own; *ends* are the token ids that end a text.
    """

    def __init__(self, engine: Engine, tokenizer: Any, ends: frozenset[int]) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._ends = ends
        self._jobs: dict[int, _Job] = {}
        self._fresh: list[Piece] = []
        self._failures = 0

    @property
    def idle(self) -> bool:
        return self._engine.idle and not self._fresh

    def submit(self, request: Generate, prompts: list[Prompt]) -> None:
        job = self._jobs[request.id] = _Job(request)
        for index in range(len(prompts) * request.n):
            self._begin(job, request, prompts[index // request.n], index)
        if not job.live:
            del self._jobs[request.id]

    def cancel(self, id: int) -> None:
        job = self._jobs.pop(id, None)
        for sequence in job.live if job else ():
            self._engine.drop(sequence)

    def step(self) -> list[Report]:
        """What the next step of the engine brings. Raises when the engine fails again and again."""
        pieces, self._fresh = self._fresh, []
        tokens: list[Token] = []
        failed: list[Report] = []
        try:
            tokens = [] if self._engine.idle else self._engine.step()
            self._failures = 0
        except Exception:
            self._failures += 1
            if self._failures == MAX_FAILURES:
                raise
            logger.exception("a step failed")
            failed += [self._fail(id) for id in {sequence.owner.job.id for sequence in self._engine.running}]
        for token in tokens:
            try:
                pieces.append(self._write(token))
            except Exception:  # a tokenizer that cannot decode what its model wrote
                logger.exception("a token could not be decoded")
                failed.append(self._fail(token.sequence.owner.job.id))
        return [*([Step(pieces)] if pieces else []), *failed]

    def _begin(self, job: _Job, request: Generate, prompt: Prompt, index: int) -> None:
        copy = index % request.n
        if prompt.max_tokens == 0:
            job.tally.prompt += 0 if copy else len(prompt.ids)
            self._fresh.append(Piece(job.id, index, prompt.echo, "length", replace(job.tally)))
            return
        seed = request.sampling.seed
        decoded = Detokenizer(self._tokenizer, () if prompt.chat else prompt.ids[-CONTINUED_TOKENS:])
        sequence = Sequence(
            prompt.ids,
            Chooser(request.sampling, None if seed is None else seed + copy),
            max_tokens=prompt.max_tokens,
            ends=self._ends,
            owner=_Choice(job, index, 0 if copy else len(prompt.ids), prompt.echo, decoded, TextCutter(request.stop)),
        )
        job.live.append(sequence)
        self._engine.add(sequence)

    def _write(self, token: Token) -> Piece:
        """Each token makes a piece, be it without text: it counts."""
        choice: _Choice = token.sequence.owner
        job = choice.job
        job.tally.prompt += choice.uncounted
        job.tally.completion += 1
        choice.uncounted = 0
        text, finish = choice.write(token)
        if finish:
            self._engine.drop(token.sequence)
            job.live.remove(token.sequence)
            if not job.live:
                del self._jobs[job.id]
        return Piece(job.id, choice.index, text, finish, replace(job.tally))

    def _fail(self, id: int) -> Failed:
        self.cancel(id)
        return Failed(id=id, kind="failed", message="The model failed on this request.")
