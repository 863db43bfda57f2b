"""A round as an OpenTelemetry trace: plan, send, each node's training and gate, aggregate, ledger.

Made from events alone, on the server: no context of a trace crosses to a node, and a node's span is as
long as its reply says. Off unless OpenTelemetry's own variables name an endpoint; what cannot be
delivered is dropped, and the run goes on.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fedserver import events

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
NANOSECONDS = 1_000_000_000
# Ten thousand nodes end within one round, each with three spans.
LONGEST_QUEUE = 1 << 16
FLUSH_MILLISECONDS = 5000


def traced(emit: events.Listener) -> events.Listener:
    """``emit``, and traces beside it where an endpoint is configured."""
    endpoint = next((name for name in ENDPOINTS if os.environ.get(name)), None)
    if endpoint is None:
        return emit
    try:
        provider, lost = _provider()
    except Exception as error:
        # OpenTelemetry reads its many variables while it is set up, and raises what it likes.
        need = f"they cannot be made: {error}"
        if isinstance(error, ImportError):
            need = "they need pip install 'fedbraid[telemetry]'"
        emit(events.Notice("warning", f"{endpoint} is set, but there are no traces: {need}"))
        return emit
    return RoundTraces(emit, provider, lost=lost)


class RoundTraces:
    """A listener that passes every event on, and makes spans of those of a round."""

    def __init__(
        self,
        emit: events.Listener,
        provider: TracerProvider,
        *,
        now: Callable[[], float] = time.time,
        lost: Callable[[], int] = lambda: 0,
    ) -> None:
        """``lost``: how many spans could not be delivered, those apart that a full queue dropped."""
        self._lost = lost
        self._emit = emit
        self._provider = provider
        self._tracer = provider.get_tracer("fedbraid")
        self._now = now
        self._run: dict[str, str] = {}
        self._round: Span | None = None
        self._stage: Span | None = None
        self._plans_sent = 0

    def __call__(self, event: events.Event) -> None:
        """Take one event."""
        self._emit(event)
        moment = int(self._now() * NANOSECONDS)
        match event:
            case events.RunStarted():
                self._run = {"fedbraid.run": event.name, "fedbraid.preset": event.preset}
            case events.RoundStarted():
                self._end_round(moment)
                self._round = self._span("round", event.round, moment)
            case events.PhaseStarted(phase="plan" | "aggregate"):
                self._enter(event.phase, event.round, moment)
            case events.PhaseStarted(phase="train"):
                self._plans_sent = moment
                told = {"fedbraid.nodes": event.nodes, "fedbraid.quorum": event.quorum}
                self._enter("send", event.round, moment, told)
            case events.PhaseStarted(phase="commit"):
                self._enter("ledger", event.round, moment)
            case events.PlansSent():
                self._plans_sent = moment
                if self._stage is not None:
                    self._stage.set_attribute("fedbraid.bytes", event.bytes)
                self._end_stage(moment)
            case events.NodeReplied():
                self._reply(event, moment)
            case events.RoundCommitted():
                for span in (self._stage, self._round):
                    if span is not None:
                        span.set_attribute("fedbraid.head", event.head)
                if self._round is not None:
                    self._round.set_attributes(
                        {"fedbraid.accepted": event.accepted, "fedbraid.refused": event.rejected}
                    )
                self._end_round(moment)
            case events.RoundsEnded():
                self._end_round(moment)
                self._provider.force_flush(FLUSH_MILLISECONDS)
                self._provider.shutdown()
                if self._lost():
                    text = (
                        f"at least {self._lost()} spans could not be delivered to the traces'"
                        " endpoint"
                    )
                    self._emit(events.Notice("warning", text))
            case _:
                pass

    def _reply(self, event: events.NodeReplied, moment: int) -> None:
        """A node's span, from the plans' sending to the verdict, with its training and its gate."""
        if self._round is None:
            return
        judged = moment - int(event.gate_seconds * NANOSECONDS)
        trained = judged - int(event.seconds * NANOSECONDS)
        # A simulation's clock, and one that lies, may say more than has passed here.
        began = min(self._plans_sent or trained, trained)
        told = {
            "fedbraid.node": event.node,
            "fedbraid.family": event.family,
            "fedbraid.verdict": event.verdict,
            "fedbraid.bytes_up": event.bytes_up,
            "fedbraid.bytes_down": event.bytes_down,
        }
        node = self._span("node", event.round, began, told, self._round)
        if event.seconds and event.verdict != "missing":
            self._span("train", event.round, trained, told, node).end(judged)
        if event.gate_seconds:
            gate = self._span("gate", event.round, judged, told, node)
            if event.reason:
                gate.set_attribute("fedbraid.reason", event.reason)
            gate.end(moment)
        node.end(moment)

    def _enter(
        self, name: str, number: int, moment: int, told: dict[str, Any] | None = None
    ) -> None:
        self._end_stage(moment)
        if self._round is not None:
            self._stage = self._span(name, number, moment, told, self._round)

    def _end_stage(self, moment: int) -> None:
        if self._stage is not None:
            self._stage.end(moment)
            self._stage = None

    def _end_round(self, moment: int) -> None:
        self._end_stage(moment)
        if self._round is not None:
            self._round.end(moment)
            self._round = None

    def _span(
        self,
        name: str,
        number: int,
        moment: int,
        told: dict[str, Any] | None = None,
        parent: Span | None = None,
    ) -> Span:
        from opentelemetry.context import Context
        from opentelemetry.trace import set_span_in_context

        context = set_span_in_context(parent) if parent is not None else Context()
        attributes = {**self._run, "fedbraid.round": number, **(told or {})}
        return self._tracer.start_span(name, context, attributes=attributes, start_time=moment)


def _provider() -> tuple[TracerProvider, Callable[[], int]]:
    """Spans to the endpoint that the environment names; and how many could not be delivered."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult

    class Exporter(OTLPSpanExporter):
        """Counts instead of writing into a terminal that shows a run."""

        lost = 0

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            result = super().export(spans)
            if result is not SpanExportResult.SUCCESS:
                self.lost += len(spans)
            return result

    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    # What OTEL_SERVICE_NAME says counts more than this.
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: "fedbraid"}
    provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
    exporter = Exporter()
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=LONGEST_QUEUE))
    return provider, lambda: exporter.lost
