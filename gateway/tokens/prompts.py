"""What is a prompt made of, as far as that makes tokens?"""

from collections.abc import Iterator
from typing import Any

from msgspec import Struct

from gateway.call import Call
from gateway.schema.chat import ChatRequest, ContentPart, FunctionCall, Message
from gateway.schema.common import Object
from gateway.schema.completions import are_ids
from gateway.schema.endpoint import CHAT, EMBEDDINGS
from gateway.schema.payload import Payload

DOCUMENTS = ("tools", "functions", "response_format")
EXTENSIONS = ("documents", "tool_prompt", "chat_template_kwargs")
"""Members beyond OpenAI's that some template writes into the prompt."""


class Size(Struct, gc=False):
    """
    What a prompt is made of.

    `text` and `documents` in bytes of UTF-8; `ids` are tokens already; `audio` is in characters of base64.
    """

    text: int = 0
    documents: int = 0
    messages: int = 0
    ids: int = 0
    images: int = 0
    audio: int = 0


def size_of(call: Call) -> Size:
    size = Size()
    request = call.request
    if call.endpoint is CHAT:
        _measure_chat(size, request)
    else:
        asked = request.value
        _measure_texts(size, asked.input if call.endpoint is EMBEDDINGS else asked.prompt)
        size.text += _utf8(getattr(asked, "suffix", None))
    if call.unknown:
        fields = request.fields()
        size.documents += sum(len(bytes(fields[name])) for name in EXTENSIONS if name in fields)
    return size


def _measure_chat(size: Size, request: Payload[ChatRequest]) -> None:
    asked = request.value
    size.messages = len(asked.messages)
    text = 0
    for message in asked.messages:
        content = message.content
        if isinstance(content, str):
            text += len(content) if content.isascii() else _utf8(content)
        elif content:
            for part in content:
                _measure_part(size, part)
        if message.name or message.tool_calls or message.tool_call_id or message.function_call or message.refusal:
            text += sum(map(_utf8, _beside(message)))
    size.text += text
    if asked.tools or asked.functions or asked.response_format:
        fields = request.fields()
        size.documents += sum(len(bytes(fields[name])) for name in DOCUMENTS if name in fields)


def _measure_part(size: Size, part: ContentPart) -> None:
    size.text += _utf8(part.text) + _utf8(part.refusal)
    size.images += part.image_url is not None
    if part.input_audio is not None:
        size.audio += _length(part.input_audio, "data")
    if part.file is not None:  # its text and its pages: no more is known of it
        size.text += _length(part.file, "file_data")


def _length(of: Object, member: str) -> int:
    value = of.get(member)
    return len(value) if isinstance(value, str) else 0


def _measure_texts(size: Size, prompt: str | list[Any] | None) -> None:
    if not isinstance(prompt, list):
        size.messages = 1
        size.text = _utf8(prompt)
    elif are_ids(prompt):
        size.ids = len(prompt)
    elif isinstance(prompt[0], list):
        size.ids = sum(map(len, prompt))
    else:
        size.messages = len(prompt)
        size.text = sum(map(_utf8, prompt))


def _beside(message: Message) -> Iterator[str]:
    """The texts of a message beside its content."""
    yield from (text for text in (message.name, message.refusal, message.tool_call_id) if text)
    calls: list[FunctionCall | Object | None] = [message.function_call]
    for call in message.tool_calls or ():
        yield call.id
        calls += (call.function, call.custom)
    for function in calls:
        if isinstance(function, FunctionCall):
            yield from (function.name, function.arguments)
        elif function is not None:
            yield from (value for value in function.values() if isinstance(value, str))


def _utf8(text: str | None) -> int:
    if not text:
        return 0
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def texts_of(call: Call) -> Iterator[str]:
    """All that is text in a prompt."""
    asked = call.request.value
    if call.endpoint is CHAT:
        for message in asked.messages:
            yield message.role
            yield message.text
            yield from _beside(message)
    else:
        prompt = asked.input if call.endpoint is EMBEDDINGS else asked.prompt
        yield from prompt if isinstance(prompt, list) else [prompt or ""]
        yield getattr(asked, "suffix", None) or ""
    if call.unknown or (call.endpoint is CHAT and (asked.tools or asked.functions or asked.response_format)):
        fields = call.request.fields()
        yield from (bytes(fields[name]).decode() for name in (*DOCUMENTS, *EXTENSIONS) if name in fields)
