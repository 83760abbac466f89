"""How many tokens is this, before anyone tells us?"""

import asyncio
import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from gateway.adapter import UpstreamFacts
from gateway.call import Call, Estimate, Heard
from gateway.errors import ContextLengthExceeded, GatewayError
from gateway.models import Target
from gateway.schema.chat import ChatRequest, ContentPart, FunctionCall, Message
from gateway.schema.common import Object, Usage
from gateway.schema.completions import are_ids
from gateway.schema.endpoint import CHAT, COMPLETIONS, EMBEDDINGS
from gateway.schema.payload import Payload
from gateway.settings import Model, Settings

if TYPE_CHECKING:
    import tiktoken

MESSAGE_BYTES = 16
"""What a chat template writes around a message, such as `<|im_start|>user`: it makes tokens like any text."""
SURPLUS_TOKENS = 256
"""What a template adds to a prompt as a whole, until one is seen that adds more."""
MOST_SURPLUS_TOKENS = 65_536

FIRST_RATIO = 0.3
FIRST_WEIGHT = 200.0
RATIOS = (0.01, 2.0)
"""Tokens per byte, until a model has shown its own, and as how many bytes of it that weighs; and the bounds of it."""
FIRST_IMAGE_TOKENS = 1024
IMAGE_TOKENS = (16, 16_384)
"""Of one image: from the smallest in low detail to the most that Qwen's and OpenAI's models make of one."""
AUDIO_BYTES = 512
"""Base64 characters of an audio for a token: between those of PCM, which has more, and of MP3. At worst, a quarter."""

MEMORY = 0.98
"""How much of the past weighs on when a request is over: half of it is forgotten after 34."""
HEAVIEST_BYTES = 16_384
"""A text as long as this weighs as much as any longer one."""
SHORT_BYTES = 512
AROUND = (-512, 4096)
"""Up to here, prompts teach how many tokens a template adds to each, in these bounds; longer ones, what a byte is."""
PAST_OUTPUTS = 256
FEWEST_OUTPUTS = 20
RESTED_OUTPUTS = 8
"""Past outputs that are kept; that are needed to say something; and after which it is said anew."""

MAX_COUNTED_BYTES = 256 * 1024
MOST_WAITING = 64
COUNTING_S = 2.0
"""The longest text and the most requests that an encoding counts; and how long an upstream's count may take."""
TOKENS_A_MESSAGE = 3
TOKENS_AN_ANSWER = 3
"""What OpenAI's models add around a message, and before their answer."""
DOCUMENTS = ("tools", "functions", "response_format")
EXTENSIONS = ("documents", "tool_prompt", "chat_template_kwargs")
"""Members beyond OpenAI's that some template writes into the prompt."""

logger = logging.getLogger("suiron.tokens")


class Tokens:
    """
    Estimates for each public model, better with each answer.

    What is learned is this process's, and starts anew with it.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings.models
        self._models = {name: _Learned(model) for name, model in settings.models.items()}
        self._encodings = _Encodings({model.encoding for model in settings.models.values() if model.encoding})

    def load(self) -> None:
        """Begins to load the encodings that models name, and does not wait for it."""
        self._encodings.load()

    async def loaded(self) -> None:
        """Waits until it is known which encodings there are."""
        await self._encodings.loaded()

    def close(self) -> None:
        self._encodings.close()

    def probed(self, upstream: str, facts: UpstreamFacts) -> None:
        """Takes the contexts that an upstream tells, for models whose configuration says none: the longest of each."""
        told = {model.id: model.context_tokens for model in facts.models if model.context_tokens}
        for name, model in self._settings.items():
            if model.context_tokens is None:
                learned = self._models[name]
                names = [target.model or name for target in model.targets if target.upstream == upstream]
                if len(facts.models) == 1 and names:  # whatever it is called there
                    names = [facts.models[0].id]
                contexts = [told[each] for each in names if each in told]
                learned.context_tokens = max([learned.context_tokens or 0, *contexts]) or None

    def check(self, call: Call) -> None:
        """
        Raises ContextLengthExceeded for a completion whose limit alone is beyond the model's context, as OpenAI does.

        In a chat such a limit only means "as much as there is room for".
        """
        context, limit = self._of(call).context_tokens, getattr(call.request.value, "max_tokens", None)
        if call.endpoint is COMPLETIONS and context is not None and limit is not None and limit > context:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {context} tokens. However, you requested {limit} completion "
                "tokens. Please reduce their number.",
                param="max_tokens",
            )

    async def estimate(self, call: Call, targets: Sequence[Target], *, strict: bool = False) -> Estimate:
        """
        Of the call's prompt, also written to `call.estimate`.

        It takes microseconds, unless the model names an encoding, which counts in a thread; or under *strict*, where
        the first of *targets* that can count its tokens is asked. Never raises.
        """
        learned = self._of(call)
        estimate = self.prompt(call)
        if not estimate.exact and estimate.text_bytes <= MAX_COUNTED_BYTES:
            if learned.encoding is not None and estimate.is_text:
                estimate = await self._encodings.count(learned.encoding, call, estimate)
            if strict and not estimate.exact:
                estimate = await _asked(call, targets, estimate)
        call.estimate = estimate
        return estimate

    def prompt(self, call: Call) -> Estimate:
        """By size alone. Also written to `call.estimate`."""
        size = _size(call)
        learned = self._of(call)
        call.estimate = estimate = learned.estimate(size)
        return estimate

    def expected_output(self, call: Call, *, strict: bool = False) -> int:
        """
        Tokens that the answer is expected to have, over all its choices: no more than the request's limit and the
        context allow. Under *strict*, the most it can have if a limit was set. After `estimate`.
        """
        if call.endpoint is EMBEDDINGS:
            return 0
        asked, learned, estimate = call.request.value, self._of(call), call.estimate
        prompts = _prompts(call)
        each = max(asked.n or 1, getattr(asked, "best_of", None) or 1)
        limit: int | None = asked.limit
        expected = (learned.usual_output() if limit is None else limit) * each * prompts
        if learned.context_tokens is None or estimate is None:
            return expected
        least = estimate.tokens if estimate.exact or not strict else prompts
        return min(expected, max(0, learned.context_tokens * prompts - least) * each)

    def generated(self, call: Call) -> int:
        """Tokens of the answer so far, with our own count of what no upstream has counted yet."""
        counted = 0 if call.usage is None else call.usage.completion_tokens
        return max(0, counted) + self._of(call).uncounted(call.heard)

    def settle(self, call: Call) -> None:
        """
        Completes `call.usage` where upstreams did not count all that they gave, and learns where they did.

        Once, when the call is over.
        """
        usage, completed = call.usage, call.outcome == "completed" and call.error is None
        if usage is None or call.heard.pieces or not (completed or usage.prompt_tokens):
            call.usage = self._reckoned(call)
            call.reckoned = call.usage is not None
        elif completed and call.attempts:  # from the cache, it would be learned again and again
            self._of(call).learn(call, usage)

    def _reckoned(self, call: Call) -> Usage | None:
        """What was used, with our own count of what nobody counted; None where nothing was."""
        if call.first_at is None and (call.error is not None or not call.attempts):
            return None
        usage = call.usage
        estimate = call.estimate or self.prompt(call)
        prompt = (
            estimate.tokens if usage is None else usage.prompt_tokens or estimate.tokens
        )  # TGI counts it at the end
        completion = self.generated(call)
        counted = usage or Usage(prompt_tokens=prompt)
        return replace(counted, prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)

    def _of(self, call: Call) -> "_Learned":
        return self._models[call.request.value.model]


class _Size:
    """
    What a prompt is made of.

    `text` and `documents` in bytes of UTF-8; `ids` are tokens already; `audio` is in characters of base64.
    """

    __slots__ = ("audio", "documents", "ids", "images", "messages", "text")

    def __init__(self) -> None:
        self.text = self.documents = self.messages = self.ids = self.images = self.audio = 0


class _Learned:
    """What past answers of one public model have taught."""

    __slots__ = (
        "_around",
        "_bytes",
        "_default_output",
        "_outputs",
        "_said_bytes",
        "_said_tokens",
        "_shorts",
        "_since",
        "_tokens",
        "_usual",
        "context_tokens",
        "encoding",
        "image_tokens",
        "surplus",
    )

    def __init__(self, model: Model) -> None:
        self.context_tokens = model.context_tokens
        self.encoding = model.encoding
        self.surplus = SURPLUS_TOKENS
        self.image_tokens = float(FIRST_IMAGE_TOKENS)
        self._around = self._shorts = 0.0
        self._bytes, self._tokens = FIRST_WEIGHT, FIRST_WEIGHT * FIRST_RATIO
        self._said_bytes, self._said_tokens = FIRST_WEIGHT, FIRST_WEIGHT * FIRST_RATIO
        self._default_output = self._usual = model.default_output_tokens
        self._outputs = deque[int](maxlen=PAST_OUTPUTS)
        self._since = 0

    @property
    def ratio(self) -> float:
        """Tokens per byte of a prompt."""
        return _bounded(self._tokens / self._bytes, RATIOS)

    def estimate(self, size: _Size) -> Estimate:
        text = size.text + size.documents + size.messages * MESSAGE_BYTES
        if not text and size.ids:
            return Estimate(size.ids, size.ids, exact=True)
        media = round(size.images * self.image_tokens) + size.audio // AUDIO_BYTES
        most_media = size.images * IMAGE_TOKENS[1] + size.audio * 4 // AUDIO_BYTES
        return Estimate(
            max(1, round(text * self.ratio + self._around) + size.ids + media),
            text + size.documents + size.ids + most_media + self.surplus,
            text_bytes=text,
            images=size.images,
            is_text=not (size.ids or size.images or size.audio),
        )

    def usual_output(self) -> int:
        """Tokens that 19 of 20 choices do not exceed, of those that nothing but the model itself has ended."""
        return self._usual

    def uncounted(self, heard: Heard) -> int:
        """Tokens of what was heard and not counted: each piece is at least one."""
        ratio = _bounded(self._said_tokens / self._said_bytes, RATIOS)
        return max(heard.pieces, round(heard.text_bytes * ratio))

    def learn(self, call: Call, usage: Usage) -> None:
        estimate, told = call.estimate, usage.prompt_tokens
        if estimate is not None and 0 < told <= 2**31:
            if estimate.is_text:
                self._learn_text(estimate, told)
            elif estimate.images and estimate.text_bytes:
                seen = (told - self._around - estimate.text_bytes * self.ratio) / estimate.images
                self.image_tokens += (_bounded(seen, IMAGE_TOKENS) - self.image_tokens) * (1 - MEMORY)
        if call.endpoint is not EMBEDDINGS and 0 < usage.completion_tokens <= 2**31:
            self._learn_output(call, usage.completion_tokens)

    def _learn_text(self, estimate: Estimate, told: int) -> None:
        size = estimate.text_bytes
        if size <= SHORT_BYTES:
            seen = _bounded(told - size * self.ratio, AROUND)
            self._shorts = self._shorts * MEMORY + 1
            self._around += (seen - self._around) / self._shorts
        else:
            weight = min(1.0, HEAVIEST_BYTES / size)
            self._bytes = self._bytes * MEMORY + size * weight
            self._tokens = self._tokens * MEMORY + max(0, told - self._around) * weight
        if told > estimate.upper_bound and not estimate.exact:
            self.surplus = min(self.surplus + told - estimate.upper_bound, MOST_SURPLUS_TOKENS)

    def _learn_output(self, call: Call, told: int) -> None:
        if call.heard.counted_bytes:
            weight = min(1.0, HEAVIEST_BYTES / call.heard.counted_bytes)
            self._said_bytes = self._said_bytes * MEMORY + call.heard.counted_bytes * weight
            self._said_tokens = self._said_tokens * MEMORY + told * weight
        if call.request.value.limit is not None and call.output_cap is None:
            return
        each = math.ceil(told / (call.request.value.n or 1))
        if call.output_cap is not None and each >= call.output_cap:
            each *= 2  # who knows how long it would have been: caps grow until they seldom cut
        self._outputs.append(each)
        self._since += 1
        if len(self._outputs) >= FEWEST_OUTPUTS and self._since >= RESTED_OUTPUTS:
            self._since = 0
            self._usual = sorted(self._outputs)[math.ceil(len(self._outputs) * 0.95) - 1]


def _bounded(value: float, bounds: tuple[float, float]) -> float:
    low, high = bounds
    return low if value < low else high if value > high else value


# What a prompt is made of.


def _size(call: Call) -> _Size:
    size = _Size()
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


def _measure_chat(size: _Size, request: Payload[ChatRequest]) -> None:
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


def _measure_part(size: _Size, part: ContentPart) -> None:
    size.text += _utf8(part.text) + _utf8(part.refusal)
    size.images += part.image_url is not None
    if part.input_audio is not None:
        size.audio += _length(part.input_audio, "data")
    if part.file is not None:  # its text and its pages: no more is known of it
        size.text += _length(part.file, "file_data")


def _length(of: Object, member: str) -> int:
    value = of.get(member)
    return len(value) if isinstance(value, str) else 0


def _measure_texts(size: _Size, prompt: str | list[Any] | None) -> None:
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


def _prompts(call: Call) -> int:
    prompt = None if call.endpoint is CHAT else call.request.value.prompt
    return len(prompt) if isinstance(prompt, list) and not are_ids(prompt) else 1


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


async def _asked(call: Call, targets: Sequence[Target], estimate: Estimate) -> Estimate:
    """What an upstream counts; the same *estimate* where none can, or it fails."""
    for target in targets:
        count = getattr(target.adapter, "count", None)
        if count is not None:
            try:
                async with asyncio.timeout(COUNTING_S):
                    tokens = await count(call.endpoint, call.request, target.model)
            except (GatewayError, TimeoutError):
                continue
            return replace(estimate, tokens=max(1, tokens), upper_bound=max(1, tokens), exact=True)
    return estimate


class _Encodings:
    """tiktoken's tables, looked for on the disk only, and all that is done with them in a thread."""

    def __init__(self, names: set[str]) -> None:
        self._names = names
        self._loaded: dict[str, tiktoken.Encoding] = {}
        self._thread = ThreadPoolExecutor(1, "suiron.tokens") if names else None
        self._loading: list[Future[None]] = []
        self._waiting = 0

    def load(self) -> None:
        if self._thread is not None:
            self._loading = [self._thread.submit(self._load, name) for name in sorted(self._names)]

    async def loaded(self) -> None:
        await asyncio.gather(*map(asyncio.wrap_future, self._loading))

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def count(self, name: str, call: Call, estimate: Estimate) -> Estimate:
        """*estimate* by the encoding's count; as it was while that is not loaded, or has too much to do."""
        encoding = self._loaded.get(name)
        if encoding is None or self._waiting >= MOST_WAITING:
            return estimate
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            counted = await loop.run_in_executor(self._thread, _count, encoding, list(_texts(call)))
        finally:
            self._waiting -= 1
        if counted is None:
            return estimate
        if call.endpoint is not CHAT:
            return replace(estimate, tokens=max(1, counted), upper_bound=max(1, counted), exact=True)
        messages = len(call.request.value.messages)
        return replace(
            estimate,
            tokens=counted + messages * TOKENS_A_MESSAGE + TOKENS_AN_ANSWER,
            upper_bound=min(estimate.upper_bound, counted + messages * MESSAGE_BYTES + SURPLUS_TOKENS),
        )

    def _load(self, name: str) -> None:
        try:
            self._loaded[name] = _encoding(name)
        except Exception as exc:  # tiktoken and its plugins raise what they like
            logger.warning(
                "encoding %s cannot be loaded, so its tokens are estimated: %s (tables belong in TIKTOKEN_CACHE_DIR)",
                name,
                exc,
            )


def _encoding(name: str) -> "tiktoken.Encoding":
    try:
        import tiktoken.load
    except ImportError:
        raise RuntimeError("tiktoken is not installed: pip install 'suiron[tiktoken]'") from None
    tiktoken.load.read_file = _read_file  # its own would go to the network, the first time and after each bad file
    return tiktoken.get_encoding(name)


def _read_file(blobpath: str) -> bytes:
    if "://" in blobpath:
        raise FileNotFoundError(f"{blobpath} is not on this disk")
    return Path(blobpath).read_bytes()


def _count(encoding: "tiktoken.Encoding", texts: list[str]) -> int | None:
    """None where the encoding cannot. The text of a special token is text."""
    try:
        return sum(len(encoding.encode(text, disallowed_special=())) for text in texts)
    except BaseException:  # what its Rust panics with is no Exception
        logger.warning("the encoding %s cannot count a prompt", encoding.name)
        return None


def _texts(call: Call) -> Iterator[str]:
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
