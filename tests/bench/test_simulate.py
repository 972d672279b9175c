"""The simulator: the engine's decisions in virtual time, computed costs, and bad input."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltaserve.bench.load.result import document
from deltaserve.bench.load.workload import make_workload
from deltaserve.bench.simulate.calibrate import calibrate, fit_steps
from deltaserve.bench.simulate.costs import Shape, costs_of
from deltaserve.bench.simulate.router import Router
from deltaserve.bench.simulate.simulate import simulate
from deltaserve.bench.simulate.system import (
    Base,
    Deltas,
    Device,
    Measured,
    System,
    as_yaml,
    changed,
    read_system,
)
from deltaserve.bench.simulate.virtual import run as in_virtual_time
from deltaserve.cli.main import dispatch
from deltaserve.errors import ConfigError

SYSTEMS = [p for p in sorted(Path("configs/simulate").glob("*.yaml")) if "load" not in p.name]
STEP = Measured(step=0.01, prompt_token=0.0001, drawn_token=0.001, delta=0.002)


def system(**changes: Any) -> System:
    values: dict[str, Any] = {
        "device": Device(80, 1000, 100, 10, 1, bandwidth_share=1, flops_share=1, step_s=0),
        "base": Base(1, 10, 1000, 4, 50, context=2048),
        "deltas": Deltas(4, device_gb=0.1, prepare_s=0.05),
        "measured": STEP,
        "request_s": 0.0,
    }
    return System(**(values | changes))


def play(installation: System, **content: Any) -> dict[str, Any]:
    workload = make_workload({"models": "deltas", **content})
    result = document(simulate(installation, workload, lambda name, run: None), detailed=True)
    json.dumps(result, allow_nan=False)
    return result


def test_time_passes_only_when_nothing_is_to_be_done():
    async def wait() -> float:
        await asyncio.gather(asyncio.sleep(3600), asyncio.sleep(7200))
        return asyncio.get_running_loop().time()

    began = time.monotonic()
    assert in_virtual_time(wait()) == pytest.approx(7200)
    assert time.monotonic() - began < 5


def test_a_lone_request_takes_what_its_steps_cost():
    content = {"arrivals": {"kind": "constant", "rate": 1}, "requests": 3, "prompt": 100}
    found = play(system(request_s=0.02, between_s=0.001), **content, output=11)["summary"]
    # One step of 100 tokens of a prompt, then 10 of one row; all with one delta.
    prefill, decode = 0.01 + 0.01 + 0.002, 0.01 + 0.001 + 0.002
    assert found["ttft"]["p50"] == pytest.approx(0.02 + prefill + 0.001, rel=1e-3)
    assert found["tpot"]["p50"] == pytest.approx(decode + 0.001, rel=1e-3)
    assert found["lateness"]["max"] == pytest.approx(0, abs=1e-6)
    assert found["output_tokens"] == 33


def test_the_same_seed_simulates_the_same():
    content = {"arrivals": 5, "duration": 10, "output": 20, "turns": {"count": 2}, "scrape": 2}
    first, second = (play(system(), **content)["requests"] for _ in range(2))
    assert first == second


def test_turns_find_what_was_said_before_in_the_cache():
    content = {"arrivals": 1, "requests": 5, "prompt": 64, "output": 64}
    told = play(system(), **content, turns={"count": 3, "think": 1})
    by_turn = np.array(told["requests"]["cached_tokens"]), np.array(told["requests"]["turn"])
    assert (by_turn[0][by_turn[1] == 0] == 0).all()
    assert (by_turn[0][by_turn[1] == 2] > 200).all()
    assert play(system(), **content)["summary"]["cached_tokens"] == 0


def test_deltas_that_do_not_fit_are_loaded_and_that_costs_time():
    content = {"arrivals": 10, "duration": 20, "output": 4, "popularity": "uniform"}
    roomy = play(system(), **content)
    tight = play(system(engine={"delta_memory_bytes": 200_000_000}), **content)
    assert roomy["server"]["delta_loads"] == 0
    assert tight["server"]["delta_loads"] > 20
    assert tight["server"]["residency_hit_rate"] < 0.9
    assert tight["summary"]["ttft"]["p50"] > 2 * roomy["summary"]["ttft"]["p50"]
    assert tight["summary"]["failed"] == 0


def test_fair_shares_and_weights_are_the_engines_own():
    loop = {"kind": "closed", "concurrency": 8}
    tenants = [{"name": "one"}, {"name": "two", "weight": 3.0}]
    content = {"tenants": tenants, "arrivals": loop, "duration": 60, "output": 20, "scrape": 5}
    knobs = {"max_num_seqs": 4, "max_num_batched_tokens": 256}
    fair = play(system(engine=knobs), **content)["fairness"]["service"]
    assert fair["two"] / fair["one"] == pytest.approx(3, rel=0.15)
    first_come = play(system(engine=knobs | {"scheduling_policy": "fcfs"}), **content)
    service = first_come["fairness"]["service"]
    assert service["two"] / service["one"] == pytest.approx(1, rel=0.15)


def test_a_full_queue_and_cancelled_requests_end_as_on_a_server():
    knobs = {"max_num_seqs": 1, "max_queued_requests": 2}
    crowd = {"arrivals": "at_once", "requests": 10, "output": 10}
    found = play(system(engine=knobs), **crowd)["summary"]
    assert found["errors"]["http 429"] >= 5
    given_up = play(system(), **crowd, cancel={"fraction": 1.0, "after": 0.05})["summary"]
    assert (given_up["cancelled"], given_up["failed"]) == (10, 0)


def test_a_limit_before_a_planned_cancellation_is_a_failure_as_on_a_server():
    content = {"arrivals": {"kind": "constant", "rate": 1}, "requests": 2, "request_timeout": 0.001}
    late = play(system(), **content, cancel={"fraction": 1, "after": 5})["summary"]
    assert (late["errors"], late["cancelled"]) == ({"timed out": 2}, 0)
    early = play(system(), **content, cancel={"fraction": 1, "after": 0.0001})["summary"]
    assert (early["errors"], early["cancelled"]) == ({}, 2)


def test_two_deltas_of_one_name_are_refused():
    with pytest.raises(ValueError, match="names has 'a' twice"):
        Deltas(2, names=("a", "b", "a"))


def test_more_replicas_do_more_and_keep_deltas_apart():
    loop = {"kind": "closed", "concurrency": 64}
    content = {"arrivals": loop, "duration": 20, "output": 20, "scrape": 5}
    deltas = Deltas(32, device_gb=0.1, prepare_s=0.2)
    knobs = {"delta_memory_bytes": 900_000_000, "max_num_seqs": 16}
    rates, hits = {}, {}
    for replicas, how in ((1, "delta_aware"), (4, "delta_aware"), (4, "round_robin")):
        many = system(deltas=deltas, engine=knobs, replicas=replicas, routing=how)
        result = play(many, **content)
        rates[replicas, how] = result["summary"]["output_throughput"]
        hits[replicas, how] = result["server"]["residency_hit_rate"]
    assert rates[4, "delta_aware"] > 2.5 * rates[1, "delta_aware"]
    assert hits[4, "delta_aware"] > hits[4, "round_robin"] + 0.2


def test_the_router_keeps_a_model_where_it_was_unless_that_is_too_busy():
    class Engine:
        load = 0

    engines = [Engine() for _ in range(4)]
    router = Router("delta_aware", engines)
    home = router.choose("a")
    assert {router.choose("a") for _ in range(10)} == {home}
    engines[home].load = 9
    second = router.choose("a")
    assert second != home
    assert {Router("least_loaded", engines).choose("a")} != {home}
    turns = Router("round_robin", engines)
    assert [turns.choose("a") for _ in range(5)] == [0, 1, 2, 3, 0]


def test_figures_give_the_time_of_bytes_or_of_arithmetic():
    """1 B parameters in 16 bits at 1000 GB/s and 100 TFLOP/s."""
    cost = costs_of(system(measured=None))
    small = cost(Shape(prompt=0, drawn=1, deltas=0, context=0, pairs=0))
    assert small == pytest.approx(0.002)
    two = cost(Shape(prompt=0, drawn=2, deltas=2, context=0, pairs=0))
    assert two == pytest.approx(0.002 + 2 * 0.0001)
    context = cost(Shape(prompt=0, drawn=1, deltas=0, context=10_000, pairs=10_000))
    assert context == pytest.approx(0.002 + 10_000 * 8000 / 1e12)
    prefill = cost(Shape(prompt=5000, drawn=0, deltas=0, context=0, pairs=0))
    assert prefill == pytest.approx(2 * 1e9 * 5000 / 1e14)
    four = system(measured=None, device=Device(80, 1000, 100, 10, 1, 256, 4, 1, 1, 0.001, 0.0001))
    assert costs_of(four)(Shape(0, 1, 0, 0, 0)) == pytest.approx(0.001 + 10 * 0.0001 + 0.0005)


def test_calibration_finds_the_line_that_made_the_numbers():
    """What a simulated system reports of itself leads back to its times."""
    truth = system(request_s=0.03, between_s=0.004)
    content = {
        "arrivals": {"kind": "ramp", "start": 1, "end": 20, "seconds": 20},
        "duration": 25,
        "prompt": {"kind": "lognormal", "mean": 80},
        "output": {"kind": "lognormal", "mean": 20},
        "popularity": {"kind": "zipf", "alpha": 1.0},
        "scrape": 0.25,
    }
    result = play(truth, **content)
    line, explained = fit_steps(result)
    assert explained > 0.99
    for name in ("step", "prompt_token", "drawn_token", "delta"):
        assert getattr(line, name) == pytest.approx(getattr(STEP, name), rel=0.2), name
    found = calibrate(system(measured=None), result)
    assert found.system.request_s == pytest.approx(0.03, abs=0.01)
    assert (found.ttft, found.tpot) == (pytest.approx(1, abs=0.1), pytest.approx(1, abs=0.1))
    other = {"arrivals": {"kind": "closed", "concurrency": 12}, "duration": 20, "output": 24}
    real, predicted = play(truth, **other)["summary"], play(found.system, **other)["summary"]
    assert predicted["ttft"]["p50"] == pytest.approx(real["ttft"]["p50"], rel=0.15)
    assert predicted["output_throughput"] == pytest.approx(real["output_throughput"], rel=0.1)
    del result["server"]["over_time"]["values"]["stats.delta_segments"]
    with pytest.raises(ConfigError, match=r"no stats\.delta_segments"):
        fit_steps(result)


@pytest.mark.parametrize("path", SYSTEMS, ids=lambda path: path.stem)
def test_the_examples_can_be_simulated(path):
    content = {"arrivals": {"kind": "closed", "concurrency": 16}, "requests": 32, "output": 8}
    found = play(changed(read_system(path), replicas=None, deltas=8), **content)["summary"]
    assert (found["completed"], found["failed"]) == (32, 0)


def test_a_system_is_read_back_as_it_was_written(tmp_path):
    one = system(engine={"max_num_seqs": 8}, replicas=3, routing="least_loaded")
    (tmp_path / "s.yaml").write_text(as_yaml(one))
    assert read_system(tmp_path / "s.yaml") == one


def test_simulate_and_calibrate_as_typed(tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(as_yaml(system()))
    out = tmp_path / "sim.json"
    ask = ["bench", "simulate", "--system", str(tmp_path / "s.yaml")]
    load = ["--rate", "8", "--duration", "20", "--set", "scrape=0.5", "--set", "models=deltas"]
    assert dispatch([*ask, *load, "--out", str(out)]) == 0
    assert json.loads(out.read_text())["target"]["simulated"] is True
    assert "simulated" in out.with_suffix(".html").read_text()
    fitted = tmp_path / "fitted.yaml"
    fit = ["bench", "calibrate", str(out), "--system", str(tmp_path / "s.yaml")]
    assert dispatch([*fit, "--out", str(fitted)]) == 0
    assert read_system(fitted).measured is not None
    assert dispatch(["bench", "compare", str(out), str(out)]) == 0
    capsys.readouterr()
    small = [*ask[:-1], str(tmp_path / "small.yaml")]
    (tmp_path / "small.yaml").write_text("device: {memory_gb: 1}\n")
    assert dispatch(small) == 2
    assert "device: bandwidth_gbs is missing" in capsys.readouterr().err.replace(
        ".device", " device"
    )
    (tmp_path / "small.yaml").write_text(as_yaml(system(engine={"max_num_seq": 8})))
    assert dispatch(small) == 2
    assert "did you mean max_num_seqs" in capsys.readouterr().err
    (tmp_path / "small.yaml").write_text(as_yaml(system(base=Base(100, 10, 1000, 4, 50))))
    assert dispatch(small) == 2
    assert "the base has 200.0 GB, the device 80" in capsys.readouterr().err
    assert dispatch([*ask, "--replicas", "0"]) == 2
    assert "replicas is 0" in capsys.readouterr().err
    assert dispatch([*ask, "--set", "models=9"]) == 2
    assert "the server has 4" in capsys.readouterr().err
