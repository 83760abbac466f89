"""What does a trace tell of a request? OpenTelemetry's semantic conventions for GenAI; its only door."""

import os
import re
import threading
import time
from collections.abc import Iterable

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.util.types import AttributeValue

from gateway import __version__
from gateway.call import Attempt, Call
from gateway.schema.endpoint import Verb
from gateway.telemetry.record import UNKNOWN, Record, kind_of

NAMES = {
    "operation": "gen_ai.operation.name",
    "provider": "gen_ai.provider.name",
    "request_model": "gen_ai.request.model",
    "response_model": "gen_ai.response.model",
    "response_id": "gen_ai.response.id",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "error": "error.type",
    "status": "http.response.status_code",
    "outcome": "suiron.outcome",
    "attempts": "suiron.attempts",
    "ttft_ms": "suiron.time_to_first_token_ms",
    "overhead_ms": "suiron.overhead_ms",
}
"""The conventions are still in development: a name that changes, changes here. Ours begin with `suiron`."""

OPERATIONS: dict[Verb, str] = {"chat": "chat", "complete": "text_completion", "embed": "embeddings"}

CLOSE_S = 2.0

_TRACEPARENT = re.compile(rb"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")


class Tracing:
    """
    Spans, on their way to a collector.

    Without a *sink* they go where OpenTelemetry's own variables say: OTEL_EXPORTER_OTLP_ENDPOINT and the others.
    """

    def __init__(self, sink: SpanProcessor | None = None) -> None:
        resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "suiron")})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(sink or BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("suiron", __version__)

    def begin(self, call: Call, model: str, headers: Iterable[tuple[bytes, bytes]]) -> "RequestTrace":
        """The trace of one request: a part of its client's, where *headers* name one."""
        return RequestTrace(self._tracer, call, model, _parent(headers))

    def close(self) -> None:
        """Sends what is left, but does not wait long for a collector that is away."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_S)


class RequestTrace:
    """A span for the request, and one for each attempt to have it answered."""

    def __init__(self, tracer: trace.Tracer, call: Call, model: str, parent: Context | None) -> None:
        self._tracer = tracer
        self._operation = OPERATIONS[call.endpoint.verb]
        self._offset_s = time.time() - call.clock()
        self._span = self._start(model, SpanKind.SERVER, call.started, parent or Context())
        self._inside = trace.set_span_in_context(self._span, Context())
        self._attempts: list[Span] = []

    def dispatched(self, attempt: Attempt) -> str:
        """The `traceparent` to send along."""
        span = self._start(attempt.target.model, SpanKind.CLIENT, attempt.started, self._inside)
        span.set_attribute(NAMES["provider"], attempt.target.upstream)
        self._attempts.append(span)
        context = span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def over(self, call: Call, record: Record) -> None:
        for span, attempt in zip(self._attempts, call.attempts, strict=False):
            _finish(span, None if attempt.error is None else kind_of(attempt.error))
            span.end(self._at(attempt.ended))
        response = {} if record.outcome != "completed" else {
            "response_model": record.model,
            "response_id": call.endpoint.id_prefix + call.id,
        }  # fmt: skip
        told: dict[str, AttributeValue | None] = {
            **response,
            "provider": "suiron",
            "prompt_tokens": record.prompt_tokens,
            "completion_tokens": record.completion_tokens,
            "cached_tokens": record.cached_tokens,
            "status": record.status,
            "outcome": record.outcome,
            "attempts": record.attempts,
            "ttft_ms": record.ttft_ms,
            "overhead_ms": record.overhead_ms,
        }
        self._span.set_attributes({NAMES[name]: value for name, value in told.items() if value is not None})
        _finish(self._span, record.error or (record.outcome if record.outcome != "completed" else None))
        self._span.end(self._at(call.started + record.total_ms / 1000))

    def _start(self, model: str, kind: SpanKind, started: float, context: Context) -> Span:
        attributes = {NAMES["operation"]: self._operation}
        if model != UNKNOWN:
            attributes[NAMES["request_model"]] = model
        name = f"{self._operation} {model}"
        return self._tracer.start_span(name, context, kind, attributes, start_time=self._at(started))

    def _at(self, when: float) -> int:
        """Nanoseconds since 1970."""
        return int((when + self._offset_s) * 1e9)


def _finish(span: Span, error: str | None) -> None:
    if error is not None:
        span.set_attribute(NAMES["error"], error)
        span.set_status(Status(StatusCode.ERROR))


def _parent(headers: Iterable[tuple[bytes, bytes]]) -> Context | None:
    """What the one `traceparent` names; None where there is none, or two, or it is not as W3C's Trace Context says."""
    given = [value for name, value in headers if name == b"traceparent"]
    found = _TRACEPARENT.fullmatch(given[0]) if len(given) == 1 else None
    if found is None:
        return None
    context = SpanContext(
        int(found[1], 16), int(found[2], 16), is_remote=True, trace_flags=TraceFlags(int(found[3], 16))
    )
    return trace.set_span_in_context(NonRecordingSpan(context), Context()) if context.is_valid else None
