"""Was this answered before, or is it being answered now?"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from gateway.cache.control import ANY, Control, read_control
from gateway.cache.entry import entry_of, pack, unpack
from gateway.cache.flights import MAX_KEPT_BYTES, Flight
from gateway.cache.forms import cut, merged, says_nothing_else
from gateway.cache.lead import Lead
from gateway.cache.question import Fingerprints, is_admitted, key_of
from gateway.cache.track import Track
from gateway.call import Attempt, CacheState, Call
from gateway.errors import GatewayError, NotCached, RequestError
from gateway.models import Target
from gateway.schema.endpoint import expected_choices, texts_in
from gateway.schema.payload import Part, Parts
from gateway.settings import Caching, Settings
from gateway.stores import StoreUnavailable
from gateway.stores.answers import ALL, AnswerStore, Epochs

logger = logging.getLogger("suiron")

Produce = Callable[[Call], AsyncGenerator[Parts]]
"""Generates an answer for a call: the rest of the pipeline."""

WHOLE = frozenset(("stop", "tool_calls", "function_call"))
"""Why an answer ended that may be given again: not for its length, and not for a filter."""

AT_ONCE = 64
"""Pieces of a kept stream that leave together."""
LARGE_BYTES = 64 * 1024
"""What is packed or unpacked beside the event loop."""
JITTER = 0.1
"""By how much of their time entries end early, each by another share, so that they do not all end at once."""
POLL_S = 0.1
WRONG_KEY = "it answers another question"


@dataclass(slots=True)
class CacheCounts:
    """What the cache has been through, for metrics: plain numbers that only grow."""

    kept: int = 0
    kept_bytes: int = 0
    spoiled: int = 0
    unavailable: int = 0


class Cache:
    """
    Gives kept answers to those who ask the same, and one answer to those who ask it at the same time.

    *now* is the wall clock, which entries are dated by; *monotonic* measures the waits between pieces, and *sleep*
    repeats them.
    """

    def __init__(
        self,
        settings: Settings,
        store: AnswerStore,
        fingerprints: Fingerprints,
        *,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.counts = CacheCounts()
        self._models = {name: model.cache for name, model in settings.models.items()}
        self._keys = {key.name: key.cache for key in settings.auth.keys if key.cache is not None}
        self._waits_s = {name: _wait_s(settings, name) for name in settings.models}
        self._store = store
        self._fingerprints = fingerprints
        self._now = now
        self._monotonic = monotonic
        self._sleep = sleep
        self._flights: dict[bytes, Flight] = {}
        self._running: set[asyncio.Task[None]] = set()

    def policy_for(self, call: Call) -> Caching:
        """The key's own, or the model's."""
        return self._keys.get(call.principal.name) or self._models[call.request.value.model]

    def through(self, call: Call, produce: Produce) -> AsyncGenerator[Parts]:
        """
        An answer from before, one that is being generated, or one that *produce* generates.

        `call.cache` and its header say which before the first part. Raises NotCached where the client wants none that
        must be generated; and what *produce* raises.
        """
        policy = self.policy_for(call)
        control = read_control(call.cache_control) if call.cache_control else ANY
        if policy.mode == "off" and not control.only_if_cached:
            return produce(call)
        call.hits_cost = policy.hits_cost
        if control.no_store or not is_admitted(policy, call.endpoint, call.request.value):
            if policy.mode != "off":
                _mark(call, "bypass")
            if control.only_if_cached:
                raise NotCached
            return produce(call)
        return self._answered(call, policy, control, produce)

    async def _answered(self, call: Call, policy: Caching, control: Control, produce: Produce) -> AsyncGenerator[Parts]:
        question = self._question(call, policy, control)
        kept = await self._look_up(question)
        if kept is not None and self._may_be_given(kept, question):
            _mark(call, "hit")
            call.headers["age"] = str(int(max(0.0, self._now() - kept.at)))
            if policy.replay == "instant" or not (call.streamed and kept.track.streamed):
                for number, parts in enumerate(told(call, kept.track)):
                    if number:
                        await asyncio.sleep(0)  # for others: a long answer takes milliseconds
                    yield parts
                return
            source = self._paced(kept.track)
        elif control.only_if_cached:
            _mark(call, "miss")
            raise NotCached
        elif policy.coalesce:
            source = self._shared(question, produce)
        else:
            _mark(call, "miss")
            source = self._recorded(question, produce)
        async with aclosing(source):
            async for arrived in source:
                yield arrived

    def _question(self, call: Call, policy: Caching, control: Control) -> "Question":
        model, tenant = call.request.value.model, call.principal.tenant
        key = key_of(tenant, call.endpoint, self._fingerprints.of(model), call.request)
        return Question(call, key, (ALL, f"model:{model}", f"tenant:{tenant}"), policy, control)

    async def _look_up(self, question: "Question") -> "Kept | None":
        """What is kept for it, if it is really for it, and nobody has said to forget it since."""
        try:
            found = await self._store.read(question.key, question.scopes)
        except StoreUnavailable:
            self.counts.unavailable += 1
            return None
        question.epochs = found.epochs
        if found.entry is None:
            return None
        entry = unpack(found.entry)
        if entry is None or entry.key != question.key:
            self.counts.spoiled += 1
            logger.error("an entry of the cache was not used: %s", "it is spoiled" if entry is None else WRONG_KEY)
            return None
        return None if entry.epochs != found.epochs else Kept(entry.at, entry.track(question.call.endpoint))

    def _may_be_given(self, kept: "Kept", question: "Question") -> bool:
        control = question.control
        age_s = self._now() - kept.at
        if control.no_cache or age_s >= question.policy.ttl_s:
            return False
        return control.max_age_s is None or age_s <= control.max_age_s

    async def _paced(self, track: Track) -> AsyncGenerator[Parts]:
        start = 0
        for position in range(1, len(track)):
            if wait_ms := track.waits_ms[position]:
                yield track.parts(start, position)
                start = position
                await self._sleep(wait_ms / 1000)
        yield track.parts(start, len(track))

    # Without anybody else.

    async def _recorded(self, question: "Question", produce: Produce) -> AsyncGenerator[Parts]:
        track = Track(question.call.endpoint, question.call.streamed, self._monotonic)
        async with aclosing(produce(question.call)) as parts:
            async for arrived in parts:
                if track.size_bytes < MAX_KEPT_BYTES:
                    track.add(arrived)
                yield arrived
        self._run(self._keep(question, track, question.call.attempts))

    async def _keep(self, question: "Question", track: Track, attempts: Sequence[Attempt]) -> None:
        """Where nothing speaks against it."""
        policy, call = question.policy, question.call
        if question.epochs is None or track.size_bytes > MAX_KEPT_BYTES or not is_whole(call, track):
            return
        if attempts and steps_in(call, attempts[-1].target):
            return  # it is not to stay when the other is back
        entry = entry_of(question.key, self._now(), question.epochs, track)
        packed = await asyncio.to_thread(pack, entry) if track.size_bytes > LARGE_BYTES else pack(entry)
        if len(packed) <= policy.max_entry_bytes:
            ttl_s = policy.ttl_s * (1 - JITTER * question.key[0] / 255)
            with suppress(StoreUnavailable):
                await self._store.write(question.key, packed, ttl_s)
                self.counts.kept += 1
                self.counts.kept_bytes += len(packed)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    # Together.

    async def _shared(self, question: "Question", produce: Produce) -> AsyncGenerator[Parts]:
        """Who joined a generation that failed tries once more; who began one, or has heard of it, is told."""
        call = question.call
        for is_last in (False, True):
            flight = self._flights.get(question.key)
            joins = flight is not None and flight.is_open and flight.epochs == question.epochs
            if flight is None or not joins or question.control.no_cache:
                flight, joins = self._launched(question, produce), False
            _mark(call, "shared" if joins else "miss")
            begun = False
            try:
                async with aclosing(flight.listen(call)) as heard:
                    async for item in heard:
                        if flight.borrowed:
                            _mark(call, "shared")
                        begun = True
                        for parts in told(call, item) if isinstance(item, Track) else (item,):
                            yield parts
                return
            except RequestError:
                raise
            except GatewayError:
                if not joins or begun or is_last:
                    raise

    def _launched(self, question: "Question", produce: Produce) -> Flight:
        flight = Flight(question.call, question.epochs, self._monotonic)
        self._flights[question.key] = flight
        lead = None
        if self._store.shared and question.epochs is not None:
            lead = Lead(self._store, question.key, question.epochs)

        async def landed() -> None:
            try:
                if flight.is_complete and not flight.borrowed:
                    await self._keep(question, flight.track, flight.call.attempts)
            finally:
                if self._flights.get(question.key) is flight:
                    del self._flights[question.key]
                if lead is not None:
                    await lead.leave()

        task = flight.start(self._source(flight, question, produce, lead), landed)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return flight

    async def _source(
        self, flight: Flight, question: "Question", produce: Produce, lead: Lead | None
    ) -> AsyncGenerator[Parts]:
        """What another process has found by then; else what is generated, while others are held off."""
        if lead is not None:
            kept = None if question.control.no_cache else await self._found_elsewhere(question, lead)
            if kept is not None:
                flight.borrowed = True
                for known in told(flight.call, kept.track, in_runs=False):
                    yield known
                return
            lead.keep()
        async with aclosing(produce(flight.call)) as parts:
            async for arrived in parts:
                yield arrived

    async def _found_elsewhere(self, question: "Question", lead: Lead) -> "Kept | None":
        """The answer that another process generates; None where this one is to, or has waited for long enough."""
        until = time.monotonic() + self._waits_s[question.call.request.value.model]
        while not await lead.take():
            kept = await self._awaited(question, lead, until)
            if kept is not None or time.monotonic() >= until or question.epochs != lead.epochs:
                return kept
        return None

    async def _awaited(self, question: "Question", lead: Lead, until: float) -> "Kept | None":
        """What comes of it while another leads; None if that is nothing."""
        while time.monotonic() < until:
            await asyncio.sleep(POLL_S)
            is_taken = await lead.is_taken()
            kept = await self._look_up(question)  # after that: who leads no longer has written before
            if kept is not None and self._may_be_given(kept, question):
                return kept
            if not is_taken or question.epochs != lead.epochs:  # what comes of it is forgotten already
                return None
        return None

    async def forget(self, *, model: str | None = None, tenant: str | None = None) -> None:
        """
        What is kept is given no more: of a model, of a tenant, or all; nor is what is being generated kept.

        Raises StoreUnavailable, and LookupError where there is no such model.
        """
        if model is not None and model not in self._models:
            raise LookupError(model)
        scope = f"model:{model}" if model is not None else f"tenant:{tenant}" if tenant is not None else ALL
        await self._store.forget(scope)

    async def start(self) -> None:
        await self._store.start()

    async def settled(self) -> None:
        """When all that is under way has come to its end."""
        await asyncio.gather(*self._running, return_exceptions=True)

    async def aclose(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await self._store.aclose()


@dataclass(slots=True)
class Question:
    """One call's, and what it may be answered with. `epochs` None: the store could not be asked."""

    call: Call
    key: bytes
    scopes: tuple[str, ...]
    policy: Caching
    control: Control
    epochs: Epochs | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """An answer from the store; `at` in seconds since 1970."""

    at: float
    track: Track


def _wait_s(settings: Settings, model: str) -> float:
    """How long another replica may be waited for: there must be time left for an answer of one's own."""
    upstreams = [settings.upstreams[target.upstream] for target in settings.models[model].targets]
    longest_s = max((upstream.timeouts.total_s for upstream in upstreams), default=0.0)
    return min(settings.cache.wait_s, longest_s / 2)


def _mark(call: Call, state: CacheState) -> None:
    call.cache = state
    call.headers["x-suiron-cache"] = state


def is_whole(call: Call, track: Track) -> bool:
    """Whether an answer came to its end by itself, with all that was asked for."""
    if not track:
        return False
    if call.endpoint.streams:
        ends = [track.finishes.get(index) for index in range(expected_choices(call.request.value))]
        return WHOLE.issuperset(ends)
    return len(track.part(0).value.data) == texts_in(call.request.value.input)


def steps_in(call: Call, target: Target) -> bool:
    """Whether *target* answers only where another of the model's, which can do the same, does not."""
    if call.model is None or target.tier == min(other.tier for other in call.model.targets):
        return False
    return target.tier > min(other.tier for other in call.model.targets_for(call.endpoint, call.request.value))


def told(call: Call, track: Track, *, in_runs: bool = True) -> Iterator[Parts]:
    """A whole track in the form that *call* asks for, some pieces at a time; *in_runs* where nobody looks into each."""
    endpoint = call.endpoint
    if call.streamed == track.streamed:
        is_cut = call.endpoint.streams and call.request.value.stop
        pieces = track.in_runs if in_runs and not is_cut else track.parts
        for start in range(0, len(track), AT_ONCE):
            yield pieces(start, min(start + AT_ONCE, len(track)))
    elif call.streamed:
        parts = [Part(endpoint.chunks.decode(wire), wire) for wire in cut(endpoint, track.part(0).wire)]
        parts[-1].usage = track.usage
        for start in range(0, len(parts), AT_ONCE):
            yield parts[start : start + AT_ONCE]
    else:
        wire = merged(endpoint, track.joined(says_nothing_else))
        yield [Part(endpoint.answers.decode(wire), wire, track.usage)]
