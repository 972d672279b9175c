"""Workload files: what they say is what is sent; a mistake is named by its key."""

from __future__ import annotations

import itertools
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaserve.bench.load.plan import Served, resolve_models, sessions
from deltaserve.bench.load.prompts import Renderer
from deltaserve.bench.load.workload import make_workload, read_workload, with_settings
from deltaserve.errors import ConfigError

SERVED = [Served("base"), Served("alpha", "base"), Served("beta", "base")]


def plan(content, renderer=Renderer(), served=SERVED):  # noqa: B008
    workload = make_workload(content)
    return [list(sessions(t, workload, served, renderer)) for t in workload.tenants]


def test_a_tenants_keys_win_over_shared_ones():
    workload = make_workload(
        {"arrivals": 2, "prompt": 10, "tenants": [{"name": "a"}, {"name": "b", "prompt": 20}]}
    )
    assert [t.prompt.tokens for t in workload.tenants] == [10, 20]
    assert [t.arrivals.rate for t in workload.tenants] == [2.0, 2.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"arivals": 1}, "unknown key 'arivals'; did you mean arrivals"),
        ({"arrivals": {"kind": "sometimes"}}, r"arrivals.kind is 'sometimes', but must be one of"),
        ({"arrivals": {"kind": "gamma", "rate": 0}}, r"tenants.0.arrivals: rate is 0"),
        ({"arrivals": {"kind": "gamma", "rate": True}}, "rate is True, but must be a number"),
        ({"arrivals": {"kind": "gamma"}}, "rate is missing"),
        ({"arrivals": {"kind": "at_once"}}, "number of requests"),
        ({"arrivals": {"kind": "poisson", "rat": 1}}, "unknown key 'rat'"),
        ({"tenants": [{"name": "a"}, {"name": "a"}]}, "two tenants are called 'a'"),
        ({"tenants": []}, "tenants must be a list"),
        ({"tenants": [{"name": "a", "prompt": 0}]}, r"tenants.0.prompt: tokens is 0"),
        ({"models": []}, "models is empty"),
        ({"models": 1.5}, "models is 1.5, but must be all or deltas or a whole number or a list"),
        ({"popularity": "trace"}, "popularity trace needs arrivals trace"),
        (
            {"popularity": "on_off", "arrivals": {"kind": "closed", "concurrency": 2}},
            "popularity on_off changes with time",
        ),
        ({"service_weights": [float("nan"), 1]}, "service_weights is nan"),
        ({"service_weights": [-1, 2]}, "service_weights is -1"),
        ({"service_weights": [0, 0]}, "service_weights is 0"),
        ({"popularity": {"kind": "on_off", "active": 2}}, "active is 2"),
        ({"cancel": {"fraction": 1.5, "after": 1}}, "fraction is 1.5"),
        ({"slo": {"ttft": "fast"}}, "slo.ttft is 'fast', but must be a number"),
        ({"thresholds": [{"metric": "x"}]}, "thresholds.0: x: give max or min"),
        ({"token_ids": [5, 5]}, "token_ids"),
        ({"token_ids": [5, 9], "endpoint": "chat"}, "chat takes only text"),
        ({"token_ids": [5, 9], "turns": {"count": 2}}, "do not go with turns"),
        ({"endpoint": "embeddings"}, "must be one of completions, chat"),
        ({"max_time": -1}, "max_time is -1"),
    ],
)
def test_mistakes_are_named(content, message):
    with pytest.raises(ConfigError, match=message):
        make_workload(content)


def test_files_are_read_relative_to_themselves(tmp_path):
    (tmp_path / "w.yaml").write_text("arrivals: {kind: trace, path: t.csv}\nmax-time: 3\n")
    content = read_workload(tmp_path / "w.yaml")
    assert make_workload(content).tenants[0].arrivals.path == str(tmp_path / "t.csv")
    assert content["name"] == "w"
    (tmp_path / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    with pytest.raises(ConfigError, match="given twice"):
        read_workload(tmp_path / "twice.yaml")


def test_settings_by_dotted_keys():
    content = {"arrivals": {"kind": "poisson", "rate": 1}, "tenants": [{"name": "a"}]}
    changed = with_settings(content, [("arrivals.rate", 4), ("tenants.0.prompt", 9)])
    tenant = make_workload(changed).tenants[0]
    assert (tenant.arrivals.rate, tenant.prompt.tokens) == (4.0, 9)
    assert content["arrivals"]["rate"] == 1
    for key, message in {"tenants.7.x": "no '7'", "seed.x": "has no 'x'"}.items():
        with pytest.raises(ConfigError, match=message):
            with_settings(content | {"seed": 1}, [(key, 1)])


def test_keys_come_from_the_environment_and_stay_out_of_records(monkeypatch):
    monkeypatch.setenv("KEY_1", "s3cret")
    workload = make_workload({"tenants": 2, "api_key_env": "KEY_{i}"})
    with pytest.raises(ConfigError, match="variable KEY_0 is not set"):
        workload.api_keys("")
    monkeypatch.setenv("KEY_0", "other")
    assert workload.api_keys("") == {"tenant-0": "other", "tenant-1": "s3cret"}
    assert "s3cret" not in json.dumps(workload.as_dict())
    assert make_workload({}).api_keys("default") == {"default": "default"}


def test_ten_thousand_tenants_have_their_keys_at_once(monkeypatch):
    monkeypatch.setenv("KEY", "shared")
    began = time.process_time()
    workload = make_workload({"tenants": 10_000, "api_key_env": "KEY"})
    assert len(workload.api_keys("")) == 10_000
    assert time.process_time() - began < 6  # one by one among all others, 15 and more


def test_equal_seeds_plan_equal_requests_and_a_rate_changes_no_length():
    content = {"seed": 3, "prompt": {"kind": "lognormal", "mean": 20}, "requests": 30}
    assert plan(content) == plan(content)
    assert plan(content) != plan(content | {"seed": 4})
    (slow,), (fast,) = plan(content), plan(content | {"arrivals": 50})
    assert [s.turns for s in slow] == [s.turns for s in fast]


def test_requests_and_duration_both_end_a_stream():
    (found,) = plan({"arrivals": {"kind": "constant", "rate": 10}, "duration": 2})
    assert len(found) == 20
    (found,) = plan({"arrivals": {"kind": "constant", "rate": 10}, "duration": 2, "requests": 7})
    assert len(found) == 7


def test_shared_prefixes_are_shared_within_a_tenant_only():
    content = {"prefix": {"tokens": 12, "groups": 2}, "prompt": 5, "requests": 40, "tenants": 2}
    first, second = plan(content)
    beginnings = [
        {tuple(s.turns[0].prompt.split()[:12]) for s in found} for found in (first, second)
    ]
    assert [len(each) for each in beginnings] == [2, 2]
    assert not beginnings[0] & beginnings[1]
    assert len({s.turns[0].prompt for s in first}) == 40
    assert {len(s.turns[0].prompt.split()) for s in first} == {17}


def test_mooncake_blocks_become_shared_text(tmp_path):
    path = tmp_path / "trace.jsonl"
    rows = [([46, 47, 48], 1100), ([46, 47, 60], 1030), ([99], 200)]
    path.write_text(
        "".join(
            json.dumps({"timestamp": i, "input_length": n, "output_length": 4, "hash_ids": blocks})
            + "\n"
            for i, (blocks, n) in enumerate(rows)
        )
    )
    (found,) = plan({"arrivals": {"kind": "trace", "path": str(path)}})
    one, two, three = (s.turns[0].prompt.split() for s in found)
    assert [len(one), len(two), len(three)] == [1100, 1030, 200]
    assert one[:1024] == two[:1024]
    assert one[1024:1030] != two[1024:1030]
    assert found[0].turns[0].output_tokens == 4
    (small,) = plan({"arrivals": {"kind": "trace", "path": str(path), "shrink": 10}})
    assert small[0].turns[0].prompt.split()[:102] == small[1].turns[0].prompt.split()[:102]


def test_trace_popularity_gives_the_most_frequent_model_the_first_place(tmp_path):
    path = tmp_path / "trace.csv"
    lines = [f"{i},{'rare' if i % 5 == 0 else 'often'},3,3" for i in range(10)]
    path.write_text("\n".join(["Timestamp,Model,Request tokens,Response tokens", *lines]))
    content = {"arrivals": {"kind": "trace", "path": str(path)}, "popularity": "trace"}
    (found,) = plan(content | {"models": "deltas"})
    assert [s.model for s in found][:3] == ["beta", "alpha", "alpha"]


def test_which_models_are_asked():
    def names(models, served=SERVED):
        return resolve_models(make_workload({"models": models}).tenants[0], served)

    assert names("all") == ("base", "alpha", "beta")
    assert names("deltas") == names(2) == ("alpha", "beta")
    assert names(["beta"]) == ("beta",)
    for models, message in {3: "server has 2", "deltas": "has none"}.items():
        with pytest.raises(ConfigError, match=message):
            names(models, SERVED if models == 3 else SERVED[:1])
    with pytest.raises(ConfigError, match="no model 'gamma'"):
        names(["gamma"])


def test_models_are_believed_where_the_server_lists_none():
    named = make_workload({"models": ["gamma"]}).tenants[0]
    assert resolve_models(named, []) == ("gamma",)
    with pytest.raises(ConfigError, match="lists no models, so name them"):
        resolve_models(make_workload({}).tenants[0], [])


@given(
    slope=st.floats(0.5, 6),
    overhead=st.integers(0, 30),
    parts=st.lists(st.integers(1, 300), min_size=1, max_size=4),
)
def test_calibrated_prompts_have_the_length_asked_for(slope, overhead, parts):
    def count(words):
        return round(slope * words + overhead)

    renderer = Renderer.calibrated((4, count(4)), (1004, count(1004)))
    text = renderer.prompt([(f"s{i}", n) for i, n in enumerate(parts)])
    wanted = max(sum(parts), count(1))  # no text is shorter than one word
    assert count(len(text.split())) == pytest.approx(wanted, abs=slope + 2)


def test_token_ids_are_exact():
    ids = Renderer(token_ids=(10, 20)).prompt([("a", 7), ("b", 5)])
    assert len(ids) == 12
    assert set(ids) <= set(range(10, 20))


def test_on_off_and_closed_tenants_live_side_by_side():
    workload = make_workload(
        {
            "tenants": [
                {"name": "a", "arrivals": {"kind": "closed", "concurrency": 3}},
                {"name": "b", "arrivals": {"kind": "on_off", "rate": 5, "busy": 1, "quiet": 1}},
            ]
        }
    )
    endless = sessions(workload.tenants[0], workload, SERVED, Renderer())
    assert len(list(itertools.islice(endless, 100))) == 100
