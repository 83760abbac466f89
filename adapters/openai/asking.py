"""What is asked of a server that speaks OpenAI's dialect, and what can it not honour?"""

from typing import Any

from msgspec.structs import replace

from adapters.openai.options import Switches
from gateway.errors import InvalidRequest
from gateway.schema.chat import ChatRequest, without_developers
from gateway.schema.common import INT64, Object
from gateway.schema.completions import DEFAULT_MAX_TOKENS
from gateway.schema.endpoint import CHAT, Endpoint
from gateway.schema.payload import Payload

INCLUDE_USAGE = {"include_usage": True}
MAX_EXCHANGES = 128
HINTS = frozenset("service_tier verbosity modalities".split())
"""What only OpenAI's own servers take, and what a server that does not know it may refuse."""


class Alone(Payload[Any]):
    """One choice, asked for by itself: `value` asks for it alone, `wire` is the client's whole request."""

    index: int
    prompt: int


def split(request: Payload[Any], given: Switches) -> list[Alone]:
    """The requests for single choices that this one must be; none if the server can do it as it is."""
    asked = request.value
    prompt: Any = getattr(asked, "prompt", None)
    many = isinstance(prompt, list) and not given.prompts
    if many and not all(isinstance(text, str) for text in prompt):
        says = "Token ids are not supported by this model."
        raise InvalidRequest(says, param="prompt", code="unsupported_value")
    prompts: list[Any] = prompt if many else [prompt]
    each = (asked.n or 1) if not given.n else 1
    if len(prompts) * each == 1 and not many:
        return []
    if len(prompts) * each > MAX_EXCHANGES:
        says = f"This model gives up to {MAX_EXCHANGES} choices at once."
        raise InvalidRequest(says, param="prompt" if many else "n", code="invalid_value")
    exchanges: list[Alone] = []
    for number, text in enumerate(prompts):
        for copy in range(each):
            seed = None if asked.seed is None else (asked.seed + copy + INT64) % (2 * INT64) - INT64
            changes = {"seed": seed} | ({"n": None} if not given.n else {}) | ({"prompt": text} if many else {})
            exchanges.append(Alone(replace(asked, **changes), request.wire, index=len(exchanges), prompt=number))
    return exchanges


def write(fields: Object, endpoint: Endpoint, request: Payload[Any], given: Switches) -> None:
    """Makes of *fields*, as the client gave them, what this server understands; raises InvalidRequest."""
    asked = request.value
    if asked.stream and given.stream_options:
        fields["stream_options"] = INCLUDE_USAGE
    else:
        fields.pop("stream_options", None)
    for name in given.refuse:
        if name in fields:
            if _asks(name, asked):
                _refuse(name, f"'{name}'")
            if name == "tool_choice" and asked.tool_choice == "none":  # it would show them to the model all the same
                fields.pop("tools", None)
            del fields[name]
    for name, value in given.defaults.items():
        fields.setdefault(name, value)
    if not asked.stop:
        fields.pop("stop", None)  # an empty one is too much for some
    if not given.keep_extras:
        for name in HINTS & fields.keys():
            del fields[name]
    if isinstance(request, Alone):
        _single_out(fields, request, given)
    if endpoint is CHAT:
        _write_chat(fields, asked, given)
    elif asked.max_tokens == 0 and "echo" in given.refuse:  # who cannot give back the prompt goes on behind it
        _refuse("max_tokens", "A limit of 0")
    else:
        fields.setdefault("max_tokens", DEFAULT_MAX_TOKENS)


def _single_out(fields: Object, alone: Alone, given: Switches) -> None:
    if not given.n:
        fields.pop("n", None)
    if alone.value.seed is not None:
        fields["seed"] = alone.value.seed
    if "prompt" in fields:
        fields["prompt"] = alone.value.prompt


def _write_chat(fields: Object, asked: ChatRequest, given: Switches) -> None:
    if not given.custom_tools:
        _check_tools(asked)
    if given.limit != "as_given" and asked.limit is not None:
        fields.pop("max_tokens", None)
        fields.pop("max_completion_tokens", None)
        fields[given.limit] = asked.limit
    if not given.developer_role and (messages := without_developers(asked, fields["messages"])):
        fields["messages"] = messages
    if not given.fetch_media:
        for position, message in enumerate(asked.messages):
            if isinstance(message.content, list):
                for place, part in enumerate(message.content):
                    if part.image_url is not None and not str(part.image_url.get("url")).startswith("data:"):
                        where = f"messages[{position}].content[{place}].image_url"
                        _refuse(where, "An image that is not a data: URL")


def _check_tools(asked: ChatRequest) -> None:
    if any(tool.type != "function" for tool in asked.tools or ()):
        _refuse("tools", "A custom tool")
    if isinstance(asked.tool_choice, dict) and asked.tool_choice.get("type") != "function":
        _refuse("tool_choice", "A choice of some tools")


def _asks(name: str, asked: Any) -> bool:
    """Whether a parameter asks for anything but what there is without it."""
    value: Any = getattr(asked, name, True)
    if name == "logprobs":
        return value is not None and value is not False
    if name == "best_of":
        return (value or 1) > 1
    if name == "response_format":
        return bool(value.type != "text")
    if name == "tool_choice":
        return value not in ("none", "auto")
    if name == "parallel_tool_calls":
        return value is False and bool(asked.tools)
    if name == "modalities":
        return bool(set(value) - {"text"})
    if name in ("moderation", "web_search_options"):  # {} asks for it, too
        return value is not None
    return bool(value)


def _refuse(param: str, what: str) -> None:
    raise InvalidRequest(f"{what} is not supported by this model.", param=param, code="unsupported_parameter")
