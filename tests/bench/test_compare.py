"""A difference is called one only where it is larger than the noise."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.bench.load import compare as compare_module
from deltaserve.bench.load.compare import Row, compare, read_side, render, student
from deltaserve.bench.load.fairness import fairness, jain
from deltaserve.bench.load.records import Outcome, Record
from deltaserve.bench.load.result import SCHEMA
from deltaserve.bench.load.summary import distribution, max_concurrent, summarise
from deltaserve.bench.load.workload import Slo
from deltaserve.errors import ConfigError


@pytest.fixture(autouse=True)
def fewer_replicates(monkeypatch):
    monkeypatch.setattr(compare_module, "REPLICATES", 200)


def made_up(seed: int, count: int = 400, slower: float = 1.0, correlated: bool = False) -> dict:
    """A result whose latencies are drawn; correlated: as if a queue came and went."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=count)
    if correlated:
        noise = np.convolve(rng.normal(size=count + 14), np.ones(15) / 15**0.5, "valid")
    ttft = slower * 0.1 * np.exp(0.3 * noise)
    scheduled = np.sort(rng.uniform(0, 60, count))
    columns = {
        "scheduled": scheduled,
        "first": scheduled + ttft,
        "finished": scheduled + 3 * ttft,
        "max_gap": ttft / 9,
        "output_tokens": np.full(count, 10),
    }
    return {
        "schema": SCHEMA,
        "name": f"run {seed}",
        "ended": "complete",
        "thresholds": [],
        "workload": {},
        "server": {},
        "seconds": 61.0,
        "workload_digest": "same",
        "summary": {"failed": 0, "requests": count},
        "requests": {
            **{name: values.tolist() for name, values in columns.items()},
            "outcome": ["ok"] * count,
            "probe": [False] * count,
        },
    }


def verdicts(a: list[dict], b: list[dict]) -> dict[str, str]:
    return {row.metric: row.verdict for row in compare(a, b)}


def test_a_real_difference_is_found():
    found = verdicts([made_up(1)], [made_up(2, slower=1.2)])
    assert found["ttft mean"] == found["ttft p50"] == found["e2e mean"] == "worse"
    assert verdicts([made_up(1)], [made_up(2, slower=0.8)])["ttft mean"] == "better"


def test_less_than_a_percent_is_noise_however_narrow_the_interval():
    assert Row("tpot mean", 1.0, 1.005, 1.004, 1.006).verdict == "noise"
    assert Row("tpot mean", 1.0, 1.012, 1.011, 1.013).verdict == "worse"


@pytest.mark.parametrize("correlated", [False, True])
def test_equal_servers_are_told_apart_rarely(correlated):
    alarms = [
        verdicts([made_up(2 * i, 300, 1, correlated)], [made_up(2 * i + 1, 300, 1, correlated)])
        for i in range(12)
    ]
    assert sum(each["ttft mean"] != "noise" for each in alarms) <= 3


def behind_a_queue(seed: int, slower: float = 1.0) -> dict:
    """Half loaded: the arrivals of every pair of seeds are the same, as of one workload."""
    rng, arrivals = np.random.default_rng(seed), np.random.default_rng(1000 + seed // 2)
    result, free = made_up(seed), 0.0
    scheduled = np.cumsum(arrivals.exponential(0.04, 400))
    first = []
    for moment, work in zip(scheduled, slower * rng.exponential(0.02, 400), strict=True):
        free = max(free, moment) + work
        first.append(free)
    times = {"scheduled": scheduled, "first": np.array(first)}
    times["finished"] = times["first"] + slower * rng.lognormal(-3, 0.1, 400)
    result["requests"] |= {name: values.tolist() for name, values in times.items()}
    return result


def test_a_queue_is_no_difference_and_a_fifth_more_work_is_one():
    alarms = []
    for i in range(0, 30, 2):
        equal = verdicts([behind_a_queue(i)], [behind_a_queue(i + 1)])
        alarms += [equal[name] != "noise" for name in ("ttft mean", "ttft p99", "e2e mean")]
    assert sum(alarms) <= 3  # of 45; one in twenty is meant
    more = verdicts([behind_a_queue(0)], [behind_a_queue(1, 1.2)])
    assert more["tpot mean"] == more["tpot p50"] == "worse"


def test_students_factor():
    """Of tables: t(0.975) is 2.776, 2.262 and 1.984 for 4, 9 and 99, over 1.960."""
    assert [student(each) for each in (4, 9, 99)] == pytest.approx([1.416, 1.154, 1.012], abs=0.03)


def test_throughput_is_better_when_it_is_higher():
    less = made_up(1)
    less["requests"]["output_tokens"] = [5] * 400
    assert verdicts([less], [made_up(1)])["output_tokens/s"] == "better"
    assert verdicts([made_up(1)], [less])["output_tokens/s"] == "worse"


def test_differences_from_run_to_run_count_where_there_are_several():
    a = [made_up(1), made_up(2, slower=1.4), made_up(3, slower=0.7)]
    b = [made_up(4, slower=1.3), made_up(5), made_up(6, slower=0.8)]
    assert verdicts(a, b)["ttft mean"] == "noise"


def test_few_values_get_no_interval_and_no_common_number_no_row():
    assert verdicts([made_up(1, 5)], [made_up(2, 5)])["ttft mean"] == "too few values"
    single = made_up(1)
    single["requests"]["output_tokens"] = [1] * 400
    assert "tpot mean" not in verdicts([single], [made_up(2)])


def test_sides_from_files_and_folders(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.json").write_text(json.dumps(made_up(i)))
    assert len(read_side(tmp_path)) == 2
    one = read_side(tmp_path / "0.json")
    text = "\n".join(render(one, one, compare(one, one)))
    assert "NOTE: one run each" in text
    assert "1.000" in text
    (tmp_path / "bad.json").write_text('{"schema": "other"}')
    with pytest.raises(ConfigError, match=r"schema is 'other'.*: measure again"):
        read_side(tmp_path)
    (tmp_path / "bad.json").write_text(json.dumps({"schema": SCHEMA, "name": "x"}))
    with pytest.raises(ConfigError, match="ended is missing"):
        read_side(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match="No such file"):
        read_side(tmp_path / "none.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no results"):
        read_side(tmp_path / "empty")


def test_what_was_cut_or_cannot_be_compared_is_said():
    cut, nothing = made_up(1), made_up(2)
    cut["ended"] = "interrupted"
    cut["client"] = {"slow": False, "stood_still": 3.0}
    nothing["requests"]["outcome"] = ["http"] * 400
    said = "\n".join(render([cut], [nothing], compare([cut], [nothing])))
    assert "NOTE: 1 run(s) ended early: interrupted" in said
    assert "NOTE: a client was slow or stood still" in said
    assert "Nothing to compare" in said
    assert "interval" not in said


@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=20))
def test_jain_lies_between_one_nth_and_one(values):
    assert 1 / len(values) - 1e-9 <= jain(values) <= 1 + 1e-9


def test_jain_of_known_cases():
    assert jain([3, 3, 3]) == pytest.approx(1)
    assert jain([5, 0, 0, 0]) == pytest.approx(0.25)
    assert jain([0, 0]) is None


def answered(tenant: str, sent: float, times: list[float], prompt: int = 10) -> Record:
    return Record(tenant, "m", sent, sent, times[-1], Outcome.OK, tuple(times), prompt, len(times))


def test_service_is_tokens_by_price_when_they_come():
    records = [answered("a", 0, [1, 2, 3]), answered("b", 0, [8, 9])]
    found = fairness(records, {"a": 1, "b": 1}, (1.0, 2.0), 10.0)
    assert found["service"] == {"a": 16, "b": 14}
    assert found["max_service_difference"] == 16  # just before b is served
    curve = np.interp([0.5, 1.5, 2.5, 5], found["over_time"]["seconds"], _curve(found, "a"))
    assert curve.tolist() == [0, 12, 14, 16]
    # Both waited only until 1 s, when a got its first token.
    assert found["max_backlogged_service_difference"] == 0
    weighted = fairness(records, {"a": 2, "b": 1}, (1.0, 2.0), 10.0)
    assert weighted["max_service_difference"] == 8


def _curve(found: dict, tenant: str) -> list[float]:
    return found["over_time"]["service"][tenant]


def test_difference_counts_while_both_wait():
    served = [answered("a", 0, [float(t)]) for t in range(1, 9)]
    found = fairness([*served, answered("b", 0, [9])], {"a": 1, "b": 1}, (1.0, 2.0), 10.0)
    assert found["max_backlogged_service_difference"] == pytest.approx(7 * 12)


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0.01, 9)), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_most_at_once_is_what_counting_finds(spans):
    records = [answered("a", begin, [begin + length]) for begin, length in spans]
    slow = max(sum(r.sent <= s.sent < r.finished for r in records) for s in records)
    assert max_concurrent(records) == slow


def test_definitions():
    record = answered("a", 1.0, [1.5, 1.7, 2.1])
    late = Record("a", "m", 1.0, 1.2, 2.1, Outcome.OK, (1.5, 1.7, 2.1), 10, 3)
    assert (record.ttft, record.e2e) == (0.5, pytest.approx(1.1))
    assert record.tpot == pytest.approx(0.3)
    assert record.gaps == pytest.approx([0.2, 0.4])
    assert (late.ttft, late.lateness) == (0.5, pytest.approx(0.2))
    failed = Record("a", "m", 0, 0, 1, Outcome.HTTP, status=429)
    found = summarise([record, late, failed], Slo(ttft=0.6, itl=0.3), 10.0)
    assert found["slo_attainment_by_metric"] == {"ttft": pytest.approx(2 / 3), "itl": 0.0}
    assert (found["goodput"], found["slo_attainment"]) == (0.0, 0.0)
    assert found["errors"] == {"http 429": 1}
    assert distribution([1.0, 3.0])["p50"] == 2.0
    assert distribution([]) is None
