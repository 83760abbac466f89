"""What do TGI's errors mean to a client?"""

import re

import msgspec
from msgspec import Struct

from gateway.errors import ContextLengthExceeded, GatewayError, InvalidRequest, UpstreamFailed
from gateway.faults import Fault, read_fault, upstream_error

_STATUSES = {
    "overloaded": 429,
    "generation": 424,
    "incomplete_generation": 500,
    "incomplete_generation_stream": 500,
    "stream_serialization_error": 500,
    "validation": 422,
    "template_error": 422,
    "missing_template_variable": 422,
    "tool_error": 422,
}
"""The status that goes with an `error_type`, for where it arrives with another: 200 in a stream."""
_SENTENCES = {"Model is overloaded": 429, "Request failed during generation": 424, "Incomplete generation": 500}
"""The beginnings of messages that the chat route's stream says are 422, as it does of all."""
_PARAMS = {
    "max_new_tokens": "max_tokens",
    "top_n_tokens": "logprobs",
    "grammar": "response_format",
    **{
        name: name
        for name in "temperature top_p top_k typical_p repetition_penalty frequency_penalty seed stop".split()
    },
}
_NAMED = re.compile(r"^`(\w+)`")
_ROOM = re.compile(r"tokens \+ `max_new_tokens` must be <= (\d+)\. Given: (\d+) `inputs` tokens and (\d+)")
_PROMPT = re.compile(r"must have less than (\d+) tokens\. Given: (\d+)")


class _Typed(Struct):
    error_type: str = ""


_TYPED = msgspec.json.Decoder(_Typed)


class ToolCutShort(UpstreamFailed):
    """The model's tool call ends in the middle: the limit may have cut it, or the model wrote no JSON."""


class Overflow(ContextLengthExceeded):
    """`room_tokens` are left beside the prompt, where that alone would fit."""

    room_tokens: int = 0


def fault_in(status: int, body: bytes) -> GatewayError:
    """The error that *body* is: JSON in one of TGI's shapes, or text."""
    fault = read_fault(body)
    text = fault.message or ("" if body.lstrip().startswith((b"{", b"[")) else body.decode(errors="replace"))
    message = text.removeprefix("Input validation error: ")
    status = _status(fault.status or status, body, message)
    if "Failed to parse generated text" in message:
        return ToolCutShort("The model's tool call could not be read.")
    if overflow := _overflow(message):
        return overflow
    if status == 422 and "compile regex from schema" in message:
        return InvalidRequest(
            "The JSON schema is beyond what this model can be held to: use `properties` of plain types, without "
            "recursion, and fewer keywords.",
            param="response_format",
            code="unsupported_value",
        )
    named = _NAMED.match(message)
    param = _PARAMS.get(named[1]) if named else None
    return upstream_error(status, Fault(message=message, param=param))


def _status(status: int, body: bytes, message: str) -> int:
    try:
        typed = _STATUSES.get(_TYPED.decode(body).error_type)
    except msgspec.MsgspecError:
        typed = None
    return typed or next((code for start, code in _SENTENCES.items() if message.startswith(start)), status)


def _overflow(message: str) -> Overflow | None:
    if found := _ROOM.search(message):
        limit, given, asked = map(int, found.groups())
        overflow = Overflow(
            f"This model's maximum context length is {limit} tokens. However, you requested {given + asked} tokens "
            f"({given} in your prompt; {asked} for the completion). Please reduce your prompt or completion length."
        )
        overflow.room_tokens = max(limit - given, 0)
        return overflow
    if found := _PROMPT.search(message):
        limit, given = map(int, found.groups())
        return Overflow(
            f"This model's maximum context length is {limit} tokens. However, your prompt resulted in {given} tokens. "
            "Please reduce its length."
        )
    return None
