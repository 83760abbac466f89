"""
What holds for every answer, whoever gave it?

* `id`, `created`, `object` and the public `model` are minted once and are the same on every chunk.
* `usage` is there only where the client asked for it, adds up, and then is `null` on every chunk but the last.
* Every choice begins with its role, in the order 0, 1, 2 … (the SDK's accumulator needs that), and is finished once.
* An answer with a choice missing or unfinished is an error: nobody takes a truncated answer for a whole one.

A chunk that needs nothing but its envelope changed is spliced as bytes; all others are taken apart. The tests hold the
two ways against each other. This is the only module that searches in JSON as bytes. Source of the order of chunks and
of the nulls that stay and those that go: `reference` of OpenAI's API as its Python SDK reads it.
"""

import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

import msgspec
from msgspec import UNSET, Raw

from gateway.call import Call
from gateway.errors import UpstreamFailed
from gateway.schema.common import Usage
from gateway.schema.endpoint import CHAT
from gateway.schema.payload import Part, Parts

ENVELOPE = ("id", "object", "created", "model")

_ENVELOPE_AT_START = re.compile(rb'\{(?:"(?:id|object|created|model)":(?:"[^"\\]*"|\d+),){4}')
_NULL = Raw(b"null")
_MEMBERS = msgspec.json.Decoder(dict[str, Raw])
_ITEMS = msgspec.json.Decoder(list[dict[str, Raw]])
_encode = msgspec.json.encode


async def finished(call: Call, parts: AsyncGenerator[Parts]) -> AsyncGenerator[Parts]:
    """The parts of one answer as this client may see them; raises UpstreamFailed where the answer is not whole."""
    async with aclosing(parts):
        if not call.endpoint.streams or not call.request.value.stream:
            async for arrived in parts:
                yield [whole(call, arrived[0])]
            return
        chunks = Chunks(call)
        async for arrived in parts:
            if rewritten := [chunk for part in arrived for chunk in chunks.rewrite(part)]:
                yield rewritten
        if last := chunks.end():
            yield last


def expected_choices(request: Any) -> int:
    prompt = getattr(request, "prompt", None)
    prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    return prompts * (request.n or 1)


# A whole answer.


def whole(call: Call, part: Part[Any]) -> Part[Any]:
    """A completion with every member OpenAI requires and no null that its schema forbids."""
    members: dict[str, Any] = {n: raw for n, raw in _MEMBERS.decode(part.wire).items() if bytes(raw) != b"null"}
    if call.endpoint.streams:
        choices = _whole_choices(call, part, members["choices"])
        usage = {"usage": raw} if (raw := _tidy_usage(members.get("usage"), part.usage)) else {}
        minted = {
            "id": call.endpoint.id_prefix + call.id,
            "object": call.endpoint.object,
            "created": call.created,
            "model": call.request.value.model,
            "choices": choices,
        }
        members = minted | {name: raw for name, raw in members.items() if name not in minted} | usage
    else:
        members = {"object": call.endpoint.object, **members, "model": call.request.value.model}
    return Part(part.value, _encode(members), part.usage)


def _whole_choices(call: Call, part: Part[Any], raw: Raw) -> Any:
    choices = part.value.choices
    expected = expected_choices(call.request.value)
    if len(choices) < expected or not all(choice.finish_reason for choice in choices):
        raise UpstreamFailed("The upstream's answer is not complete.")
    if len(choices) == expected and _is_complete(choices, raw):
        return raw
    completed = [_completed(choice, call.endpoint is CHAT) for choice in _ITEMS.decode(raw)]
    return sorted(completed, key=lambda choice: int(bytes(choice["index"])))[:expected]


def _is_complete(choices: Any, raw: Raw) -> bool:
    """Whether the choices are in order, lack no member, and have no null but those that must stay."""
    nulls = 0
    for position, choice in enumerate(choices):
        required = _required_nulls(choice)
        if choice.index != position or required is None:
            return False
        nulls += required
    return bytes(raw).count(b"null") == nulls


def _required_nulls(choice: Any) -> int | None:
    """How many of the members that may be null are; None if one is missing."""
    message = getattr(choice, "message", None)
    values = [choice.logprobs] if message is None else [choice.logprobs, message.content, message.refusal]
    return None if any(value is UNSET for value in values) else sum(value is None for value in values)


def _completed(choice: dict[str, Raw], chat: bool) -> dict[str, Any]:
    members: dict[str, Any] = {name: raw for name, raw in choice.items() if bytes(raw) != b"null"}
    members.setdefault("index", Raw(b"0"))
    members.setdefault("logprobs", _NULL)
    if chat:
        message = {name: raw for name, raw in _MEMBERS.decode(choice["message"]).items() if bytes(raw) != b"null"}
        members["message"] = {"role": "assistant", "content": _NULL, "refusal": _NULL} | message
    return members


def _tidy_usage(raw: Raw | None, usage: Usage | None) -> Any:
    """Usage that adds up and has no null in it; None if nobody knows."""
    if usage is None or usage.prompt_tokens < 0 or usage.completion_tokens < 0:
        return None
    total = usage.prompt_tokens + usage.completion_tokens
    if raw is not None and usage.total_tokens == total and b"null" not in bytes(raw):
        return raw
    members = msgspec.json.decode(raw if raw is not None else _encode(usage))
    return _without_nulls({**members, "total_tokens": total})


def _without_nulls(members: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_nulls(value) if isinstance(value, dict) else value
        for name, value in members.items()
        if value is not None
    }


# A stream.


class Chunks:
    """The chunks of one stream on their way to the client."""

    def __init__(self, call: Call) -> None:
        minted = {
            "id": call.endpoint.id_prefix + call.id,
            "object": call.endpoint.chunk_object,
            "created": call.created,
            "model": call.request.value.model,
        }
        self._call = call
        self._chat = call.endpoint is CHAT
        self._include_usage = call.include_usage
        self._minted: dict[str, Any] = minted | ({"usage": None} if self._include_usage else {})
        self._head = _encode(self._minted)[:-1] + b","
        self._upstream_head: bytes | None = None
        self._expected = expected_choices(call.request.value)
        self._finished: dict[int, bool] = {}  # the choices that have begun, in order
        self._usage: tuple[Raw | None, Usage] | None = None

    def rewrite(self, part: Part[Any]) -> Iterator[Part[Any]]:
        """The chunks to send for one that came: none, one, or the beginnings of other choices before it."""
        if (wire := self.spliced(part)) is not None:
            part.wire = wire
            yield part
        else:
            yield from self.rebuilt(part)

    def spliced(self, part: Part[Any]) -> bytes | None:
        """The chunk with its envelope exchanged in place, or None where more than that must change."""
        head, value = self._upstream_head, part.value
        if head is None or value.usage is not UNSET or len(value.choices) != 1 or not part.wire.startswith(head):
            return None
        choice = value.choices[0]
        if choice.finish_reason is not None or self._finished.get(choice.index, True):
            return None
        if self._chat and choice.delta.role is not None:
            return None
        return self._head + part.wire[len(head) :]

    def rebuilt(self, part: Part[Any]) -> Iterator[Part[Any]]:
        members = _MEMBERS.decode(part.wire)
        raw_usage = members.pop("usage", None)
        if part.usage is not None:
            self._usage = raw_usage, part.usage
        raw_choices = _ITEMS.decode(members.pop("choices"))
        rest = {name: raw for name, raw in members.items() if name not in ENVELOPE and bytes(raw) != b"null"}
        self._find_envelope(part.wire, len(members) - len(rest))
        choices = []
        for choice, raw in zip(part.value.choices, raw_choices, strict=True):
            index = choice.index
            if self._finished.get(index, index >= self._expected):
                continue  # after its end, or more than were asked for
            yield from self._beginnings(index)
            choices.append(self._choice(choice, raw))
        if choices:
            part.wire = _encode({**self._minted, **rest, "choices": choices})
            yield part

    def end(self) -> Parts:
        """The usage chunk, where the client asked for it; raises UpstreamFailed if a choice has not ended."""
        if len(self._finished) < self._expected or not all(self._finished.values()):
            raise UpstreamFailed("The upstream ended its stream before the answer was complete.")
        usage = self._call.usage
        if not self._include_usage or usage is None:
            return []
        raw = self._usage[0] if self._usage is not None and self._usage[1] is usage else None
        return [self._part([], usage, {"usage": _tidy_usage(raw, usage)})]

    def _find_envelope(self, wire: bytes, dropped: int) -> None:
        """Splicing needs all of the envelope, and nothing else to drop, before the first other member."""
        match = _ENVELOPE_AT_START.match(wire)
        self._upstream_head = match[0] if match is not None and dropped == len(ENVELOPE) else None

    def _beginnings(self, index: int) -> Iterator[Part[Any]]:
        """What must go before the first chunk of a choice: the beginnings of those with a lower index."""
        for earlier in range(len(self._finished), index):
            self._finished[earlier] = False
            start: dict[str, Any] = {"delta": {"role": "assistant", "content": ""}} if self._chat else {"text": ""}
            yield self._part([{"index": earlier, **start, "logprobs": None, "finish_reason": None}], None, {})

    def _choice(self, choice: Any, raw: dict[str, Raw]) -> dict[str, Any]:
        members: dict[str, Any] = {"index": choice.index, **raw}
        if self._chat:
            delta = _MEMBERS.decode(raw["delta"])
            delta.pop("role", None)
            members["delta"] = delta if choice.index in self._finished else {"role": "assistant", **delta}
        members["finish_reason"] = choice.finish_reason or None
        self._finished[choice.index] = bool(choice.finish_reason)
        return members

    def _part(self, choices: list[dict[str, Any]], usage: Usage | None, more: dict[str, Any]) -> Part[Any]:
        return Part(None, _encode({**self._minted, "choices": choices, **more}), usage)
