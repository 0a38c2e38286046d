"""Saves and loads as spans, for a collector that speaks OpenTelemetry's protocol over HTTP."""

from __future__ import annotations

from typing import Any

from bridge.training.checkpointing.events.kinds import Event
from bridge.training.checkpointing.events.sinks.requiring import require
from bridge.training.checkpointing.events.spans import Span, Spans

_SETTING = "logger.otlp_endpoint"
_EXTRA = "opentelemetry"
_SERVICE = "bridge"


class OpenTelemetrySink:
    """Sends each span as soon as it is over, by this sink's own thread and with a provider of its own."""

    def __init__(self, endpoint: str, run_name: str | None = None) -> None:
        """
        Args:
            endpoint: `logger.otlp_endpoint`; `/v1/traces` is added to one without a path.
            run_name: `service.instance.id` of the spans.

        Raises:
            EventSinkError: the packages of OpenTelemetry are not installed.
        """
        exporter = require("opentelemetry.exporter.otlp.proto.http.trace_exporter", _SETTING, _EXTRA)
        trace = require("opentelemetry.sdk.trace", _SETTING, _EXTRA)
        export = require("opentelemetry.sdk.trace.export", _SETTING, _EXTRA)
        resources = require("opentelemetry.sdk.resources", _SETTING, _EXTRA)
        self._api: Any = require("opentelemetry.trace", _SETTING, _EXTRA)
        self._failed: Any = export.SpanExportResult.FAILURE
        attributes = {"service.name": _SERVICE, **({} if run_name is None else {"service.instance.id": run_name})}
        # No processor in the background: it would begin a thread in every process that is forked to write.
        self._provider = trace.TracerProvider(resource=resources.Resource.create(attributes), shutdown_on_exit=False)
        self._exporter = exporter.OTLPSpanExporter(endpoint=_traces_of(endpoint), timeout=5)
        self._tracer = self._provider.get_tracer("bridge.checkpointing")
        self._spans = Spans()

    def take(self, event: Event) -> None:
        """Send the spans that end with an event.

        Raises:
            RuntimeError: the collector did not take them.
        """
        for span in self._spans.after(event):
            ready: list[Any] = []
            self._make(span, None, ready)
            if self._exporter.export(ready) is self._failed:
                raise RuntimeError("the collector did not take a span")

    def close(self) -> None:
        """End the exporter."""
        self._exporter.shutdown()
        self._provider.shutdown()

    def _make(self, span: Span, parent: Any, ready: list[Any]) -> None:
        made = self._tracer.start_span(
            span.name, context=parent, start_time=_nanoseconds(span.start), attributes=dict(span.attributes)
        )
        context = self._api.set_span_in_context(made)
        for child in span.children:
            self._make(child, context, ready)
        if span.error is not None:
            made.set_status(self._api.Status(self._api.StatusCode.ERROR, span.error))
        made.end(_nanoseconds(span.end))
        ready.append(made)


def _traces_of(endpoint: str) -> str:
    base = endpoint.rstrip("/")
    return base if "/" in base.partition("://")[2] else f"{base}/v1/traces"


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
