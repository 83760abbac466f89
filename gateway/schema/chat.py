"""What does `POST /v1/chat/completions` take and give?"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from gateway.errors import InvalidRequest
from gateway.schema.common import (
    Bias,
    Choices,
    Count,
    Index,
    Object,
    Penalty,
    Probability,
    Seed,
    Stop,
    StreamOptions,
    Temperature,
    Usage,
)

ToolName = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,64}$")]
Role = Literal["developer", "system", "user", "assistant", "tool", "function"]


class ContentPart(Struct, kw_only=True):
    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: Object | None = None
    input_audio: Object | None = None
    file: Object | None = None


class FunctionCall(Struct, kw_only=True):
    name: str
    arguments: str


class ToolCall(Struct, kw_only=True):
    id: str
    type: str = "function"
    function: FunctionCall | None = None
    custom: Object | None = None


class Message(Struct, kw_only=True):
    role: Role
    content: str | Annotated[list[ContentPart], Meta(min_length=1)] | None | UnsetType = UNSET
    name: str | None = None
    refusal: str | None = None
    audio: Object | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None

    @property
    def text(self) -> str:
        """The text parts joined, as a template wants them."""
        if isinstance(self.content, list):
            return "".join(part.text or "" for part in self.content)
        return self.content or ""


class Function(Struct, kw_only=True):
    name: ToolName
    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None


class Tool(Struct, kw_only=True):
    type: str
    function: Function | None = None
    custom: Object | None = None


class JSONSchema(Struct, kw_only=True):
    name: ToolName
    description: str | None = None
    schema: Object | None = None
    strict: bool | None = None


class ResponseFormat(Struct, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


class ChatRequest(Struct, kw_only=True):
    model: str
    messages: Annotated[list[Message], Meta(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    n: Choices | None = None
    stop: Stop | None = None
    seed: Seed | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: str | Object | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Object] | None = None
    function_call: str | Object | None = None
    modalities: list[str] | None = None
    audio: Object | None = None
    prediction: Object | None = None
    web_search_options: Object | None = None
    moderation: Object | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Object | None = None
    prompt_cache_retention: str | None = None

    @property
    def limit(self) -> int | None:
        """Most completion tokens of one choice."""
        return self.max_completion_tokens or self.max_tokens

    def check(self) -> None:
        """Raises InvalidRequest for what the types cannot say."""
        for index, message in enumerate(self.messages):
            _check_message(message, f"messages[{index}]")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise InvalidRequest(
                "Set either `max_tokens` or `max_completion_tokens`, not both.",
                param="max_tokens",
                code="invalid_parameter_combination",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("`top_logprobs` needs `logprobs` to be true.", param="top_logprobs")
        if self.metadata:
            _check_metadata(self.metadata)
        if self.tools or self.tool_choice or self.response_format:
            _check_tools(self)
        if self.store:
            raise InvalidRequest(
                "Completions are not stored here; leave `store` out.", param="store", code="unsupported_parameter"
            )


_WRITTEN = msgspec.json.Decoder(list[dict[str, Raw]])


def without_developers(asked: ChatRequest, messages: bytes) -> list[dict[str, Any]] | None:
    """*messages* of a request, with the role `system` where it says `developer`; None where it does so nowhere."""
    if all(message.role != "developer" for message in asked.messages):
        return None
    pairs = zip(asked.messages, _WRITTEN.decode(messages), strict=True)
    return [{**raw, "role": "system"} if message.role == "developer" else raw for message, raw in pairs]


def _check_message(message: Message, where: str) -> None:
    if message.role == "assistant":
        if not message.content and message.content != "" and not (message.tool_calls or message.function_call):
            _missing(f"{where}.content", "An assistant message without tool calls needs content.")
    elif message.content is UNSET:
        _missing(f"{where}.content", f"Missing required parameter: '{where}.content'.")
    elif message.content is None and message.role != "function":
        raise InvalidRequest(
            f"Invalid type for '{where}.content': expected a string or an array, but got null.",
            param=f"{where}.content",
            code="invalid_type",
        )
    if message.role == "tool" and message.tool_call_id is None:
        _missing(f"{where}.tool_call_id", f"Missing required parameter: '{where}.tool_call_id'.")
    if isinstance(message.content, list):
        for index, part in enumerate(message.content):
            _check_part(part, PARTS.get(message.role, TEXT_ONLY), f"{where}.content[{index}]")
    for index, call in enumerate(message.tool_calls or ()):
        if call.type == "function" and call.function is None:
            param = f"{where}.tool_calls[{index}].function"
            _missing(param, f"Missing required parameter: '{param}'.")


TEXT_ONLY = ("text",)
PARTS = {"user": ("text", "image_url", "input_audio", "file"), "assistant": ("text", "refusal")}
"""The types of content parts that a role may have; a part's content is the member named like its type."""


def _check_part(part: ContentPart, allowed: tuple[str, ...], where: str) -> None:
    if part.type not in allowed:
        supported = ", ".join(f"'{name}'" for name in allowed)
        raise InvalidRequest(
            f"Invalid value for '{where}.type'. Supported values are: {supported}.",
            param=f"{where}.type",
            code="invalid_value",
        )
    if getattr(part, part.type) is None:
        _missing(f"{where}.{part.type}", f"Missing required parameter: '{where}.{part.type}'.")


def _check_metadata(metadata: dict[str, str]) -> None:
    if len(metadata) > 16 or any(len(key) > 64 or len(value) > 512 for key, value in metadata.items()):
        raise InvalidRequest(
            "`metadata` may have 16 pairs, with keys of up to 64 and values of up to 512 characters.",
            param="metadata",
            code="invalid_value",
        )


def _check_tools(request: "ChatRequest") -> None:
    tools = request.tools or []
    for index, tool in enumerate(tools):
        if tool.type == "function" and tool.function is None:
            _missing(f"tools[{index}].function", f"Missing required parameter: 'tools[{index}].function'.")
    if request.tool_choice is not None:
        _check_tool_choice(request.tool_choice, tools)
    format = request.response_format
    if format is not None and format.type == "json_schema" and format.json_schema is None:
        _missing("response_format.json_schema", "Missing required parameter: 'response_format.json_schema'.")


def _check_tool_choice(choice: str | Object, tools: list[Tool]) -> None:
    mode = choice if isinstance(choice, str) else choice.get("type")
    modes = ("none", "auto", "required") if isinstance(choice, str) else ("function", "allowed_tools", "custom")
    if mode not in modes:
        supported = ", ".join(f"'{name}'" for name in modes)
        raise InvalidRequest(
            f"Invalid value for 'tool_choice'. Supported values are: {supported}.",
            param="tool_choice",
            code="invalid_value",
        )
    if not tools and mode not in ("none", "auto"):
        raise InvalidRequest("`tool_choice` is only allowed when `tools` are given.", param="tool_choice")
    if isinstance(choice, str) or mode != "function":
        return
    if _named(choice) not in [tool.function.name for tool in tools if tool.function is not None]:
        raise InvalidRequest(
            "`tool_choice` names a function that is not in `tools`.", param="tool_choice", code="invalid_value"
        )


def _named(choice: Object) -> Any:
    function = choice.get("function")
    return function.get("name") if isinstance(function, dict) else None


def _missing(param: str, message: str) -> None:
    raise InvalidRequest(message, param=param, code="missing_required_parameter")


class AnswerMessage(Struct, kw_only=True):
    """`reasoning_content` is what clients get, as from DeepSeek and most; `reasoning`, what some servers call it."""

    role: str | None = None
    content: str | None | UnsetType = UNSET
    refusal: str | None | UnsetType = UNSET
    reasoning_content: str | None | UnsetType = UNSET
    reasoning: str | None | UnsetType = UNSET
    tool_calls: list[Object] | None | UnsetType = UNSET


class ChatChoice(Struct, kw_only=True):
    message: AnswerMessage
    index: Index | UnsetType = UNSET
    finish_reason: str | None = None
    logprobs: Object | None | UnsetType = UNSET


class ChatCompletion(Struct, kw_only=True):
    choices: list[ChatChoice]
    usage: Usage | None | UnsetType = UNSET
    error: Any = UNSET


class Delta(Struct, kw_only=True, omit_defaults=True, gc=False):
    role: str | None = None
    content: str | None | UnsetType = UNSET
    refusal: str | None | UnsetType = UNSET
    reasoning_content: str | None | UnsetType = UNSET
    reasoning: str | None | UnsetType = UNSET
    tool_calls: list[Object] | None | UnsetType = UNSET


class ChunkChoice(Struct, kw_only=True, gc=False):
    delta: Delta
    index: Index | UnsetType = UNSET
    finish_reason: str | None | UnsetType = UNSET
    logprobs: Object | None | UnsetType = UNSET


class ChatChunk(Struct, kw_only=True, gc=False):
    choices: list[ChunkChoice]
    usage: Usage | None | UnsetType = UNSET
    obfuscation: Any = UNSET
    error: Any = UNSET
