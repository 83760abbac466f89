"""What can be watched? Metrics, a log line a request and traces, all from the one record that each request leaves."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from gateway.call import Call
from gateway.errors import GatewayError, UpstreamError
from gateway.schema.endpoint import Endpoint
from gateway.settings import Settings, SettingsError
from gateway.telemetry.lag import supervised, watch_lag
from gateway.telemetry.log import Log
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.record import LEVELS, UNKNOWN, Record, cached_tokens, kind_of, outcome_of

if TYPE_CHECKING:
    from gateway.telemetry.traces import Tracing


class Telemetry:
    """
    Where requests are told of: when one begins, and when it is over.

    *clock* gives seconds; without a *log* no line is written, without *tracing* it is as the settings say. Raises
    SettingsError where those ask for what is not installed.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.perf_counter,
        log: Log | None = None,
        tracing: "Tracing | None" = None,
    ) -> None:
        self.clock = clock
        self.metrics = Metrics()
        self._models = frozenset(settings.models)
        self._log = log if settings.telemetry.log != "off" else None
        if log is not None:
            log.dropped = self.metrics.dropped.inc
        self._tracing = tracing or (_tracing() if settings.telemetry.traces else None)

    def begin(self, call: Call, headers: Iterable[tuple[bytes, bytes]]) -> None:
        model = self._model(call)
        self.metrics.begun(model)
        if self._tracing is not None:
            call.trace = self._tracing.begin(call, model, headers)

    def over(self, call: Call) -> None:
        error = call.error
        if call.attempts and isinstance(error, UpstreamError):
            call.attempts[-1].error = error  # one that was found out behind the last part, too
        record = self._record(call)
        estimate = None if call.reckoned else call.estimate
        self.metrics.over(record, call.gaps, None if estimate is None else estimate.tokens)
        if call.limits_hit:
            self.metrics.limited(call.limits_hit)
        if call.cache:
            self.metrics.looked_up(record.model, call.principal.name, call.cache, call.saved_nano)
        if call.degraded:
            self.metrics.degraded.inc()
        for attempt in call.attempts:
            if isinstance(attempt.error, UpstreamError):
                self.metrics.upstream_failed(attempt.target.label, attempt.error)
        if self._log is not None:
            self._log.put(record)
        if call.trace is not None:
            call.trace.over(call, record)

    def refuse(self, endpoint: Endpoint, id: str, key: str | None, started: float, error: GatewayError) -> None:
        """A request did not even become a call: no key, or nothing that can be understood."""
        outcome = outcome_of(error)
        record = Record(
            ts=time.time(),
            level=LEVELS[outcome],
            id=id,
            key=key,
            endpoint=endpoint.path,
            model=UNKNOWN,
            status=error.status,
            outcome=outcome,
            error=kind_of(error),
            total_ms=int((self.clock() - started) * 1e6) / 1e3,
        )
        self.metrics.refused(record)
        if self._log is not None:
            self._log.put(record)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While the app runs."""
        watch = partial(watch_lag, self.metrics.tick, self.clock)
        watching = asyncio.create_task(supervised("the watch over the event loop", watch))
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            self.metrics.close()
            if self._tracing is not None:
                await asyncio.to_thread(self._tracing.close)

    def _model(self, call: Call) -> str:
        name: str = call.request.value.model
        return name if name in self._models else UNKNOWN

    def _record(self, call: Call) -> Record:
        error, usage, attempts, started, first_at = call.error, call.usage, call.attempts, call.started, call.first_at
        outcome = call.outcome if error is None else outcome_of(error)
        target = upstream_s = own_s = None
        if attempts:
            last, dispatched = attempts[-1], attempts[0].started
            answered = last.ended if first_at is None else first_at
            left = call.left_at - answered  # below 0 where a comment went before
            target = last.target.label
            upstream_s = (answered if answered > call.last_at else call.last_at) - dispatched
            own_s = dispatched - started + (left if left > 0 else 0.0)
        return Record(
            ts=time.time(),
            level=LEVELS[outcome],
            id=f"req_{call.id}",
            key=call.principal.name,
            endpoint=call.endpoint.path,
            model=self._model(call),
            target=target,
            attempts=len(attempts),
            status=call.status,
            outcome=outcome,
            error=None if error is None else kind_of(error),
            stream=call.streamed,
            cache=call.cache or None,
            ttft_ms=None if first_at is None else int((first_at - started) * 1e6) / 1e3,
            total_ms=int((self.clock() - started) * 1e6) / 1e3,
            upstream_ms=None if upstream_s is None else int(upstream_s * 1e6) / 1e3,
            overhead_ms=None if own_s is None else int(own_s * 1e6) / 1e3,
            prompt_tokens=None if usage is None else usage.prompt_tokens,
            completion_tokens=None if usage is None else usage.completion_tokens,
            cached_tokens=None if usage is None else cached_tokens(usage),
        )


def _tracing() -> "Tracing":
    try:
        from gateway.telemetry.traces import Tracing
    except ImportError:
        raise SettingsError(
            "telemetry.traces needs OpenTelemetry: pip install 'suiron[traces]', or write false"
        ) from None
    return Tracing()
