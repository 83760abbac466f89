"""What do engines leave out of OpenAI's answers, or say in other words?"""

from msgspec import UNSET

from gateway.errors import UpstreamFailed
from gateway.schema.chat import AnswerMessage, Delta
from gateway.schema.common import Object

FINISHED = frozenset("stop length tool_calls content_filter function_call".split())


def reason_of(reason: str) -> str | None:
    """The finish reason; raises UpstreamFailed for an answer that was broken off."""
    if not reason:
        return None
    if reason in ("abort", "error"):
        raise UpstreamFailed("The upstream aborted this generation.")
    return reason if reason in FINISHED else "stop"  # such as `repetition`


def is_well(delta: Delta) -> bool:
    """Whether there is nothing in it that engines say differently."""
    return delta.tool_calls is UNSET and delta.reasoning is UNSET


def mend_message(message: AnswerMessage) -> None:
    message.reasoning_content = message.reasoning_content or message.reasoning or UNSET
    message.reasoning = UNSET
    message.refusal = message.refusal or None
    message.tool_calls = [_tool_call(call) for call in message.tool_calls or ()] or UNSET
    if message.tool_calls and not message.content:
        message.content = None


def mend_delta(delta: Delta, index: int, begun: set[tuple[int, int]]) -> None:
    """*begun* are the calls, each by its choice and its own index, whose name the client has."""
    if delta.tool_calls is UNSET and delta.reasoning is UNSET and delta.reasoning_content is UNSET:
        return
    delta.reasoning_content = delta.reasoning_content or delta.reasoning or UNSET
    delta.reasoning = UNSET
    delta.tool_calls = [_tool_delta(call, index, begun) for call in delta.tool_calls or ()] or UNSET  # `[]` once
    if delta.content is None and (delta.tool_calls or delta.reasoning_content):
        delta.content = UNSET


def _tool_delta(call: Object, index: int, begun: set[tuple[int, int]]) -> Object:
    """A call begins with id, type, name and empty arguments, all of them once; then come arguments alone."""
    which = (index, call.get("index") or 0)
    told = _tool_call(call)
    if which in begun:
        return {"index": which[1], "function": {"arguments": told["function"]["arguments"]}}
    if "name" in told["function"]:
        begun.add(which)
    return {"index": which[1], **told}


def _tool_call(call: Object) -> Object:
    function = call.get("function") or {}
    named = {"name": function["name"]} if function.get("name") else {}
    known = {name: call[name] for name in ("id", "type") if call.get(name)}
    return {**known, "function": {**named, "arguments": function.get("arguments") or ""}}
