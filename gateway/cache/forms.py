"""
How does a stream become one answer, and one answer a stream?

A stream is put together as OpenAI's clients do it, and an answer is taken apart so that putting it together gives it
again, whatever members it has.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from gateway.schema.endpoint import CHAT, Endpoint

Members = dict[str, Any]

SAID_ONCE = frozenset("role id type index object".split())
"""Strings that are not continued by the next chunk's."""

ENVELOPE = frozenset("id object created model obfuscation".split())

_JOINERS = r"\u0300-\u036f\u200d\ufe00-\ufe0f\U0001f3fb-\U0001f3ff\u20e3\U000e0020-\U000e007f"
_PIECE = re.compile(rf"\s*(?:[^\s](?:\u200d.|[{_JOINERS}])*){{1,12}}|\s+", re.DOTALL)
"""Some space and up to twelve characters, none of them parted from what belongs to it."""

_DECODER = msgspec.json.Decoder(Members)
_encode = msgspec.json.encode


# A stream becomes one answer.


def merged(endpoint: Endpoint, chunks: Iterable[bytes]) -> bytes:
    """The completion that *chunks* are the stream of; choices in order, members as they were."""
    answer: Members = {}
    choices: dict[int, Members] = {}
    for wire in chunks:
        chunk = _DECODER.decode(wire)
        for said in chunk.pop("choices"):
            index = said.pop("index", None) or 0
            choice = choices.setdefault(
                index, {"index": index, "message": {}} if endpoint is CHAT else {"index": index}
            )
            if endpoint is CHAT:
                _grow(choice["message"], said.pop("delta", None) or {})
            _grow(choice, said)
        answer |= {name: value for name, value in chunk.items() if value is not None and name not in ENVELOPE}
    for choice in choices.values():
        for call in choice.get("message", {}).get("tool_calls") or ():
            call.pop("index", None)
    return _encode({"choices": [choices[index] for index in sorted(choices)], **answer})


def says_nothing_else(chunk: bytes) -> bool:
    """Whether a chunk without its text adds nothing to an answer, so that the texts of several may be put in one."""
    choices = _DECODER.decode(chunk)["choices"]
    if len(choices) != 1:
        return False
    said = {**choices[0], **choices[0].get("delta", {})}
    return all(value in (None, "") or name in ("index", "delta", "role") for name, value in said.items())


def _grow(into: Members, more: Members) -> None:
    for name, value in more.items():
        had = into.get(name)
        if had is None or value is None:
            into[name] = _started(value) if had is None else had
        elif isinstance(value, str) and isinstance(had, str) and name != "finish_reason":
            into[name] = (had or value) if name in SAID_ONCE else had + value
        elif isinstance(value, dict) and isinstance(had, dict):
            _grow(had, value)
        elif isinstance(value, list) and isinstance(had, list):
            _lengthen(had, value)
        else:
            into[name] = value


def _started(value: Any) -> Any:
    """Items of one list may have the same index already."""
    if not isinstance(value, list):
        return value
    items: list[Any] = []
    _lengthen(items, value)
    return items


def _lengthen(items: list[Any], more: list[Any]) -> None:
    """Objects with an index go on where that is; all else goes behind."""
    places = {item["index"]: item for item in items if isinstance(item, dict) and "index" in item}
    for item in more:
        if isinstance(item, dict) and item.get("index") in places:
            _grow(places[item["index"]], item)
        else:
            items.append(item)
            if isinstance(item, dict) and "index" in item:
                places[item["index"]] = item


# One answer becomes a stream.


def cut(endpoint: Endpoint, completion: bytes) -> Iterator[bytes]:
    """The chunks of a stream that says what *completion* does; the last has its usage."""
    answer = _DECODER.decode(completion)
    choices, usage = answer.pop("choices"), answer.pop("usage", None)
    rest = {name: value for name, value in answer.items() if name not in ENVELOPE}
    deltas = _chat_deltas if endpoint is CHAT else _text_deltas
    for position, choice in enumerate(choices):
        index = choice.pop("index", position)
        for said in deltas(choice):
            yield _encode({**rest, "choices": [{"index": index, "finish_reason": None, **said}]})
    if usage is not None:
        yield _encode({**rest, "choices": [], "usage": usage})


def _chat_deltas(choice: Members) -> Iterator[Members]:
    message, logprobs = choice.pop("message"), choice.pop("logprobs", None) or {}
    content, refusal = message.pop("content", None), message.pop("refusal", None)
    calls, role = message.pop("tool_calls", None), message.pop("role", None) or "assistant"
    yield {"delta": {"role": role, "content": None if content is None else ""}}
    for name in ("reasoning_content", "reasoning"):
        for piece in _PIECE.findall(message.pop(name, None) or ""):
            yield {"delta": {name: piece}}
    if message := {name: value for name, value in message.items() if value is not None}:
        yield {"delta": message}
    for name, text in (("content", content), ("refusal", refusal)):
        yield from _with_tokens(name, text or "", logprobs.get(name) or [])
    for index, call in enumerate(calls or ()):
        yield from _call_deltas(index, call)
    empty = {"logprobs": logprobs} if logprobs and not any(logprobs.values()) else {}
    yield {"delta": {}, **empty, **choice}


def _with_tokens(name: str, text: str, tokens: list[Members]) -> Iterator[Members]:
    """A piece for each token where they are the text; else their logprobs come with the first piece."""
    if tokens and "".join([token["token"] for token in tokens]) == text:
        for token in tokens:
            yield {"delta": {name: token["token"]}, "logprobs": {name: [token]}}
        return
    more = {"logprobs": {name: tokens}} if tokens else {}
    for piece in _PIECE.findall(text) or ([""] if tokens else []):
        yield {"delta": {name: piece}, **more}
        more = {}


def _call_deltas(index: int, call: Members) -> Iterator[Members]:
    """A call begins with id, type and name; its arguments follow."""
    kind = next((kind for kind in ("function", "custom") if isinstance(call.get(kind), dict)), None)
    field = "arguments" if kind == "function" else "input"
    if kind is None or not isinstance(call[kind].get(field), str):
        yield {"delta": {"tool_calls": [{"index": index, **call}]}}
        return
    yield {"delta": {"tool_calls": [{"index": index, **call, kind: {**call[kind], field: ""}}]}}
    for piece in _PIECE.findall(call[kind][field]):
        yield {"delta": {"tool_calls": [{"index": index, kind: {field: piece}}]}}


def _text_deltas(choice: Members) -> Iterator[Members]:
    text, logprobs = choice.pop("text"), choice.pop("logprobs", None)
    tokens = (logprobs or {}).get("tokens") or []
    if tokens and "".join(tokens) == text:
        for place, token in enumerate(tokens):
            each = {
                name: values[place : place + 1] if isinstance(values, list) else values
                for name, values in logprobs.items()
            }
            yield {"text": token, "logprobs": each}
        logprobs = None
    else:
        for piece in _PIECE.findall(text):
            yield {"text": piece, "logprobs": logprobs}
            logprobs = None
    yield {"text": "", "logprobs": logprobs, **choice}
