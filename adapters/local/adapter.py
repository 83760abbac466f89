"""Models in this machine: the gateway's side, which never imports torch."""

import importlib.util
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from adapters.local.answers import ChatWording, CompletionWording, Gathered, Streamed, Wording
from adapters.local.asking import EXTENSIONS, ask_chat, ask_completion
from adapters.local.frames import Generate, Loading
from adapters.local.options import read_options
from adapters.local.process import EngineProcess
from gateway.adapter import Dispatch, ModelFacts, UpstreamFacts, Vigil
from gateway.schema.chat import ChatRequest
from gateway.schema.completions import CompletionRequest
from gateway.schema.endpoint import CHAT, Endpoint
from gateway.schema.payload import Parts, Payload
from gateway.settings import SettingsError, Upstream


class Adapter:
    """
    One transformers model in a child process, which `probe` starts; until it is loaded, requests get 503.

    Options: see `options.py`. *on_progress* is called while the model loads; the same is logged as `suiron.local`.
    """

    extra_fields = EXTENSIONS

    def __init__(self, upstream: Upstream, *, on_progress: Callable[[Loading], None] | None = None) -> None:
        if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
            raise SettingsError("models in this machine need torch: install the extra: pip install 'suiron[local]'")
        self._vigil = Vigil()
        self.engine = EngineProcess(read_options(upstream.options), on_progress)

    async def probe(self) -> UpstreamFacts:
        """Loads the model, which may take minutes. Raises UpstreamFailed with what to do if that is not possible."""
        facts = await self.engine.ready()
        model = ModelFacts(id=facts.model, context_tokens=facts.context_tokens, revision=facts.revision)
        return UpstreamFacts(kind="transformers", version=facts.version, models=[model])

    async def aclose(self) -> None:
        self._vigil.close()
        await self.engine.aclose()

    def chat(self, request: Payload[ChatRequest], dispatch: Dispatch) -> AsyncGenerator[Parts]:
        return self._answer(ask_chat, request, dispatch, ChatWording())

    def complete(self, request: Payload[CompletionRequest], dispatch: Dispatch) -> AsyncGenerator[Parts]:
        return self._answer(ask_completion, request, dispatch, CompletionWording())

    async def count(self, endpoint: Endpoint, request: Payload[Any], model: str) -> int:
        """Tokens of the prompt. Raises a GatewayError where the model would not take it."""
        return await self.engine.count((ask_chat if endpoint is CHAT else ask_completion)(request))

    async def _answer(
        self, ask: Callable[[Payload[Any]], Generate], request: Payload[Any], dispatch: Dispatch, wording: Wording
    ) -> AsyncGenerator[Parts]:
        asked = ask(request)
        choices = asked.n * (len(asked.prompts) or 1)
        timeouts = dispatch.timeouts
        with self._vigil.patience(dispatch.deadline) as patience:
            async with aclosing(self.engine.generate(asked, choices)) as arrivals:
                if not request.value.stream:
                    patience.allow(timeouts.total_s)
                    gathered = Gathered(wording, choices)
                    async for pieces in arrivals:
                        gathered.add(pieces)
                    patience.rest()
                    yield [gathered.part()]
                    return
                streamed = Streamed(wording)
                patience.allow(timeouts.first_token_s)
                async for pieces in arrivals:
                    patience.rest()
                    if parts := streamed.parts(pieces):
                        yield parts
                    patience.allow(timeouts.idle_s)
