"""How are the parts put together? The only module that knows all the others."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from litestar import Litestar, asgi
from litestar.types import ASGIApp

from gateway.adapter import Adapter, UpstreamFacts, load_adapter
from gateway.api.admin.cache import cache_routes
from gateway.api.cors import CORS
from gateway.api.errors import EXCEPTION_HANDLERS
from gateway.api.generation import Shortcut, generation_apps
from gateway.api.health import Readiness, health_routes
from gateway.api.metrics import metrics_routes
from gateway.api.models import model_routes
from gateway.api.named import Named
from gateway.api.page import page_routes
from gateway.api.shutdown import Shutdown
from gateway.auth import Keyring, why_not_anonymous
from gateway.cache import Cache
from gateway.cache.question import Fingerprints
from gateway.discovery import Discovery, Findings
from gateway.errors import CannotLoad
from gateway.ledger import Ledger, open_ledger
from gateway.limits import Limiter
from gateway.models import Models
from gateway.pipeline import Pipeline
from gateway.routing import Router
from gateway.settings import Settings, SettingsError
from gateway.stores import LimitStore
from gateway.stores.answers import AnswerStore, MemoryAnswers
from gateway.stores.memory import MemoryStore
from gateway.telemetry import Telemetry
from gateway.telemetry.lag import supervised
from gateway.tokens import Tokens
from gateway.upkeep import Upkeep

logger = logging.getLogger("suiron")


def create_app(
    settings: Settings,
    *,
    adapters: Mapping[str, Adapter] | None = None,
    telemetry: Telemetry | None = None,
    ledger: Ledger | None = None,
    store: LimitStore | None = None,
    shutdown: Shutdown | None = None,
    on_ready: Callable[[Findings], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> ASGIApp:
    """
    The gateway as an ASGI application.

    Whoever ends the process tells *shutdown*. *on_ready* is called once every upstream has been asked what it is.
    *clock* is for what is remembered of upstreams.
    Raises SettingsError where the configuration would let strangers in.
    """
    if adapters is None:
        adapters = load_adapters(settings)
    ledger = ledger or open_ledger(settings.database, alone=settings.has_limits and settings.store.url is None)
    store = store or _store(settings, ledger)
    parts = _Parts(
        settings, adapters, telemetry or Telemetry(settings), ledger, store, shutdown or Shutdown(), on_ready, clock
    )
    return parts.app()


class _Parts:
    """What one gateway is made of, and when each part works."""

    def __init__(
        self,
        settings: Settings,
        adapters: Mapping[str, Adapter],
        telemetry: Telemetry,
        ledger: Ledger,
        store: LimitStore,
        shutdown: Shutdown,
        on_ready: Callable[[Findings], None],
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._adapters = adapters
        self._telemetry = telemetry
        self._ledger = ledger
        self._store = store
        self._shutdown = shutdown
        self._on_ready = on_ready
        self._keyring = _keyring(settings)
        self._models = Models(settings, adapters)
        self._tokens = Tokens(settings)
        self._fingerprints = Fingerprints(settings)
        self._cache = Cache(settings, _answers(settings), self._fingerprints)
        limiter = Limiter(settings, store, self._tokens, ledger.used, records=settings.store.url is not None)
        router = Router(settings.upstreams, telemetry.metrics, clock=clock)
        self._pipeline = Pipeline(self._models, ledger, limiter, self._cache, router, self._tokens)
        self._upkeep = Upkeep(limiter, store, ledger, self._tokens)
        self._readiness = Readiness(shutdown)
        self._discovery = Discovery(adapters, self._found)
        ledger.committed = store.recorded
        telemetry.metrics.targets = router.standings
        for name, counts in {"store": store.counts, "ledger": ledger.counts, "cache": self._cache.counts}.items():
            telemetry.metrics.watch(name, counts)

    def app(self) -> ASGIApp:
        generating = generation_apps(
            self._keyring, self._pipeline, self._settings.server, self._shutdown, self._telemetry
        )
        litestar = Litestar(
            [
                *(asgi(path, copy_scope=False)(answer) for path, answer in generating.items()),
                *model_routes(self._keyring, self._models),
                *health_routes(self._readiness),
                *metrics_routes(self._keyring, self._telemetry.metrics, self._settings.telemetry),
                *cache_routes(self._keyring, self._cache),
                *page_routes(),
            ],
            exception_handlers=EXCEPTION_HANDLERS,
            lifespan=[self._lifespan],
            openapi_config=None,
            logging_config=None,
        )
        app = Shortcut(Named(litestar), generating)
        origins = self._settings.server.cors.origins
        return CORS(app, origins) if origins else app

    @asynccontextmanager
    async def _lifespan(self, _: Litestar) -> AsyncIterator[None]:
        self._tokens.load()
        await self._store.start()
        await self._cache.start()
        background = [
            asyncio.create_task(self._ask()),
            asyncio.create_task(supervised("keeping up reservations", self._upkeep.beat)),
            asyncio.create_task(supervised("sweeping up after other replicas", self._upkeep.sweep)),
        ]
        try:
            async with self._telemetry.running(), self._ledger.running():
                yield
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            await self._cache.aclose()
            await self._store.aclose()
            self._tokens.close()
            await asyncio.gather(*(adapter.aclose() for adapter in self._adapters.values()))

    async def _ask(self) -> None:
        """Asks upstreams what they are; once all have been, the gateway is ready."""
        findings = await self._discovery.first()
        await self._tokens.loaded()  # making an encoding keeps the interpreter for half a second
        self._readiness.loading = False
        self._readiness.broken = any(isinstance(finding, CannotLoad) for finding in findings.values())
        self._on_ready(findings)
        await supervised("asking upstreams what they are", self._discovery.keep_up)

    def _found(self, name: str, facts: UpstreamFacts) -> None:
        self._tokens.probed(name, facts)
        self._fingerprints.found(name, facts)


def load_adapters(settings: Settings) -> dict[str, Adapter]:
    """An adapter for each upstream, by its name; raises SettingsError with that name."""
    adapters = {}
    for name, upstream in settings.upstreams.items():
        try:
            adapters[name] = load_adapter(upstream)
        except SettingsError as exc:
            raise exc.within("upstreams", name) from None
        except (ImportError, AttributeError) as exc:
            what = f"the adapter '{upstream.adapter}' cannot be loaded: {exc}"
            raise SettingsError(what, ("upstreams", name, "adapter")) from exc
    return adapters


def _store(settings: Settings, ledger: Ledger) -> LimitStore:
    if settings.store.url is None:
        return MemoryStore(ledger.used)
    from gateway.stores.redis import RedisStore

    try:
        return RedisStore(settings.store, ledger.used)
    except ValueError as exc:
        raise SettingsError(str(exc), ("store", "url")) from None


def _answers(settings: Settings) -> AnswerStore:
    cache, store = settings.cache, settings.store
    where, secret, name = (cache.url, cache.password, "cache") if cache.url else (store.url, store.password, "store")
    if where is None:
        return MemoryAnswers(cache.max_bytes)
    from gateway.stores.redis.answers import RedisAnswers

    try:
        return RedisAnswers(where, secret.reveal() if secret else None, cache.timeout_s, cache.max_bytes)
    except ValueError as exc:
        raise SettingsError(str(exc), (name, "url")) from None


def _keyring(settings: Settings) -> Keyring:
    if settings.auth.keys:
        return Keyring(settings.auth, anonymous=False)
    if forbidden := why_not_anonymous(settings):
        raise SettingsError(
            f"refusing to start without keys: {forbidden}. Make one with `suiron key new` and paste what it prints "
            "into a configuration file" + ("" if "credential" in forbidden else ", or listen on 127.0.0.1")
        )
    return Keyring(settings.auth, anonymous=True)
