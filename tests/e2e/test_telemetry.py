"""Traces of rounds: the stages in their order, nodes as they replied, and the run unmoved by it."""

from __future__ import annotations

import gzip
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fedserver import events
from fedserver.configuration import RunConfiguration, load
from fedserver.ledger import Ledger
from fedserver.telemetry import ENDPOINTS, RoundTraces, traced
from simulations.engines import run_local
from simulations.run import ledger_head

STAGES = ["plan", "send", "aggregate", "ledger"]


@pytest.fixture
def configuration(tiny_scenario: Path) -> RunConfiguration:
    return load(str(tiny_scenario), ["rounds=2", "evaluate=false"])


def by_parent(spans: list[ReadableSpan]) -> dict[int, list[ReadableSpan]]:
    found: dict[int, list[ReadableSpan]] = {}
    for span in spans:
        found.setdefault(span.parent.span_id if span.parent else 0, []).append(span)
    return found


def test_a_rounds_trace_is_what_its_ledger_entry_says(
    configuration: RunConfiguration, tmp_path: Path
) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    heard: list[events.Event] = []
    run_local(configuration, tmp_path / "run", RoundTraces(heard.append, provider))
    assert isinstance(heard[-1], events.RoundsEnded)
    below = by_parent(list(exporter.get_finished_spans()))
    ledger = Ledger(tmp_path / "run")
    entries = list(ledger.entries("round"))
    ledger.close()
    rounds = sorted(below[0], key=lambda span: span.attributes["fedbraid.round"])
    assert [span.name for span in rounds] == ["round"] * len(entries) != []
    for root, entry in zip(rounds, entries, strict=True):
        parts = below[root.context.span_id]
        stages = sorted((s for s in parts if s.name != "node"), key=lambda span: span.start_time)
        assert [span.name for span in stages] == STAGES
        moments = [root.start_time, *(t for s in stages for t in (s.start_time, s.end_time))]
        assert moments == sorted(moments)
        assert stages[-1].end_time <= root.end_time
        assert stages[-1].attributes["fedbraid.head"] == entry.hash
        nodes = {span.attributes["fedbraid.node"]: span for span in parts if span.name == "node"}
        assert set(nodes) == {node["node"] for node in entry.content["nodes"]}
        for node in entry.content["nodes"]:
            span = nodes[node["node"]]
            told = {s.name: s for s in below[span.context.span_id]}
            assert set(told) == {"train", "gate"}
            seconds = (told["train"].end_time - told["train"].start_time) / 1e9
            assert seconds == pytest.approx(entry.wall["nodes"][node["node"]], abs=1e-6)
            assert told["train"].end_time == told["gate"].start_time
            for one in (span, *told.values()):
                assert one.context.trace_id == root.context.trace_id
                assert one.attributes["fedbraid.run"] == configuration.name
                assert one.attributes["fedbraid.round"] == entry.round
                assert one.attributes["fedbraid.family"] == node["family"]
                assert one.attributes["fedbraid.verdict"] == node["verdict"]


@pytest.fixture
def receiver() -> Iterator[Any]:
    """An OTLP endpoint of a few lines: the requests that came, as the protocol's own messages."""
    found: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            assert self.path == "/v1/traces"
            found.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, found
    server.shutdown()
    server.server_close()


def test_an_endpoint_receives_them_and_no_head_changes(
    configuration: RunConfiguration, receiver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, requests = receiver
    heads, warned = {}, {}
    for name, endpoint in (("off", ""), ("on", port), ("nobody there", 9)):
        if endpoint:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{endpoint}")
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
        heard: list[events.Event] = []
        run_local(configuration, tmp_path / name, heard.append)
        warned[name] = sum(
            "at least" in str(event) and "delivered" in str(event) for event in heard
        )
        heads[name] = ledger_head(tmp_path / name)
        assert bool(requests) == (name != "off")
    assert len(set(heads.values())) == 1
    assert warned == {"off": 0, "on": 0, "nobody there": 1}
    resources = [one for request in requests for one in request.resource_spans]
    services = {
        attribute.value.string_value
        for one in resources
        for attribute in one.resource.attributes
        if attribute.key == "service.name"
    }
    assert services == {"fedbraid"}
    spans = [s for one in resources for scope in one.scope_spans for s in scope.spans]
    names = [span.name for span in spans]
    assert {name: names.count(name) for name in (*STAGES, "round")} == dict.fromkeys(
        (*STAGES, "round"), configuration.rounds
    )
    replies = configuration.rounds * len(configuration.nodes)
    assert names.count("train") == names.count("gate") == names.count("node") == replies


def test_without_an_endpoint_or_the_package_there_is_nothing_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard: list[events.Event] = []
    emit = heard.append
    for name in ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    assert traced(emit) is emit
    monkeypatch.setenv(ENDPOINTS[0], "http://127.0.0.1:9/v1/traces")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    assert traced(emit) is emit
    assert [type(event) for event in heard] == [events.Notice]
    assert "fedbraid[telemetry]" in str(heard[0])


def test_a_variable_that_cannot_be_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[events.Event] = []
    emit = heard.append
    monkeypatch.setenv(ENDPOINTS[0], "http://127.0.0.1:9/v1/traces")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "-1")
    assert traced(emit) is emit
    assert [type(event) for event in heard] == [events.Notice]
    assert "no traces" in str(heard[0])
