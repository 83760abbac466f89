"""What have the past answers of a model taught about its tokens?"""

import math
from collections import deque

from gateway.call import Call, Estimate, Heard
from gateway.schema.common import Usage
from gateway.schema.endpoint import EMBEDDINGS
from gateway.settings import Model
from gateway.tokens.prompts import Size

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
HEAVIEST_BYTES = 4096
"""A text as long as this weighs as much as any longer one."""
SHORT_BYTES = 512
AROUND = (-512, 4096)
"""Up to here, prompts teach how many tokens a template adds to each, in these bounds; longer ones, what a byte is."""
PAST_OUTPUTS = 256
FEWEST_OUTPUTS = 20
RESTED_OUTPUTS = 8
"""Past outputs that are kept; that are needed to say something; and after which it is said anew."""


class Learned:
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

    def estimate(self, size: Size) -> Estimate:
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
