"""How are completions asked of TGI's native route, and what is made of its tokens?"""

import math
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from adapters.tgi.asking import Asked, by_index, refuse, refuse_in_both, split, stops_of
from adapters.tgi.cut import Cut
from adapters.tgi.faults import fault_in
from adapters.tgi.options import Options
from gateway.adapter import Dispatch
from gateway.errors import InvalidRequest
from gateway.schema.common import Usage
from gateway.schema.completions import Completion, CompletionChoice, CompletionRequest
from gateway.schema.payload import Part, Parts, Payload
from gateway.schema.reading import explain

FINISHES = {"length": "length", "eos_token": "stop", "stop_sequence": "stop"}
EXTENSIONS = frozenset({"top_k", "typical_p", "repetition_penalty"})


class _Extensions(Struct):
    """`top_k` 0 and -1 are off, as in vLLM; so is `typical_p` 1."""

    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    typical_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None


_EXTENSIONS = msgspec.json.Decoder(_Extensions)


def exchanges(
    request: Payload[CompletionRequest], dispatch: Dispatch, options: Options
) -> list[Asked[CompletionRequest]]:
    """
    `n`, or `best_of`, for each prompt. Raises InvalidRequest for what cannot be honoured.

    With stop strings the answer is streamed from TGI in any case, so that it can be stopped; where the prompt's
    logprobs are asked for it never is, since TGI gives them only at once. `best_of` needs the logprobs for itself.
    """
    asked = request.value
    refuse_in_both(asked)
    refuse("suffix", asked.suffix)
    if asked.echo and asked.logprobs is not None:
        refuse("logprobs", not options.prefill_logprobs, " It cannot tell those of the prompt; leave `echo` out.")
        refuse("logprobs", asked.logprobs > 0, " With `echo`, only 0 can be asked for.")
    each = max(asked.n or 1, asked.best_of or 1)
    changes: dict[str, Any] = {
        "stream": bool(asked.stream or stops_of(asked)) and not _with_prefill(asked),
        "logprobs": asked.logprobs or 0 if ranks(asked) else asked.logprobs,
    }
    prompts = asked.prompt if isinstance(asked.prompt, list) else [asked.prompt]
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise InvalidRequest(
            "This model takes prompts as text, not as token ids, and needs one.",
            param="prompt",
            code="unsupported_parameter",
        )
    return split(request, dispatch, [{"prompt": prompt, **changes} for prompt in prompts], each)


def ranks(asked: CompletionRequest) -> bool:
    """Whether more completions are made than given."""
    return (asked.best_of or 0) > (asked.n or 1)


def needs_nobody(asked: CompletionRequest) -> bool:
    """Whether there is nothing to generate, nor to find out."""
    return asked.limit == 0 and not _with_prefill(asked)


def _with_prefill(asked: CompletionRequest) -> bool:
    return bool(asked.echo) and asked.logprobs is not None


def encode(asked: Asked[CompletionRequest], lora: str | None, max_stops: int) -> dict[str, Any]:
    """TGI's body. `do_sample` is always there, since TGI takes its absence beside other parameters for false."""
    request = asked.value
    wanted = {
        "details": True,
        "return_full_text": False,
        "decoder_input_details": _with_prefill(request) or None,
        "do_sample": not asked.is_greedy,
        "max_new_tokens": max(request.limit, 1),
        "temperature": None if asked.is_greedy else request.temperature,
        "top_p": None if asked.is_greedy or request.top_p == 1 else request.top_p,
        "frequency_penalty": request.frequency_penalty,
        "seed": request.seed,
        "stop": stops_of(request)[:max_stops] or None,
        "top_n_tokens": request.logprobs or None,
        "adapter_id": lora,
        **_extensions(asked.wire),
    }
    return {"inputs": request.prompt, "parameters": {n: value for n, value in wanted.items() if value is not None}}


def _extensions(wire: bytes) -> dict[str, Any]:
    try:
        given = _EXTENSIONS.decode(wire)
    except msgspec.ValidationError as exc:
        raise explain(str(exc)) from None
    return {
        "top_k": given.top_k if given.top_k and given.top_k > 0 else None,
        "typical_p": None if given.typical_p == 1 else given.typical_p,
        "repetition_penalty": given.repetition_penalty,
    }


class _Token(Struct):
    text: str
    logprob: float | None = None
    special: bool = False


class _Details(Struct):
    finish_reason: str
    generated_tokens: int
    input_length: int | None = None
    prefill: list[_Token] = []
    tokens: list[_Token] = []
    top_tokens: list[list[_Token]] | None = None


class _Said(Struct):
    """An answer or an event: the latter has a `token`, and the last of them the rest."""

    token: _Token | None = None
    top_tokens: list[_Token] | None = None
    generated_text: str | None = None
    details: _Details | None = None
    error: Any = None


_SAID = msgspec.json.Decoder(_Said)

Told = tuple[str, float | None, dict[str, float | None] | None, int]
"""What OpenAI tells of a token: its text, its logprob, the likeliest in its place, where it begins."""


class Reply:
    """One choice of TGI's as OpenAI's chunks; `over` once nothing more is wanted of TGI."""

    def __init__(self, asked: Asked[CompletionRequest]) -> None:
        self.over = False
        self._asked = asked.value
        self._index = asked.index
        self._cut = Cut[Told](stops_of(asked.value))
        self._offset = len(self._echo)
        self._begun = False
        self._tokens = 0

    @property
    def _echo(self) -> str:
        return str(self._asked.prompt) if self._asked.echo else ""

    def read(self, document: bytes) -> Parts:
        """What an event brings; raises the error that it is."""
        said = _said(document)
        parts: Parts = []
        if self._echo and not self._begun:
            parts.append(self._chunk(self._echo, []))
        self._begun = True
        text, told = "", list[Told]()
        if said.token is not None:
            self._tokens += 1
            text, told = self._token(said.token, said.top_tokens)
        last = said.generated_text is not None or said.details is not None
        passed, told = self._cut.feed(text, told, last=last)
        if passed or told:
            parts.append(self._chunk(passed, told))
        finish = self._finish(said.details.finish_reason if said.details is not None else None, last)
        if finish is not None:
            self.over = True
            parts.append(self._chunk("", [], finish, self._usage(said.details)))
        return parts

    def read_whole(self, document: bytes) -> Part[Completion]:
        """What an answer that came at once brings, as one chunk."""
        said = _said(document)
        details = said.details
        if details is None or said.generated_text is None:
            raise msgspec.ValidationError("no details")
        told = self._prefill(details.prefill) if _with_prefill(self._asked) else []
        text = self._echo
        if self._asked.limit:
            more, others = self._generated(said.generated_text, details)
            text, told = text + more, told + others
        finish = "length" if self._asked.limit == 0 else self._finish(details.finish_reason, True)
        return self._chunk(text, told, finish, self._usage(details))

    def end(self, done: bool) -> Parts:
        """Nothing: the last token has said all."""
        return []

    def unasked(self) -> Part[Completion]:
        """The whole answer where no token was asked for."""
        return self._chunk(self._echo, [], "length")

    def _generated(self, text: str, details: _Details) -> tuple[str, list[Told]]:
        if self._asked.logprobs is None:
            passed, told = self._cut.feed(text, last=True)
            return passed, told
        text, told = "", []
        tops: Sequence[list[_Token] | None] = details.top_tokens or [None] * len(details.tokens)
        for token, top in zip(details.tokens, tops, strict=True):
            passed, out = self._cut.feed(*self._token(token, top))
            text, told = text + passed, told + out
        passed, out = self._cut.feed("", last=True)
        return text + passed, told + out

    def _token(self, token: _Token, top: list[_Token] | None) -> tuple[str, list[Told]]:
        """The text of a token, and what is told of it: nothing of a special one, which is no text."""
        if token.special:
            return "", []
        start, self._offset = self._offset, self._offset + len(token.text)
        likeliest = {other.text: other.logprob for other in top or ()} if self._asked.logprobs else None
        if likeliest is not None:
            likeliest[token.text] = token.logprob
        return token.text, [(token.text, token.logprob, likeliest, start)]

    def _prefill(self, tokens: list[_Token]) -> list[Told]:
        """What is told of the prompt's tokens, without the beginning of text that TGI put before them."""
        if tokens and not self._echo.startswith(tokens[0].text):
            tokens = tokens[1:]
        told: list[Told] = []
        start = 0
        for position, token in enumerate(tokens):
            told.append((token.text, token.logprob if position else None, None, start))
            start += len(token.text)
        return told

    def _finish(self, said: str | None, last: bool) -> str | None:
        if self._cut.hit:
            return "stop"
        if not last:
            return None
        return FINISHES.get(said or "", "length" if self._tokens >= self._asked.limit else "stop")

    def _usage(self, details: _Details | None) -> Usage:
        """What TGI counted, else what came; a prompt of 0 tokens is one that nobody counted yet."""
        if details is None:
            return Usage(prompt_tokens=0, completion_tokens=self._tokens)
        made = details.generated_tokens if self._asked.limit else 0
        return Usage(prompt_tokens=details.input_length or 0, completion_tokens=made)

    def _chunk(
        self, text: str, told: list[Told], finish: str | None = None, usage: Usage | None = None
    ) -> Part[Completion]:
        logprobs = _logprobs(told) if told and self._asked.logprobs is not None else None
        choice = CompletionChoice(text=text, index=self._index, finish_reason=finish, logprobs=logprobs)
        return Part.encode(Completion(choices=[choice]), usage or self._usage(None))


def _said(document: bytes) -> _Said:
    said = _SAID.decode(document)
    if said.error is not None:
        raise fault_in(500, document)
    return said


def _logprobs(told: list[Told]) -> dict[str, Any]:
    tokens, logprobs, tops, offsets = map(list, zip(*told, strict=True))
    return {
        "tokens": tokens,
        "token_logprobs": logprobs,
        "top_logprobs": None if all(top is None for top in tops) else tops,
        "text_offset": offsets,
    }


def whole(request: CompletionRequest, chunks: list[Completion]) -> Completion:
    """The completion that these chunks are: the best of them, where more were made than asked for."""
    each = max(request.n or 1, request.best_of or 1)
    made = [_joined(reply) for _, reply in by_index(choice for chunk in chunks for choice in chunk.choices)]
    given: list[CompletionChoice] = []
    for start in range(0, len(made), each):
        group = made[start : start + each]
        given += sorted(group, key=_likelihood, reverse=True)[: request.n or 1] if ranks(request) else group
    for index, choice in enumerate(given):
        choice.index = index
        if request.logprobs is None:
            choice.logprobs = None
    return Completion(choices=given)


def _joined(reply: list[CompletionChoice]) -> CompletionChoice:
    logprobs = [choice.logprobs for choice in reply if choice.logprobs]
    joined = (
        {name: [item for each in logprobs for item in each[name] or ()] for name in logprobs[0]} if logprobs else {}
    )
    finish = next((choice.finish_reason for choice in reversed(reply) if choice.finish_reason), None)
    return CompletionChoice(
        text="".join(choice.text for choice in reply),
        index=0,
        finish_reason=finish,
        logprobs={**joined, "top_logprobs": joined["top_logprobs"] or None} if joined else None,
    )


def _likelihood(choice: CompletionChoice) -> float:
    """The mean of its tokens' logprobs; of a completion without any, the worst."""
    logprobs = choice.logprobs["token_logprobs"] if choice.logprobs else []
    known = [logprob for logprob in logprobs if logprob is not None]
    return sum(known) / len(known) if known else -math.inf
