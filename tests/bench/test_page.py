"""The report of many models and tenants: short, and what is left out is told."""

from __future__ import annotations

from typing import Any

from deltaserve.bench.load.page import MOST_GROUPS, report
from tests.bench.fake_server import Behaviour
from tests.bench.running import run, steady


def result(models: int, **content: Any) -> dict[str, Any]:
    names = ("base", *(f"delta-{i:04d}" for i in range(models)))
    shared = steady(2000, models) | {"output": 1, "warmup": 0, "models": list(names[1:])}
    return run(Behaviour(models=names), **(shared | {"popularity": "round_robin"} | content))


def test_a_thousand_models_make_a_small_page():
    found = result(1000)
    text = report(found)
    assert len(text) < 400_000
    assert f"The {MOST_GROUPS} with the most requests of 1,000" in text
    rest = found["models"]
    assert "<td>the other 980</td><td>980</td><td>0</td>" in text
    assert len(rest) == 1000  # all are in the JSON
    assert "... 980 more in the JSON" in text  # of the workload's list of models


def test_the_busiest_are_shown():
    popular = {"kind": "zipf", "alpha": 2.0}
    found = result(40, popularity=popular, requests=300)
    models = found["models"]
    busiest = max(models, key=lambda name: models[name]["requests"])
    text = report(found)
    shown = f"<td>{busiest}</td><td>{models[busiest]['requests']}</td>"
    assert shown in text
    assert ("the other" in text) == (len(models) > MOST_GROUPS)


def test_a_few_groups_have_no_summed_row():
    assert "the other" not in report(result(3))


def test_residency_is_only_what_says_so():
    metrics = (
        "deltaserve:tenant_queue_seconds_total 5\n"
        'deltaserve:deltas{tier="device"} 2\n'
        'deltaserve:tier_limit_bytes{tier="host"} 9\n'
        "vllm:lora_requests_total 7000\n"
    )
    found = run(Behaviour(metrics=metrics), **steady(20, 4), output=1)
    section = report(found).partition("Residency over time")[2].partition("</section>")[0]
    assert "deltaserve:deltas" in section
    assert "queue" not in section
    assert "limit" not in section
    charts = section.split('<div class="legend">')[1:]  # a counter would dwarf the few deltas
    assert ["deltaserve:deltas" in each for each in charts] == [True, False]
    assert ["lora_requests" in each for each in charts] == [False, True]


def test_probes_are_in_no_chart_of_the_load():
    """One of a tenant that has sent nothing yet is in the timeline all the same."""
    probes = {"rate": 40, "output": 2}
    found = run(Behaviour(), tenants=[{"start": 5}], probes=probes, max_time=0.5, output=1)
    assert found["probes"]["completed"] > 5
    text = report(found)
    assert "<rect" in text
    assert "Throughput against latency</h2><p>No request was answered" in text
