"""What does a conversation, with its tools and its schema, look like to TGI's templates and grammars?"""

from typing import Any

from adapters.tgi.asking import refuse
from adapters.tgi.options import Options
from gateway.errors import InvalidRequest
from gateway.schema.chat import ChatRequest, ContentPart, Message

NOTHING = {"type": "object", "properties": {}}
"""The parameters of a function without any: TGI insists on some."""
NOISE = frozenset("$schema $id title description strict examples default".split())
"""What a schema says to people."""
SCHEMAS_BY_NAME = frozenset("properties patternProperties $defs definitions".split())
LITERALS = frozenset({"enum", "const"})


def written(chat: ChatRequest, options: Options) -> list[dict[str, Any]]:
    """The messages; an assistant's words beside its calls become a message of their own, since TGI keeps only one."""
    messages = []
    for index, message in enumerate(chat.messages):
        where = f"messages[{index}]"
        refuse(f"{where}.audio", message.audio)
        refuse(f"{where}.function_call", message.function_call)
        content = _content(message, where, options)
        if message.tool_calls:
            if content:
                messages.append({"role": "assistant", "content": content})
            messages.append({"role": "assistant", "tool_calls": _calls(message, where)})
            continue
        role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
        plain: dict[str, Any] = {"role": role, "content": content}
        if message.tool_call_id is not None:
            plain["tool_call_id"] = message.tool_call_id
        messages.append(plain)
    return messages


def _content(message: Message, where: str, options: Options) -> Any:
    """A string, which every version takes; a list only where there are images."""
    if not isinstance(message.content, list):
        return message.content or ""
    parts = [_part(part, f"{where}.content[{index}]", options) for index, part in enumerate(message.content)]
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _part(part: ContentPart, where: str, options: Options) -> dict[str, Any]:
    if part.type in ("text", "refusal"):
        return {"type": "text", "text": part.text or part.refusal or ""}
    refuse(f"{where}.{part.type}", part.type != "image_url" or not options.vision)
    url = (part.image_url or {}).get("url")
    if not isinstance(url, str):
        raise InvalidRequest(f"Missing required parameter: '{where}.image_url.url'.", param=f"{where}.image_url.url")
    refuse(f"{where}.image_url", not (options.fetch_images or url.startswith("data:")), " Send it as a `data:` URL.")
    return {"type": "image_url", "image_url": {"url": url}}


def _calls(message: Message, where: str) -> list[dict[str, Any]]:
    calls = []
    for index, call in enumerate(message.tool_calls or ()):
        refuse(f"{where}.tool_calls[{index}].custom", call.function is None)
        if call.function is not None:
            function = {"name": call.function.name, "arguments": call.function.arguments}
            calls.append({"id": call.id, "type": "function", "function": function})
    return calls


def tools_of(chat: ChatRequest) -> list[dict[str, Any]]:
    """Empty where none may be used."""
    if chat.tool_choice == "none":
        return []
    tools = []
    for index, tool in enumerate(chat.tools or ()):
        refuse(f"tools[{index}].custom", tool.function is None)
        if tool.function is not None:
            function: dict[str, Any] = {"name": tool.function.name}
            if tool.function.description is not None:
                function["description"] = tool.function.description
            tools.append(
                {"type": "function", "function": {**function, "parameters": tool.function.parameters or NOTHING}}
            )
    return tools


def tool_choice_of(chat: ChatRequest) -> Any:
    choice = chat.tool_choice
    if not isinstance(choice, dict):
        return choice or "auto"
    refuse("tool_choice", choice.get("type") != "function", " Use 'auto', 'required', or name a function.")
    return {"type": "function", "function": {"name": choice["function"]["name"]}}


def grammar_of(chat: ChatRequest) -> dict[str, Any] | None:
    """The grammar of `response_format`; None for text."""
    format = chat.response_format
    if format is None or format.type == "text":
        return None
    refuse("response_format", format.type == "json_object", " Use the type 'json_schema', with `properties`.")
    refuse("response_format", bool(tools_of(chat)), " It cannot go together with `tools`.")
    schema = format.json_schema.schema if format.json_schema is not None else None
    if schema is None or schema.get("type", "object") != "object" or not ("properties" in schema or "type" in schema):
        raise InvalidRequest(
            "This model can only be held to a schema of the type 'object', with its `properties` at the root.",
            param="response_format.json_schema.schema",
            code="unsupported_value",
        )
    return {"type": "json", "value": {**_quiet(schema), "properties": _quiet_each(schema.get("properties") or {})}}


def _quiet(schema: Any) -> Any:
    """A schema without what it says to people, which TGI's compiler may stumble over; literals stay as they are."""
    if isinstance(schema, list):
        return [_quiet(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: value if name in LITERALS else _quiet_each(value) if name in SCHEMAS_BY_NAME else _quiet(value)
        for name, value in schema.items()
        if name not in NOISE
    }


def _quiet_each(schemas: Any) -> Any:
    """Those under names of the user's own, which may be `title`."""
    return {name: _quiet(value) for name, value in schemas.items()} if isinstance(schemas, dict) else schemas
