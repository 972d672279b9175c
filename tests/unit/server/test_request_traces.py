"""Traces: what a collector receives over OTLP, and that nothing depends on it."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from house import ACME, ASK, GLOBEX, opened
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from serving import running

from deltaserve.config import EngineConfig, ServerConfig
from deltaserve.engine.types import FinishReason, RequestTiming, TokenEvent
from deltaserve.server.app import create_app
from deltaserve.server.traces import open_tracing

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TIMING = RequestTiming(queued=0.25, load=0.0, prefill=0.5, decode=1.0)
SECRET = "a prompt that nobody else may read"


class Collector(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.spans: list = []
        self.bytes = b""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1/traces"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        message = ExportTraceServiceRequest.FromString(body)
        self.server.bytes += body
        for resource in message.resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def script(request):
    yield TokenEvent(request.request_id, (5,), num_cached=2)
    yield TokenEvent(request.request_id, (6,), FinishReason.LENGTH, timing=TIMING)


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.shutdown()
    collector.server_close()


def traced(engine, tokenizers, endpoint, ask, **config):
    """``ask(url)`` against a server that traces; when this returns, all spans were sent."""
    tracing = open_tracing(endpoint)
    settings = ServerConfig(EngineConfig("base"), otlp_traces_endpoint=endpoint, **config)
    with running(create_app(engine, tokenizers, settings, tracing=tracing)) as url:
        found = ask(url)
    tracing.close()
    return found


def attributes(span) -> dict[str, object]:
    values = {}
    for pair in span.attributes:
        kind = pair.value.WhichOneof("value")
        value = getattr(pair.value, kind)
        values[pair.key] = (
            [item.string_value for item in value.values] if kind == "array_value" else value
        )
    return values


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span_with_its_answers_and_their_phases(
    engine, all_tokenizers, collector, stream
):
    engine.script = script
    body = {"model": "chatty", "prompt": SECRET, "max_tokens": 2, "n": 2, "stream": stream}

    def ask(url):
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200  # not worth a span
        return answer.headers["x-request-id"]

    request_id = traced(engine, all_tokenizers, collector.url, ask)
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE}
    (root,) = [span for span in collector.spans if span.parent_span_id.hex() == PARENT]
    assert root.name == "POST /v1/completions"
    assert attributes(root) == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "deltaserve.request_id": request_id,
    }
    answers = [span for span in collector.spans if span.parent_span_id == root.span_id]
    assert [span.name for span in answers] == ["generate"] * 2
    for span in answers:
        told = attributes(span)
        assert told["gen_ai.request.model"] == "chatty"
        assert told["gen_ai.usage.output_tokens"] == 2
        assert told["gen_ai.usage.input_tokens"] == len(engine.submitted[0].prompt_ids)
        assert told["gen_ai.response.finish_reasons"] == ["length"]
        assert told["deltaserve.cached_tokens"] == 2
        phases = [each for each in collector.spans if each.parent_span_id == span.span_id]
        lengths = {
            each.name: (each.end_time_unix_nano - each.start_time_unix_nano) / 1e9
            for each in phases
        }
        assert lengths == {"queued": 0.25, "prefill": 0.5, "decode": 1.0}
    assert SECRET.encode() not in collector.bytes


def test_what_ends_otherwise_is_told_too(engine, all_tokenizers, collector):
    def ask(url):
        client = httpx.Client(base_url=url)
        body = {"model": "base", "prompt": "abcdef", "stop": "c"}
        assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == "ab"
        assert client.post("/v1/completions", json={**body, "model": "no"}).status_code == 404
        engine.dead = True
        assert client.post("/v1/completions", json=body).status_code == 503

    traced(engine, all_tokenizers, collector.url, ask)
    roots = [attributes(span) for span in collector.spans if not span.parent_span_id]
    assert [each["http.response.status_code"] for each in roots] == [200, 404, 503]
    (answer,) = [span for span in collector.spans if span.name == "generate"]
    assert attributes(answer)["gen_ai.response.finish_reasons"] == ["stop"]
    failed = [span.status.code for span in collector.spans if span.name != "generate"]
    assert failed == [0, 0, 2]  # only the last is an error of the server


def test_tenants_are_named_and_a_caller_may_refuse(tmp_path, engine, all_tokenizers, collector):
    tracing = open_tracing(collector.url)
    with opened(tmp_path, engine, all_tokenizers, tracing=tracing) as house:
        assert house.complete(ACME).status_code == 200
        headers = {"authorization": f"Bearer {GLOBEX}", "traceparent": f"00-{TRACE}-{PARENT}-00"}
        answer = httpx.post(f"{house.url}/v1/completions", json=ASK, headers=headers)
        assert answer.status_code == 200  # not sampled
        assert house.complete("sk-wrong").status_code == 401
    tracing.close()
    roots = [attributes(span) for span in collector.spans if span.name != "generate"]
    assert [each.get("deltaserve.tenant") for each in roots] == ["acme", None]
    assert roots[1]["http.response.status_code"] == 401
    assert ACME.encode() not in collector.bytes


def test_a_collector_that_is_gone_stops_nobody(engine, all_tokenizers, collector):
    url = collector.url
    collector.shutdown()
    collector.server_close()

    def ask(url):
        body = {"model": "base", "prompt": "ab", "max_tokens": 1}
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200

    traced(engine, all_tokenizers, url, ask)
