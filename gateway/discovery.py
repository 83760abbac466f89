"""What is behind each upstream: its kind, models, context lengths and features, at start and again and again?"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping

import msgspec

from gateway.adapter import Adapter, Features, ModelFacts, UpstreamFacts
from gateway.errors import GatewayError, InternalError

EVERY_S = 60.0
AGAIN_S = 5.0
"""After a probe that failed; each further one in a row waits twice as long, up to `EVERY_S`."""
JITTER = 0.2
MOST_NAMED = 10

logger = logging.getLogger("suiron")

Findings = dict[str, UpstreamFacts | GatewayError]
"""What the first probe of each upstream found."""
Listener = Callable[[str, UpstreamFacts], None]


class Discovery:
    """
    Asks every upstream what it is, in the background: no request waits for it, and one that is down stops nobody.

    *on_found* is told of each answer that differs from the one before; *draw* gives numbers from 0 up to 1.
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        on_found: Listener,
        *,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._adapters = adapters
        self._on_found = on_found
        self._sleep = sleep
        self._draw = draw
        self._facts: dict[str, UpstreamFacts] = {}
        self._failures = dict.fromkeys(adapters, 0)  # in a row

    async def first(self) -> Findings:
        """What each is, once all have answered or failed."""
        found = await asyncio.gather(*map(self._ask, self._adapters))
        return dict(zip(self._adapters, found, strict=True))

    async def keep_up(self) -> None:
        """Asks again, each in its own time; never ends."""
        async with asyncio.TaskGroup() as group:
            for name in self._adapters:
                group.create_task(self._keep_asking(name))

    async def _keep_asking(self, name: str) -> None:
        while True:
            await self._sleep(self._pause_s(self._failures[name]))
            await self._ask(name)

    def _pause_s(self, failures: int) -> float:
        pause_s = EVERY_S if not failures else min(EVERY_S, AGAIN_S * 2 ** min(failures - 1, 9))
        return pause_s * (1 + JITTER * (2 * self._draw() - 1))

    async def _ask(self, name: str) -> UpstreamFacts | GatewayError:
        try:
            facts = await self._adapters[name].probe()
        except GatewayError as exc:
            self._failed(name, exc.message)
            return exc
        except Exception as exc:  # an adapter from elsewhere may do anything, and the others go on
            self._failed(name, f"its probe failed with {type(exc).__name__}")
            return InternalError(f"The probe of upstream {name} failed with {type(exc).__name__}.")
        self._found(name, facts)
        return facts

    def _failed(self, name: str, why: str) -> None:
        self._failures[name] += 1
        if self._failures[name] == 1:  # not every minute
            logger.warning("upstream %s: %s", name, why)

    def _found(self, name: str, facts: UpstreamFacts) -> None:
        before, self._facts[name] = self._facts.get(name), facts
        if self._failures[name]:
            logger.info("upstream %s is there: %s", name, describe(facts))
        self._failures[name] = 0
        if before is not None:
            for change in changes(before, facts):
                logger.warning("upstream %s %s", name, change)
        if before != facts:
            self._on_found(name, facts)


def changes(before: UpstreamFacts, after: UpstreamFacts) -> list[str]:
    """What an operator wants to know, in words."""
    said = []
    if (before.kind, before.version) != (after.kind, after.version):
        said.append(f"is {_name(after)} now, and was {_name(before)}")
    had, has = ({model.id: model for model in facts.models} for facts in (before, after))
    if gone := had.keys() - has.keys():
        said.append(f"does not have {_listed(gone)} any more")
    if new := has.keys() - had.keys():
        said.append(f"has {_listed(new)} too")
    said += [
        f"gives {id} a context of {has[id].context_tokens} tokens, and gave {had[id].context_tokens}"
        for id in sorted(had.keys() & has.keys())
        if had[id].context_tokens != has[id].context_tokens
    ]
    said += [
        f"has another model under the name {id}"
        for id in sorted(had.keys() & has.keys())
        if None not in (had[id].revision, has[id].revision) and had[id].revision != has[id].revision
    ]
    return said


FEATURES = {
    "tools": "tools",
    "logprobs": "logprobs",
    "json_schema": "json_schema",
    "vision": "images",
    "audio": "audio",
    "files": "files",
    "usage_on_abort": "usage on abort",
}


def describe(facts: UpstreamFacts) -> str:
    """Such as "vLLM 0.32: llama (8192 tokens); tools ✓ logprobs ✓ images ✗, 11 deviations repaired"."""
    models = [_sized(model) for model in facts.models[:MOST_NAMED]]
    if len(facts.models) > MOST_NAMED:
        models.append(f"and {len(facts.models) - MOST_NAMED} more")
    said = [", ".join(models) or "tells no models"]
    if facts.max_concurrent is not None:
        said[0] += f", {facts.max_concurrent} requests at a time"
    features = Features()
    for model in facts.models:
        features = _either(features, model.features)
    marks = [f"{FEATURES[name]} {'✓' if has else '✗'}" for name, has in _known(features).items()]
    repaired = f"{len(facts.repairs)} deviations repaired" if facts.repairs else ""
    if marks or repaired:
        said.append(", ".join(filter(None, (" ".join(marks), repaired))))
    return f"{_name(facts)}: {'; '.join(said)}"


def _name(facts: UpstreamFacts) -> str:
    return f"{facts.kind} {facts.version}" if facts.version else facts.kind


def _sized(model: ModelFacts) -> str:
    return f"{model.id} ({model.context_tokens} tokens)" if model.context_tokens else model.id


def _listed(ids: set[str]) -> str:
    names = sorted(ids)
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _known(features: Features) -> dict[str, bool]:
    return {name: has for name, has in msgspec.structs.asdict(features).items() if has is not None}


def _either(one: Features, other: Features) -> Features:
    """What some model can do."""
    known = _known(other)
    return msgspec.structs.replace(one, **{name: has or bool(getattr(one, name)) for name, has in known.items()})
