"""
What is an adapter?

An adapter speaks one upstream's dialect; everything outside it speaks OpenAI's: the waist of the gateway.
"""

import importlib
import pkgutil
from typing import Protocol

import msgspec
from msgspec import Struct

from gateway.settings import SettingsError, Timeouts, Upstream


class Dispatch(Struct, frozen=True, gc=False):
    """
    What an adapter is told beside the request.

    `model` is the upstream's name for it, `tenant` a hash; `deadline` is on `time.monotonic`, the event loop's clock;
    `traceparent` is W3C's, None where nothing is traced.
    """

    model: str
    request_id: str
    attempt: int
    tenant: str
    deadline: float
    timeouts: Timeouts
    traceparent: str | None = None


class Features(Struct, frozen=True, kw_only=True):
    """
    What a model can do at this upstream; None where nobody knows before it is asked.

    `vision`, `audio` and `files` are content parts that it takes; `usage_on_abort`, that the tokens of a stream that is
    cut short are known exactly.
    """

    tools: bool | None = None
    logprobs: bool | None = None
    json_schema: bool | None = None
    vision: bool | None = None
    audio: bool | None = None
    files: bool | None = None
    usage_on_abort: bool | None = None

    def joined(self, other: "Features") -> "Features":
        """With what *other* knows more or better."""
        known = {name: value for name, value in msgspec.structs.asdict(other).items() if value is not None}
        return msgspec.structs.replace(self, **known)


class ModelFacts(Struct, frozen=True, kw_only=True):
    """
    `context_tokens` is None where the upstream does not tell. `revision` is whatever tells one model from another that
    goes by the same name: where its files lie, or their digest; None where nobody tells.
    """

    id: str
    owned_by: str = ""
    context_tokens: int | None = None
    revision: str | None = None
    features: Features = Features()


class Repair(Struct, frozen=True):
    """A deviation from OpenAI that a dialect puts right: in words, and the golden of the dialect that proves it."""

    says: str
    golden: str


class UpstreamFacts(Struct, frozen=True, kw_only=True):
    """
    What a probe found out: `kind` is a name to print; `max_concurrent`, how many requests it takes at a time, where it
    tells; `repairs`, what its adapter puts right of its deviations.
    """

    kind: str
    version: str | None = None
    max_concurrent: int | None = None
    models: list[ModelFacts] = []
    repairs: tuple[Repair, ...] = ()


class Adapter(Protocol):
    """
    An adapter serves an endpoint by having its method: `chat`, `complete` or `embed`, all of this one shape::

        def chat(self, request: Payload[ChatRequest], dispatch: Dispatch) -> AsyncGenerator[Parts]

    Many chunks if the request asks for a stream, else one completion, in OpenAI's shape; `id`, `created`, `model` and
    `object` may be left out, since `gateway/stream.py` mints them. Parts that arrived together come in one list.
    Raises UpstreamError, or InvalidRequest for what this target cannot honour; before the first part, another target
    may be tried. Closing the generator cancels the generation.

    One that can tell how many tokens the prompt of such a request has may do so, without an answer to it::

        async def count(self, endpoint: Endpoint, request: Payload[Any], model: str) -> int

    *model* is the upstream's name for it. Raises a GatewayError where that cannot be told.
    """

    extra_fields: frozenset[str]
    """Parameters beyond OpenAI's that this upstream honours."""

    async def probe(self) -> UpstreamFacts:
        """What the upstream is; waits for a local model to load. Raises UpstreamError."""
        ...

    async def aclose(self) -> None: ...


def load_adapter(upstream: Upstream) -> Adapter:
    """
    Build the adapter that *upstream* names.

    `vllm` means `adapters.vllm:Adapter`; `package.module:Class` may live anywhere. Raises SettingsError.
    """
    name = upstream.adapter if ":" in upstream.adapter else f"adapters.{upstream.adapter}:Adapter"
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        if exc.name is None or not module_name.startswith(exc.name):
            raise  # something the adapter itself needs
        known = ", ".join(found.name for found in pkgutil.iter_modules(importlib.import_module("adapters").__path__))
        what = f"there is no adapter '{upstream.adapter}'; known are: {known}; or one of your own, package.module:Class"
        raise SettingsError(what, ("adapter",)) from None
    adapter: Adapter = getattr(module, attribute)(upstream)
    return adapter
