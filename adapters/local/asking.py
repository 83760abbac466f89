"""What is asked of a model in this machine, and what can it not honour?"""

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from adapters.local.frames import Generate, Sampling
from gateway.errors import InvalidRequest
from gateway.schema.chat import ChatRequest, ContentPart, FunctionCall, Message
from gateway.schema.common import Stop
from gateway.schema.completions import CompletionRequest, are_ids
from gateway.schema.payload import Payload
from gateway.schema.reading import explain

EXTENSIONS = frozenset({"top_k", "min_p"})


class _Extensions(Struct):
    """`top_k` -1 is off too, as in vLLM."""

    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None


_EXTENSIONS = msgspec.json.Decoder(_Extensions)


def ask_chat(request: Payload[ChatRequest]) -> Generate:
    """Raises InvalidRequest for what a local model does not do."""
    chat = request.value
    _refuse_in_chat(chat)
    return Generate(
        id=0,
        messages=[_message(message, f"messages[{index}]") for index, message in enumerate(chat.messages)],
        n=chat.n or 1,
        sampling=_sampling(request),
        stop=_stops(chat.stop),
        max_tokens=chat.limit,
    )


def ask_completion(request: Payload[CompletionRequest]) -> Generate:
    """Raises InvalidRequest for what a local model does not do."""
    completion = request.value
    _refuse("suffix", completion.suffix)
    _refuse("best_of", (completion.best_of or 1) > 1)
    _refuse("logprobs", completion.logprobs is not None)
    prompt = completion.prompt
    return Generate(
        id=0,
        prompts=prompt if isinstance(prompt, list) and not are_ids(prompt) else [prompt],
        n=completion.n or 1,
        sampling=_sampling(request),
        stop=_stops(completion.stop),
        max_tokens=completion.limit,
        echo=bool(completion.echo),
    )


def _refuse_in_chat(chat: ChatRequest) -> None:
    _refuse("tools", chat.tools and chat.tool_choice != "none")
    _refuse("functions", chat.functions and chat.function_call != "none")
    _refuse("response_format", chat.response_format is not None and chat.response_format.type != "text")
    _refuse("logprobs", chat.logprobs)
    _refuse("top_logprobs", chat.top_logprobs)
    _refuse("modalities", set(chat.modalities or ()) - {"text"})
    _refuse("audio", chat.audio)
    _refuse("web_search_options", chat.web_search_options is not None)
    _refuse("moderation", chat.moderation is not None)
    _refuse("reasoning_effort", chat.reasoning_effort not in (None, "none"))


def _refuse(param: str, asked: object) -> None:
    if asked:
        name = param.rpartition(".")[2]
        raise InvalidRequest(f"'{name}' is not supported by this model.", param=param, code="unsupported_parameter")


def _sampling(request: Payload[Any]) -> Sampling:
    asked = request.value
    try:
        extensions = _EXTENSIONS.decode(request.wire)
    except msgspec.ValidationError as exc:
        raise explain(str(exc)) from None
    return Sampling(
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=max(extensions.top_k or 0, 0),
        min_p=extensions.min_p or 0.0,
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        logit_bias={_token_id(key): value for key, value in (asked.logit_bias or {}).items()},
        seed=asked.seed,
    )


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 12):
        raise InvalidRequest(
            f"Invalid key in 'logit_bias': '{key[:20]}' is not a token id.", param="logit_bias", code="invalid_value"
        )
    return int(key)


def _stops(stop: Stop | None) -> list[str]:
    return [stop] if isinstance(stop, str) else stop or []


def _message(message: Message, where: str) -> dict[str, Any]:
    """The message as chat templates take it: content a string, the arguments of calls an object."""
    plain: dict[str, Any] = {"role": "tool" if message.role == "function" else message.role}
    if isinstance(message.content, list):
        plain["content"] = "".join(_text(part, f"{where}.content[{i}]") for i, part in enumerate(message.content))
    elif isinstance(message.content, str):
        plain["content"] = message.content
    _refuse(f"{where}.audio", message.audio)
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    calls = [_call(call.function, call.id) for call in message.tool_calls or () if call.function is not None]
    if message.function_call is not None:
        calls.append(_call(message.function_call, message.function_call.name))
    if calls:
        plain["tool_calls"] = calls
    return plain


def _text(part: ContentPart, where: str) -> str:
    if part.type not in ("text", "refusal"):
        raise InvalidRequest(
            f"Invalid content type '{part.type}': only text is supported.", param=where, code="unsupported_parameter"
        )
    return part.text or part.refusal or ""


def _call(function: FunctionCall, id: str) -> dict[str, Any]:
    try:
        arguments = msgspec.json.decode(function.arguments)
    except (msgspec.DecodeError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        arguments = function.arguments  # what a model once wrote need not be an object
    return {"id": id, "type": "function", "function": {"name": function.name, "arguments": arguments}}
