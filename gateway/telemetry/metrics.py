"""What is counted? The only door to the Prometheus client, in a registry of its own."""

import dataclasses
import os
import platform
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from gateway import __version__
from gateway.call import GAPS_S, Tally
from gateway.errors import UpstreamError
from gateway.settings import SettingsError
from gateway.telemetry.record import NONE, Outcome, Record

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
SHARED = "PROMETHEUS_MULTIPROC_DIR"

WAIT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
OWN_S = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
RATIOS = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.01, 1.05, 1.1, 1.2, 1.4, 2, 4)
LAG_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


RISING_AND_FALLING = frozenset({"backlog", "lag_s"})


class Distribution(Histogram):
    """A histogram that takes in what was counted elsewhere."""

    def take(self, tally: Tally) -> None:
        self._sum.inc(tally.total)
        for bucket, count in zip(self._buckets, tally.counts, strict=True):
            if count:
                bucket.inc(count)


class _Series:
    """
    What was counted for one model and target since the last time it was taken over.

    Plain numbers: a count by the client takes a lock, and four times as long.
    """

    def __init__(self) -> None:
        self.duration = Tally(WAIT_S)
        self.first_token = Tally(WAIT_S)
        self.between_tokens = Tally(GAPS_S)
        self.overhead = Tally(OWN_S)
        self.estimates = Tally(RATIOS)
        self.prompt = self.completion = self.cached = 0

    def count(self, record: Record, gaps: Tally | None, estimated: int | None) -> None:
        self.duration.add(record.total_ms / 1000)
        if record.overhead_ms is not None:
            self.overhead.add(record.overhead_ms / 1000)
        if record.stream and record.ttft_ms is not None:
            self.first_token.add(record.ttft_ms / 1000)
        if gaps is not None:
            self.between_tokens.join(gaps)
        if record.prompt_tokens is not None and record.completion_tokens is not None:
            self.prompt += max(0, record.prompt_tokens)  # an upstream may say anything
            if estimated is not None and record.prompt_tokens > 0:
                self.estimates.add(estimated / record.prompt_tokens)
            self.completion += max(0, record.completion_tokens)
            if record.cached_tokens is not None:
                self.cached += max(0, record.cached_tokens)


class Standing(Protocol):
    """How a target stands, as routing tells it."""

    @property
    def target(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def in_flight(self) -> int: ...


class _Watched:
    """Plain numbers that another part counts, told of as `suiron_<part>_<name>`; `RISING_AND_FALLING` are gauges."""

    def __init__(self, part: str, counts: Any, registry: CollectorRegistry) -> None:
        self._counts = counts
        self._told: dict[str, float] = {}
        self._metrics: dict[str, Counter | Gauge] = {}
        for field in dataclasses.fields(counts):
            name = f"suiron_{part}_{re.sub('_s$', '_seconds', field.name)}"
            about = f"Of the {part}: {field.name.replace('_', ' ')}."
            self._metrics[field.name] = (
                Gauge(name, about, registry=registry, multiprocess_mode="livesum")
                if field.name in RISING_AND_FALLING
                else Counter(name, about, registry=registry)
            )

    def settle(self) -> None:
        for name, metric in self._metrics.items():
            value = getattr(self._counts, name)
            if isinstance(metric, Gauge):
                metric.set(value)
            elif more := value - self._told.get(name, 0):
                metric.inc(more)
                self._told[name] = value


class Metrics:
    """
    The metrics of one app.

    Where PROMETHEUS_MULTIPROC_DIR is set, they are kept in files there, and every process tells of all. Raises
    SettingsError if it is no directory.
    """

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, that nobody reads
        self._shared = os.environ.get(SHARED)
        if self._shared is not None and not Path(self._shared).is_dir():
            raise SettingsError(f"{SHARED}={self._shared} is no directory: make it, and empty it before each start")
        self._registry = registry = CollectorRegistry()
        self.targets: Callable[[], Iterable[Standing]] = tuple
        self._over: dict[tuple[str, str | None, int | None, Outcome], int] = {}
        self._series: dict[tuple[str, str], _Series] = {}
        self._flying: dict[str, int] = {}
        self._limits: dict[tuple[str, str], int] = {}
        self._cached: dict[tuple[str, str, str], tuple[int, int]] = {}
        self._watched: list[_Watched] = []
        build = Gauge("suiron_build_info", "1.", ("version", "python"), registry=registry, multiprocess_mode="livemax")
        build.labels(__version__, platform.python_version()).set(1)
        if self._shared is None:
            ProcessCollector(registry=registry)
        self._declare(registry)

    def _declare(self, registry: CollectorRegistry) -> None:
        """All that there is, but for what other parts count; name, meaning, labels."""
        counter = partial(Counter, registry=registry)
        gauge = partial(Gauge, registry=registry, multiprocess_mode="livesum")
        distribution = partial(Distribution, registry=registry)
        model, target, both = ("model",), ("target",), ("model", "target")

        about = "Requests that are over."
        self.requests = counter("suiron_requests", about, (*both, "status", "outcome"))
        about = "Requests under way."
        self.in_flight = gauge("suiron_requests_in_flight", about, model)
        about = "From the end of the request to the end of its answer."
        self.duration = distribution("suiron_request_duration_seconds", about, both, buckets=WAIT_S)
        about = "From the request to the first part of its stream."
        self.first_token = distribution("suiron_time_to_first_token_seconds", about, both, buckets=WAIT_S)
        about = "Between what arrives of a stream; tokens that arrive together count once."
        self.between_tokens = distribution("suiron_time_between_tokens_seconds", about, both, buckets=GAPS_S)
        about = "What the gateway adds: before the first dispatch, and between the first part's arrival and leaving."
        self.overhead = distribution("suiron_gateway_overhead_seconds", about, model, buckets=OWN_S)
        about = "Tokens that a prompt was estimated to have, for each that the upstream counted: 1 is right."
        self.estimates = distribution("suiron_token_estimate_error", about, model, buckets=RATIOS)
        about = "How late the event loop is, four times a second."
        self.lag = distribution("suiron_event_loop_lag_seconds", about, buckets=LAG_S)

        about = "Tokens, as upstreams say; by our own count where one did not."
        self.tokens = counter("suiron_tokens", about, ("model", "kind"))
        about = "Attempts that failed by the upstream's fault."
        self.upstream_errors = counter("suiron_upstream_errors", about, ("target", "kind"))
        about = "Attempts after a failed one, by the target that failed."
        self.retries = counter("suiron_retries", about, target)
        about = "Failures that were not tried elsewhere, because too many were."
        self.refused_retries = counter("suiron_retries_refused", about, target)
        about = "How often a target was left alone for a while, and why."
        self.ejections = counter("suiron_target_ejections", about, ("target", "reason"))
        about = "1, or 0 while it is left alone or on trial."
        self.target_up = gauge("suiron_target_up", about, target, multiprocess_mode="livemin")
        about = "Attempts under way."
        self.target_in_flight = gauge("suiron_target_requests_in_flight", about, target)

        about = "Limits that refused, would have, or were nearly used up."
        self.limits = counter("suiron_limits", about, ("limit", "result"))
        about = "Requests admitted or refused while the store was out of reach."
        self.degraded = counter("suiron_degraded_requests", about)
        about = "Requests to models that keep answers: hit, shared, miss, or bypass."
        self.cached = counter("suiron_cache_requests", about, ("model", "key", "result"))
        about = "What hits and shared answers would have cost besides."
        self.saved = counter("suiron_cache_saved_usd", about, ("model", "key"))
        about = "Log lines lost because nobody took them."
        self.dropped = counter("suiron_log_lines_dropped", about)

    def begun(self, model: str) -> None:
        self._flying[model] = self._flying.get(model, 0) + 1

    def over(self, record: Record, gaps: Tally | None, estimated: int | None = None) -> None:
        """A request that had begun is over; its prompt was *estimated* to have so many tokens, if an upstream knows."""
        self._flying[record.model] -= 1
        self.refused(record)
        if record.target is not None:
            key = (record.model, record.target)
            series = self._series.get(key) or self._series.setdefault(key, _Series())
            series.count(record, gaps, estimated)

    def refused(self, record: Record) -> None:
        """A request is over that never began."""
        key = (record.model, record.target, record.status, record.outcome)
        self._over[key] = self._over.get(key, 0) + 1

    def limited(self, hit: Iterable[tuple[str, str]]) -> None:
        """Limits that a request has met, and what came of each."""
        for limit in hit:
            self._limits[limit] = self._limits.get(limit, 0) + 1

    def looked_up(self, model: str, key: str, result: str, saved_nano: int) -> None:
        """A request has been through the cache."""
        number, saved = self._cached.get((model, key, result), (0, 0))
        self._cached[model, key, result] = (number + 1, saved + saved_nano)

    def watch(self, part: str, counts: Any) -> None:
        """From now on tell of *counts*, a dataclass of plain numbers."""
        self._watched.append(_Watched(part, counts, self._registry))

    def upstream_failed(self, target: str, error: UpstreamError) -> None:
        self.upstream_errors.labels(target, type(error).code or NONE).inc()

    def retried(self, target: str) -> None:
        self.retries.labels(target).inc()

    def no_retry_left(self, target: str) -> None:
        self.refused_retries.labels(target).inc()

    def ejected(self, target: str, reason: str) -> None:
        self.ejections.labels(target, reason).inc()

    def tick(self, lag_s: float) -> None:
        self.lag.observe(lag_s)
        self.settle()

    def settle(self) -> None:
        """Hands what was counted to the client; on the event loop's thread, as all that counts."""
        for model, number in self._flying.items():
            self.in_flight.labels(model).set(number)
        for standing in self.targets():
            self.target_up.labels(standing.target).set(standing.state == "up")
            self.target_in_flight.labels(standing.target).set(standing.in_flight)
        for watched in self._watched:
            watched.settle()
        limits, self._limits = self._limits, {}
        for (limit, result), number in limits.items():
            self.limits.labels(limit, result).inc(number)
        cached, self._cached = self._cached, {}
        for (model, key, result), (number, saved_nano) in cached.items():
            self.cached.labels(model, key, result).inc(number)
            if saved_nano:
                self.saved.labels(model, key).inc(saved_nano / 1e9)
        over, self._over = self._over, {}
        for (model, target, status, outcome), number in over.items():
            self.requests.labels(model, target or NONE, status or NONE, outcome).inc(number)
        counted, self._series = self._series, {}
        for (model, target), series in counted.items():
            self.duration.labels(model, target).take(series.duration)
            self.overhead.labels(model).take(series.overhead)
            if any(series.first_token.counts):  # there was a stream
                self.first_token.labels(model, target).take(series.first_token)
                self.between_tokens.labels(model, target).take(series.between_tokens)
            if any(series.estimates.counts):
                self.estimates.labels(model).take(series.estimates)
            self.tokens.labels(model, "prompt").inc(series.prompt)
            self.tokens.labels(model, "completion").inc(series.completion)
            self.tokens.labels(model, "cached").inc(series.cached)

    def render(self) -> bytes:
        """Prometheus' text format, as of the last `settle`. Takes milliseconds: not for the event loop's thread."""
        if self._shared is None:
            return generate_latest(self._registry)
        everybody = CollectorRegistry()
        MultiProcessCollector(everybody, self._shared)  # type: ignore[no-untyped-call]
        return generate_latest(everybody)

    def close(self) -> None:
        """What is in flight here counts no longer."""
        self.settle()
        if self._shared is not None:
            mark_process_dead(os.getpid(), self._shared)  # type: ignore[no-untyped-call]
