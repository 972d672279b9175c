"""Arrivals, popularity and lengths have the statistics that they are named after."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.bench.load import arrivals, lengths, popularity
from deltaserve.bench.load.traces import PUBLISHED

RATES = st.floats(0.1, 200)
SEEDS = st.integers(0, 2**31)
COUNT = 4000


def times(kind: arrivals.Arrivals, seed: int = 0, count: int = COUNT) -> np.ndarray:
    rows = kind.rows(np.random.default_rng(seed))
    return np.array([row.time for row in itertools.islice(rows, count)])


def count_until(kind: arrivals.Arrivals, moment: float, seed: int) -> int:
    rows = kind.rows(np.random.default_rng(seed))
    return sum(1 for _ in itertools.takewhile(lambda row: row.time < moment, rows))


@given(rate=RATES, burstiness=st.floats(0.2, 20), seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_gamma_gaps_have_the_rate_and_the_burstiness(rate, burstiness, seed):
    gaps = np.diff(times(arrivals.Gamma(rate, burstiness), seed))
    cv = burstiness**-0.5
    assert gaps.mean() == pytest.approx(1 / rate, rel=6 * cv / COUNT**0.5)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.3)


@given(rate=RATES, seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_poisson_counts_have_a_variance_like_their_mean(rate, seed):
    found = times(arrivals.Poisson(rate), seed)
    windows = np.histogram(found, bins=200, range=(0, found[-1]))[0]
    assert windows.var() / windows.mean() == pytest.approx(1, abs=0.6)
    assert found[-1] == pytest.approx(COUNT / rate, rel=0.1)


def test_constant_gaps_are_equal():
    assert np.allclose(np.diff(times(arrivals.Constant(4.0))), 0.25)


@given(
    rate=st.floats(5, 50),
    on=st.floats(0.5, 5),
    off=st.floats(0.5, 5),
    off_rate=st.floats(0, 2),
    seed=SEEDS,
)
@settings(max_examples=15, deadline=None)
def test_on_off_sends_at_each_phases_own_rate(rate, on, off, off_rate, seed):
    found = times(arrivals.OnOff(rate, on, off, off_rate), seed)
    periods = found[-1] / (on + off)
    busy = (found % (on + off) < on).sum()
    expected = rate * on / (rate * on + off_rate * off)
    assert busy / COUNT == pytest.approx(expected, abs=0.05)
    assert COUNT / periods == pytest.approx(rate * on + off_rate * off, rel=0.15)
    assert np.all(np.diff(found) >= 0)


@pytest.mark.parametrize("shape", ["linear", "exponential"])
@given(start=st.floats(1, 50), end=st.floats(1, 50), seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_a_ramps_count_is_the_area_under_its_rate(shape, start, end, seed):
    ramp = arrivals.Ramp(start, end, 40.0, shape)
    moments = np.linspace(0, 60, 6001)
    part = np.minimum(moments / 40.0, 1.0)
    rate = start + (end - start) * part if shape == "linear" else start * (end / start) ** part
    for moment in (20.0, 40.0, 60.0):
        expected = np.trapezoid(rate[moments <= moment], moments[moments <= moment])
        assert count_until(ramp, moment, seed) == pytest.approx(expected, abs=6 * expected**0.5)


@pytest.mark.parametrize("like", PUBLISHED)
def test_synthetic_traces_have_the_published_statistics(like):
    published = PUBLISHED[like]
    source = arrivals.Synthetic(like).rows(np.random.default_rng(3))
    rows = list(itertools.islice(source, 20_000))
    prompts = np.array([row.prompt_tokens for row in rows])
    outputs = np.array([row.output_tokens for row in rows])
    assert prompts.mean() == pytest.approx(published.prompt_mean, rel=0.06)
    assert outputs.mean() == pytest.approx(published.output_mean, rel=0.2)
    assert np.median(prompts) == pytest.approx(published.prompt[5], rel=0.05)
    assert np.median(outputs) == pytest.approx(published.output[5], rel=0.05)
    gaps = np.diff([row.time for row in rows])
    assert gaps.std() / gaps.mean() == pytest.approx(published.gaps_cv, rel=0.25)


def test_synthetic_rate_and_shrinking():
    source = arrivals.Synthetic("azure-conv", rate=2.0, shrink=10).rows(np.random.default_rng(1))
    rows = list(itertools.islice(source, 5000))
    assert rows[-1].time == pytest.approx(2500, rel=0.1)
    assert np.mean([row.prompt_tokens for row in rows]) == pytest.approx(115.5, rel=0.1)


@pytest.mark.parametrize(
    "kind",
    [
        arrivals.Poisson(3),
        arrivals.OnOff(3, 1, 1),
        arrivals.Ramp(1, 9, 5),
        arrivals.Synthetic("azure-code"),
    ],
)
def test_equal_seeds_repeat_and_others_differ(kind):
    assert np.array_equal(times(kind, 5, 50), times(kind, 5, 50))
    assert not np.array_equal(times(kind, 5, 50), times(kind, 6, 50))


def chosen(kind: popularity.Popularity, models: int, gap: float = 0.0) -> list[int]:
    choose = kind.chooser(np.random.default_rng(0), models)
    return [choose(i * gap) for i in range(COUNT)]


@given(alpha=st.floats(0, 3), models=st.integers(2, 64))
@settings(max_examples=15, deadline=None)
def test_zipf_ranks_follow_the_power_law(alpha, models):
    counts = Counter(chosen(popularity.Zipf(alpha), models))
    expected = np.arange(1, models + 1) ** -alpha
    expected *= COUNT / expected.sum()
    for rank in range(models):
        assert counts[rank] == pytest.approx(expected[rank], abs=6 * expected[rank] ** 0.5 + 5)


def test_uniform_round_robin_and_distinct_cover_all_models():
    counts = Counter(chosen(popularity.Uniform(), 8))
    assert min(counts.values()) > 0.8 * COUNT / 8
    assert chosen(popularity.RoundRobin(), 3)[:7] == [0, 1, 2, 0, 1, 2, 0]
    distinct = chosen(popularity.Distinct(), 8)
    rounds = [distinct[i : i + 8] for i in range(0, COUNT, 8)]
    assert all(sorted(each) == list(range(8)) for each in rounds)
    assert len(set(map(tuple, rounds))) > COUNT / 8 / 2


def test_on_off_popularity_keeps_a_share_of_the_models_hot_in_each_period():
    found = chosen(popularity.OnOffModels(period=10, active=0.25), 16, gap=0.1)
    periods = [set(found[i : i + 100]) for i in range(0, COUNT, 100)]
    assert all(len(hot) == 4 for hot in periods)
    assert set().union(*periods) == set(range(16))


@given(mean=st.floats(5, 2000), cv=st.floats(0.1, 2))
@settings(max_examples=15, deadline=None)
def test_lognormal_lengths_have_mean_and_spread(mean, cv):
    draws = lengths.Lognormal(mean, cv).draws(np.random.default_rng(0))
    found = np.array(list(itertools.islice(draws, COUNT)))
    assert found.mean() == pytest.approx(mean, rel=6 * cv / COUNT**0.5 + 0.03)
    assert found.std() / found.mean() == pytest.approx(cv, rel=0.5)


def test_lognormal_lengths_stay_between_min_and_max():
    draws = lengths.Lognormal(50, 3, min=10, max=80).draws(np.random.default_rng(0))
    assert {min(x, 81) for x in itertools.islice(draws, 500)} <= set(range(10, 81))
