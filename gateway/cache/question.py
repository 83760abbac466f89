"""Which requests ask the same?"""

from collections.abc import Iterable
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import msgspec

from gateway import __version__
from gateway.adapter import ASKS_NOTHING, UpstreamFacts
from gateway.schema.chat import ChatRequest
from gateway.schema.endpoint import CHAT, EMBEDDINGS, Endpoint
from gateway.schema.payload import Payload
from gateway.settings import Caching, Settings

if TYPE_CHECKING:
    from hashlib import _Hash as HASH

LAYOUT = "2"
"""Of keys and entries: another one makes all that was kept before unknown."""

HOW_IT_IS_TOLD = frozenset(("stream", "stream_options"))
IGNORED = HOW_IT_IS_TOLD | ASKS_NOTHING
"""Fields that change nothing about the answer itself. All others do, also those that nobody knows."""

_DECODER = msgspec.json.Decoder(dict[str, Any])
_SORTED = msgspec.json.Encoder(order="sorted")


def canonical(request: Payload[Any]) -> bytes:
    """
    A request without what asks nothing, members in order and no space between them.

    Absent, null and a default are three things, and so are 1 and 1.0; strings are compared as they are, not normalised.
    """
    try:
        asked = _DECODER.decode(request.wire)
    except (msgspec.MsgspecError, RecursionError):  # such as 1e400 where nobody reads it: the same bytes ask the same
        return request.wire
    for name in [name for name in asked if name in IGNORED]:
        del asked[name]
    return _SORTED.encode(asked)


def key_of(tenant: str, endpoint: Endpoint, fingerprint: bytes, request: Payload[Any]) -> bytes:
    """All that an answer depends on, as 32 bytes; the public model is in the request."""
    seen = _begun(tenant, endpoint.path, fingerprint).copy()
    seen.update(canonical(request))  # the last part, so that it needs no length
    return seen.digest()


@lru_cache(maxsize=1024)
def _begun(tenant: str, path: str, fingerprint: bytes) -> "HASH":
    """A hash of all parts that are the same for many requests."""
    return sha256(_joined((LAYOUT.encode(), tenant.encode(), path.encode(), fingerprint)))


def digest(parts: Iterable[bytes]) -> bytes:
    """SHA-256 over parts, each behind its length, so that none can pass for another's end."""
    return sha256(_joined(parts)).digest()


def _joined(parts: Iterable[bytes]) -> bytes:
    return b"".join([len(part).to_bytes(8, "big") + part for part in parts])


def is_admitted(policy: Caching, endpoint: Endpoint, asked: Any) -> bool:
    """Whether answers to such a request may be kept."""
    if policy.mode == "all" or endpoint is EMBEDDINGS:
        return policy.mode != "off"
    if policy.mode != "deterministic" or not (asked.temperature == 0 or asked.seed is not None):
        return False
    return endpoint is not CHAT or not _looks_outside(asked)


def _looks_outside(asked: ChatRequest) -> bool:
    """Whether what is answered lies elsewhere, too, and may be another tomorrow: the web, or media by their address."""
    if asked.web_search_options is not None:
        return True
    parts = [part for message in asked.messages if isinstance(message.content, list) for part in message.content]
    urls = [part.image_url.get("url") for part in parts if part.image_url is not None]
    return not all(isinstance(url, str) and url.startswith("data:") for url in urls)


class Fingerprints:
    """What stands behind each public model: how it is configured, and what its upstreams turned out to be."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._facts: dict[str, UpstreamFacts] = {}
        self._made: dict[str, bytes] = {}

    def found(self, upstream: str, facts: UpstreamFacts) -> None:
        """A probe has told what an upstream is. It counts as that until one tells otherwise."""
        if self._facts.get(upstream) != facts:
            self._facts[upstream] = facts
            self._made.clear()

    def of(self, model: str) -> bytes:
        return self._made.get(model) or self._made.setdefault(model, self._make(model))

    def _make(self, name: str) -> bytes:
        model = self._settings.models[name]
        targets = [(target, *self._behind(target.upstream, target.model or name)) for target in model.targets]
        return sha256(_SORTED.encode((__version__, model.context_tokens, model.prices, targets))).digest()

    def _behind(self, upstream: str, model: str) -> tuple[Any, ...]:
        settings, facts = self._settings.upstreams[upstream], self._facts.get(upstream)
        configured = (settings.adapter, settings.base_url, sorted(settings.extra_fields), settings.options)
        if facts is None:
            return (*configured, None)
        # Who has no such name goes by another, or by none: then it is whatever is there.
        named = [found for found in facts.models if found.id == model]
        return (*configured, facts.kind, facts.version, named or sorted(facts.models, key=lambda found: found.id))
