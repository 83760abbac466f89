"""How do pieces of text become OpenAI's completions and chunks?"""

from typing import Any, Protocol

from adapters.local.frames import Finish, Piece, Tally
from gateway.schema.chat import AnswerMessage, ChatChoice, ChatChunk, ChatCompletion, ChunkChoice, Delta
from gateway.schema.common import PromptTokensDetails, Usage
from gateway.schema.completions import Completion, CompletionChoice
from gateway.schema.payload import Part, Parts


class Wording(Protocol):
    """One endpoint's shapes."""

    def opening(self, index: int) -> Any | None:
        """The first chunk of a choice, where there is one without text."""

    def more(self, index: int, text: str) -> Any: ...

    def end(self, index: int, finish: Finish) -> Any: ...

    def whole(self, texts: list[str], finishes: list[Finish], usage: Usage) -> Any: ...


class ChatWording:
    def opening(self, index: int) -> ChatChunk:
        return _chat_chunk(index, Delta(role="assistant", content=""), None)

    def more(self, index: int, text: str) -> ChatChunk:
        return _chat_chunk(index, Delta(content=text), None)

    def end(self, index: int, finish: Finish) -> ChatChunk:
        return _chat_chunk(index, Delta(), finish)

    def whole(self, texts: list[str], finishes: list[Finish], usage: Usage) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=index,
                message=AnswerMessage(role="assistant", content=text, refusal=None),
                finish_reason=finish,
                logprobs=None,
            )
            for index, (text, finish) in enumerate(zip(texts, finishes, strict=True))
        ]
        return ChatCompletion(choices=choices, usage=usage)


class CompletionWording:
    def opening(self, index: int) -> None:
        return None

    def more(self, index: int, text: str) -> Completion:
        return Completion(choices=[_completion_choice(index, text, None)])

    def end(self, index: int, finish: Finish) -> Completion:
        return Completion(choices=[_completion_choice(index, "", finish)])

    def whole(self, texts: list[str], finishes: list[Finish], usage: Usage) -> Completion:
        ended = zip(texts, finishes, strict=True)
        choices = [_completion_choice(index, text, finish) for index, (text, finish) in enumerate(ended)]
        return Completion(choices=choices, usage=usage)


class Streamed:
    """The chunks of one answer, in order."""

    def __init__(self, wording: Wording) -> None:
        self._wording = wording
        self._opened: set[int] = set()

    def parts(self, pieces: list[Piece]) -> Parts:
        """May be empty: a token need not bring text."""
        return [Part.encode(chunk, usage(piece.tally)) for piece in pieces for chunk in self._chunks(piece)]

    def _chunks(self, piece: Piece) -> list[Any]:
        chunks = []
        if piece.index not in self._opened:
            self._opened.add(piece.index)
            chunks.append(self._wording.opening(piece.index))
        if piece.text:
            chunks.append(self._wording.more(piece.index, piece.text))
        if piece.finish is not None:
            chunks.append(self._wording.end(piece.index, piece.finish))
        return [chunk for chunk in chunks if chunk is not None]


class Gathered:
    """One answer, whole at the end."""

    def __init__(self, wording: Wording, choices: int) -> None:
        self._wording = wording
        self._texts: list[list[str]] = [[] for _ in range(choices)]
        self._finishes: list[Finish] = ["stop"] * choices
        self._tally = Tally(prompt=0)

    def add(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            self._texts[piece.index].append(piece.text)
            self._finishes[piece.index] = piece.finish or "stop"
            self._tally = piece.tally

    def part(self) -> Part[Any]:
        total = usage(self._tally)
        texts = ["".join(pieces) for pieces in self._texts]
        return Part.encode(self._wording.whole(texts, self._finishes, total), total)


def usage(tally: Tally) -> Usage:
    return Usage(
        prompt_tokens=tally.prompt,
        completion_tokens=tally.completion,
        total_tokens=tally.prompt + tally.completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=tally.cached),
    )


def _chat_chunk(index: int, delta: Delta, finish: Finish | None) -> ChatChunk:
    return ChatChunk(choices=[ChunkChoice(index=index, delta=delta, finish_reason=finish, logprobs=None)])


def _completion_choice(index: int, text: str, finish: Finish | None) -> CompletionChoice:
    return CompletionChoice(index=index, text=text, finish_reason=finish, logprobs=None)
