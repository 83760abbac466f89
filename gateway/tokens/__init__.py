"""How many tokens is this, before anyone tells us?"""

import asyncio
from collections.abc import Sequence

from msgspec.structs import replace

from gateway.adapter import UpstreamFacts
from gateway.call import Call, Estimate, Heard
from gateway.errors import ContextLengthExceeded, GatewayError
from gateway.models import Target
from gateway.schema.common import Usage
from gateway.schema.completions import are_ids
from gateway.schema.endpoint import CHAT, COMPLETIONS, EMBEDDINGS
from gateway.settings import Settings
from gateway.tokens.encodings import MAX_COUNTED_BYTES, Encodings
from gateway.tokens.learned import Learned
from gateway.tokens.prompts import size_of

COUNTING_S = 2.0
"""How long an upstream's count may take."""


class Tokens:
    """
    Estimates for each public model, better with each answer.

    What is learned is this process's, and starts anew with it.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings.models
        self._models = {name: Learned(model) for name, model in settings.models.items()}
        self._encodings = Encodings({model.encoding for model in settings.models.values() if model.encoding})

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
        size = size_of(call)
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

    def ended(self, call: Call) -> None:
        """An answer has come: whoever is to be told its usage is told our own count, where no upstream counted."""
        if call.usage is None and (not call.streamed or call.include_usage):
            call.usage = self._reckoned(call)
            call.reckoned = True
            call.heard = Heard()  # it is counted now

    def settle(self, call: Call) -> None:
        """
        Completes `call.usage` where upstreams did not count all that they gave, and learns where they did.

        Once, when the call is over.
        """
        usage, completed = call.usage, call.outcome == "completed" and call.error is None
        if usage is None or call.heard.pieces or not (completed or usage.prompt_tokens):
            call.usage = self._reckoned(call)
            call.reckoned = call.usage is not None
        elif completed and call.attempts and not call.reckoned:  # from the cache, it would be learned again and again
            self._of(call).learn(call, usage)

    def _reckoned(self, call: Call) -> Usage | None:
        """What was used, with our own count of what nobody counted; None where nothing was."""
        if call.first_at is None and (call.error is not None or not call.attempts):
            return None
        usage = call.usage
        estimate = call.estimate or self.prompt(call)
        told = 0 if usage is None else usage.prompt_tokens
        prompt = told or estimate.tokens  # TGI counts it at the end
        completion = self.generated(call)
        known = usage or Usage(prompt_tokens=prompt)
        return replace(known, prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)

    def _of(self, call: Call) -> Learned:
        return self._models[call.request.value.model]


def _prompts(call: Call) -> int:
    prompt = None if call.endpoint is CHAT else call.request.value.prompt
    return len(prompt) if isinstance(prompt, list) and not are_ids(prompt) else 1


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
