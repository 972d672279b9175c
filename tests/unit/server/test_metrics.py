"""What Prometheus sees: vLLM's names, true numbers, a bounded number of series."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import yaml
from fake_engine import KEY
from prometheus_client.parser import text_string_to_metric_families

from deltaserve.engine.types import FinishReason, RequestTiming, TokenEvent, Usage
from deltaserve.errors import LimitError, QueueFullError
from deltaserve.server.metrics import MAX_VALUES, OTHER, Metrics
from deltaserve.tenancy.tenants import read_tenants

CONFIGS = Path(__file__).parents[3] / "configs"

# The contract of dashboards that were made for vLLM.
VLLM = [
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries",
    "prefix_cache_hits", "num_preemptions", "prompt_tokens", "generation_tokens",
    "prompt_tokens_cached", "request_success", "admission_rejections",
    "time_to_first_token_seconds", "inter_token_latency_seconds",
    "request_time_per_output_token_seconds", "e2e_request_latency_seconds",
    "request_queue_time_seconds", "request_inference_time_seconds",
    "request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens",
    "request_generation_tokens",
]  # fmt: skip


def samples(text: str) -> dict[tuple[str, ...], float]:
    """(name, label values in order of their names) -> value."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def families(text: str) -> set[str]:
    return {family.name for family in text_string_to_metric_families(text)}


@pytest.fixture
def metrics(engine):
    return Metrics(engine)


def read(metrics: Metrics) -> dict[tuple[str, ...], float]:
    return samples(metrics.text().decode())


def test_the_names_are_vllms(metrics):
    assert {f"vllm:{name}" for name in VLLM} <= families(metrics.text().decode())


def test_a_sequence_is_timed_from_its_beginning_to_its_end(engine):
    clock = iter([10.0, 10.2, 10.25, 10.35])
    metrics = Metrics(engine, lambda: next(clock))
    watch = metrics.watch("chatty", prompt_tokens=7)
    timing = RequestTiming(queued=0.05, load=0.01, prefill=0.1, decode=0.15)
    for event in (
        TokenEvent("r", (5,)),
        TokenEvent("r", (6,)),
        TokenEvent("r", (7, 8), FinishReason.STOP, timing=timing),
    ):
        watch.see(event)
    found = read(metrics)

    def total(name: str) -> float:
        return found[f"vllm:{name}_sum", "0", "chatty"]

    assert total("time_to_first_token_seconds") == pytest.approx(0.2)
    assert total("inter_token_latency_seconds") == pytest.approx(0.15)
    assert total("request_time_per_output_token_seconds") == pytest.approx(0.15 / 3)
    assert total("e2e_request_latency_seconds") == pytest.approx(0.35)
    assert total("request_queue_time_seconds") == pytest.approx(0.06)
    assert total("request_inference_time_seconds") == pytest.approx(0.25)
    assert total("request_prompt_tokens") == 7
    assert total("request_generation_tokens") == 4
    assert found["vllm:request_success_total", "0", "stop", "chatty"] == 1


def test_the_engines_counters_are_told_by_model_and_by_tenant(metrics, engine, monkeypatch):
    stats = replace(
        engine.stats(),
        running=3,
        kv_blocks_total=10,
        kv_blocks_used=4,
        models={"chatty": Usage(requests=2, prompt_tokens=30, generation_tokens=8)},
        tenants={"acme": Usage(requests=2, prompt_tokens=30, queued_s=1.5, load_s=0.5)},
    )
    monkeypatch.setattr(engine, "stats", lambda: stats)
    found = read(metrics)
    assert found["vllm:num_requests_running", "0", "base"] == 3
    assert found["vllm:kv_cache_usage_perc", "0", "base"] == 0.4
    assert found["vllm:prompt_tokens_total", "0", "chatty"] == 30
    assert found["vllm:generation_tokens_total", "0", "chatty"] == 8
    assert found["deltaserve:tenant_requests_total", "acme"] == 2
    assert found["deltaserve:tenant_queue_seconds_total", "acme"] == 2.0
    assert found["deltaserve:deltas", "ready", "device"] == 2
    assert found["deltaserve:delta_bytes", "team/grown", "device"] == 100


def test_refusals_are_counted_by_reason_and_tenant(metrics):
    limit = LimitError("no", limit="tpm_limit", retry_after_s=1.0)
    metrics.refuse(limit, "acme")
    metrics.refuse(limit, "acme")
    metrics.refuse(QueueFullError("full"), "acme")
    metrics.refuse(ValueError("something else"), "acme")
    found = read(metrics)
    assert found["deltaserve:limited_requests_total", "tpm_limit", "acme"] == 2
    assert found["vllm:admission_rejections_total", "0", "tpm_limit"] == 2
    assert found["vllm:admission_rejections_total", "0", "queue_full"] == 1


def test_the_number_of_series_is_bounded_and_the_sums_stay_right(metrics, engine, monkeypatch):
    many = {f"t{number}": Usage(prompt_tokens=1) for number in range(5 * MAX_VALUES)}
    stats = replace(engine.stats(), tenants=many, models=many)
    monkeypatch.setattr(engine, "stats", lambda: stats)
    for name in many:
        metrics.watch(name, 1).see(TokenEvent("r", (5,)))
        metrics.refuse(LimitError("no", limit="rpm_limit", retry_after_s=1.0), name)
    for _ in range(2):
        found = read(metrics)
        for name in (
            "deltaserve:tenant_prompt_tokens_total",
            "vllm:prompt_tokens_total",
            "vllm:time_to_first_token_seconds_count",
            "deltaserve:limited_requests_total",
        ):
            mine = {key: value for key, value in found.items() if key[0] == name}
            assert len(mine) <= MAX_VALUES + 1
            assert sum(mine.values()) == len(many)
            assert any(OTHER in key for key in mine)


def test_requests_over_http_are_counted(http):
    before = samples(http.get("/metrics").text)
    assert http.post("/v1/completions", json={"model": "chatty", "prompt": "hi"}).is_success
    after = samples(http.get("/metrics").text)
    for key in (
        ("vllm:time_to_first_token_seconds_count", "0", "chatty"),
        ("vllm:request_success_total", "0", "stop", "chatty"),
    ):
        assert after[key] == before.get(key, 0) + 1


def test_metrics_need_the_key_where_there_is_one(locked_url):
    assert httpx.get(f"{locked_url}/metrics").status_code == 401
    right = {"authorization": f"Bearer {KEY}"}
    answer = httpx.get(f"{locked_url}/metrics", headers=right)
    assert answer.headers["content-type"].startswith("text/plain")
    assert "vllm:num_requests_running" in answer.text


def test_the_dashboard_asks_for_what_there_is(metrics):
    board = json.loads((CONFIGS / "grafana.json").read_text())
    known = families(metrics.text().decode())
    asked = set(re.findall(r"(?:vllm|deltaserve):[a-z0-9_]+", json.dumps(board["panels"])))
    assert len(asked) > 20
    assert {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in asked} <= known
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))


def test_the_examples_are_valid():
    scrape = yaml.safe_load((CONFIGS / "prometheus.yml").read_text())["scrape_configs"]
    assert scrape[0]["static_configs"][0]["targets"] == ["127.0.0.1:8000"]
    acme, globex = read_tenants(CONFIGS / "tenants.yaml")
    assert acme.allows("acme/chat")
    assert not globex.allows("acme/chat")
