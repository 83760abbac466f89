"""What does an engine without a model say? What it was told, in tokens that cut through characters and stop strings."""

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal, Protocol

CONTEXT_TOKENS = 256
TOKEN_BYTES = 3
CREATED = 1_750_000_000

Document = dict[str, Any]


@dataclass
class Reply:
    """
    An answer, before it is put on the wire: a document, or the events of a stream.

    *opening* is how many events come before the first with a token.
    """

    documents: list[Any]
    status: int = 200
    streamed: bool = False
    opening: int = 0
    done: bool = False
    headers: dict[str, str] = field(default_factory=dict)


class Dialect(Protocol):
    adapter: str
    """What speaks to it."""

    def answer(self, path: str, asked: Document) -> Reply: ...

    def busy(self, path: str, streamed: bool) -> Reply:
        """What it answers when it is full."""
        ...

    def failure(self, path: str) -> list[Any]:
        """The events of a generation that fails on the way."""
        ...


class Token:
    def __init__(self, data: bytes, text: str, place: int) -> None:
        self.data = data
        self.text = text
        """As far as its characters are whole."""
        self.logprob = -0.25 - place / 8


@dataclass
class Said:
    tokens: list[Token]
    finish: Literal["stop", "length", "stop_sequence"]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)


def say(
    text: str, limit: int | None, stops: Sequence[str], notices: Literal["inside", "within", "border"] = "inside"
) -> Said:
    """
    The tokens of *text* up to the limit or the first stop string.

    The string is noticed inside a token and left out; or noticed *within*, and left in with all of the token; or only
    at a token's *border*, and left in.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    said = Said([], "stop")
    data = text.encode()
    for place, start in enumerate(range(0, len(data), TOKEN_BYTES)):
        if place == limit:
            said.finish = "length"
            break
        piece = data[start : start + TOKEN_BYTES]
        token = Token(piece, decoder.decode(piece), place)
        said.tokens.append(token)
        found = [at for stop in stops if (at := said.text.find(stop)) >= 0]
        if notices == "border":
            found = found if said.text.endswith(tuple(stops) or ("\0",)) else []
        if found:
            said.finish = "stop_sequence"
            if notices == "inside":
                shorten(said.tokens, min(found))
            break
    return said


def shorten(tokens: list[Token], characters: int) -> None:
    """Takes from the texts what is beyond *characters* in all, as an engine does that held them back."""
    for token in tokens:
        token.text = token.text[:characters]
        characters -= len(token.text)


def count(text: str) -> int:
    return -(-len(text.encode()) // TOKEN_BYTES)


def words(message: Document) -> str:
    """The text of a message."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def prompt_tokens(messages: list[Document]) -> int:
    return sum(3 + count(words(message)) for message in messages)


def varied(text: str, asked: Document, copy: int) -> str:
    """What another seed, and another choice, makes of a text; nothing at temperature 0."""
    if asked.get("temperature") == 0:
        return text
    number = (asked.get("seed") or 0) + copy
    return f"{text} {number}" if number else text


def instance(schema: Document) -> str:
    """A document after *schema*, as far as the tests need one."""
    properties: Document = schema.get("properties", {})
    return json.dumps({name: (each.get("enum") or ["x"])[0] for name, each in properties.items()})


def called(asked: Document) -> Document | None:
    """The function that has to be called: the one that is named, or the first where some call is required."""
    choice, tools = asked.get("tool_choice"), asked.get("tools") or []
    if isinstance(choice, dict):
        tools = [tool for tool in tools if tool["function"]["name"] == choice["function"]["name"]]
    if choice == "required" or isinstance(choice, dict):
        function: Document = tools[0]["function"]
        return function
    return None


def arguments(function: Document) -> str:
    return instance(function.get("parameters") or {})


def schema_of(asked: Document) -> Document | None:
    """The schema of `response_format`, in OpenAI's place for it."""
    given = asked.get("response_format") or {}
    schema: Document | None = (given.get("json_schema") or {}).get("schema")
    return schema


def usage(prompt: int, completion: int) -> Document:
    return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}


def by_turns(choices: Sequence[list[Any]]) -> Iterator[Any]:
    """What several choices say at the same time, a token of each after the other."""
    for turn in zip_longest(*choices):
        yield from (each for each in turn if each is not None)
