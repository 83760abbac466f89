"""What does a server that speaks OpenAI's dialect tell about itself?"""

import re
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from adapters.openai.options import Engine
from gateway.adapter import PROBE_S, Features, ModelFacts, UpstreamFacts
from gateway.errors import GatewayError, UpstreamError

UNKNOWN = "OpenAI-speaking server"
SIGNATURES = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "llamacpp": "llama.cpp",
    "library": "Ollama",
    "suiron": "Suiron",
    "openai": "OpenAI",
    "system": "OpenAI",
}
"""Which server it is, by how it signs its models."""
KINDS: dict[Engine, str] = {
    "openai": "OpenAI",
    "transformers": "transformers serve",
    "sglang": "SGLang",
    "llamacpp": "llama.cpp",
    "ollama": "Ollama",
}
MOST_ASKED = 50
"""So many models are asked about one by one."""


class _Version(Struct):
    version: str | None = None


class _ServerInfo(Struct):
    """SGLang's `/get_server_info`."""

    version: str | None = None
    context_length: int | None = None
    max_running_requests: int | None = None
    model_path: str | None = None


class _Generation(Struct):
    n_ctx: int | None = None


class _Props(Struct):
    """llama.cpp's `/props`."""

    build_info: str | None = None
    model_path: str | None = None
    total_slots: int | None = None
    default_generation_settings: _Generation = msgspec.field(default_factory=_Generation)
    modalities: dict[str, bool] = {}


class _Shown(Struct):
    """Ollama's `/api/show`."""

    capabilities: list[str] = []
    parameters: str = ""


class _Tagged(Struct):
    name: str
    digest: str | None = None


class _Tags(Struct):
    """Ollama's `/api/tags`."""

    models: list[_Tagged] = []


class Probe:
    """Asks one server. What it does not tell, or not in the way that is known here, stays unknown."""

    def __init__(
        self,
        list_models: Callable[[], Awaitable[list[ModelFacts]]],
        get: Callable[[str], Awaitable[bytes]],
        post: Callable[[str, bytes, float], Awaitable[bytes]],
        engine: Engine | None,
    ) -> None:
        self._list_models = list_models
        self._get = get
        self._post = post
        self._engine = engine

    async def facts(self) -> UpstreamFacts:
        """Raises UpstreamError."""
        models = await self._models()
        kind = KINDS[self._engine] if self._engine else _kind(models)
        ask = {"SGLang": self._sglang, "llama.cpp": self._llamacpp, "Ollama": self._ollama}.get(kind)
        facts = UpstreamFacts(kind=kind, models=models)
        return facts if ask is None else await ask(facts)

    async def _models(self) -> list[ModelFacts]:
        try:
            return await self._list_models()
        except UpstreamError:
            if self._engine != "transformers":
                raise
        await self._get("../health")  # its list fails where it has cached no model, although it serves one
        return []

    async def _sglang(self, facts: UpstreamFacts) -> UpstreamFacts:
        info = await self._told(_ServerInfo, "../get_server_info")
        models = [
            replace(
                model,
                context_tokens=model.context_tokens or info.context_length,
                revision=info.model_path or model.revision,
            )
            for model in facts.models
        ]
        return replace(facts, version=info.version, max_concurrent=info.max_running_requests, models=models)

    async def _llamacpp(self, facts: UpstreamFacts) -> UpstreamFacts:
        props = await self._told(_Props, "../props")
        context = props.default_generation_settings.n_ctx
        features = Features(vision=props.modalities.get("vision"), audio=props.modalities.get("audio"))
        told = {"context_tokens": context, "features": features, "revision": props.model_path}
        models = [replace(model, **told) for model in facts.models]
        return replace(facts, version=props.build_info, max_concurrent=props.total_slots, models=models)

    async def _ollama(self, facts: UpstreamFacts) -> UpstreamFacts:
        version = await self._told(_Version, "../api/version")
        tags = await self._told(_Tags, "../api/tags")
        digests = {tagged.name: tagged.digest for tagged in tags.models}
        models = [replace(model, revision=digests.get(model.id)) for model in facts.models]
        asked = [await self._shown(model) for model in models[:MOST_ASKED]]
        return replace(facts, version=version.version, models=[*asked, *models[MOST_ASKED:]])

    async def _shown(self, model: ModelFacts) -> ModelFacts:
        body = msgspec.json.encode({"model": model.id})
        shown = await self._told(_Shown, "../api/show", body)
        if not shown.capabilities:
            return model
        features = Features(vision="vision" in shown.capabilities, tools="tools" in shown.capabilities)
        limit = re.search(r"^num_ctx\s+(\d+)", shown.parameters, re.MULTILINE)
        return replace(model, features=features, context_tokens=int(limit[1]) if limit else None)

    async def _told(self, kind: type[Any], path: str, body: bytes | None = None) -> Any:
        try:
            told = await (self._get(path) if body is None else self._post(path, body, PROBE_S))
            return msgspec.json.decode(told, type=kind)
        except (GatewayError, msgspec.MsgspecError):
            return kind()


def _kind(models: list[ModelFacts]) -> str:
    if not models:
        return UNKNOWN
    return "TGI" if models[0].owned_by == models[0].id else SIGNATURES.get(models[0].owned_by, UNKNOWN)
