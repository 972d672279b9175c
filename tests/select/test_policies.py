"""Every policy: its budget, its seed, its weights, and the bound that its paper proves."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.errors import SelectionError
from deltaserve.select.policies import POLICIES, Features
from deltaserve.select.policies.matrix import RIDGE, facility_location, non_negative
from deltaserve.select.policies.presampling import equal_shares
from deltaserve.select.policies.scored import drawn
from deltaserve.select.scale import unit
from deltaserve.select.utility import SCORES, scores_of
from tests.select.pools import clustered


def features(count=60, seed=0, **changes):
    rng = np.random.default_rng(seed)
    scores = scores_of(rng.normal(size=(count, 7)) * 2, rng.integers(0, 7, count))
    everything = {
        "labels": rng.integers(0, 4, count),
        "triggers": np.sort(rng.integers(0, 3, count)),
        "used": rng.integers(0, 2, count),
        "scores": {**scores, "reference_loss": rng.random(count)},
        "vectors": rng.normal(size=(count, 5)),
    }
    return Features(count, **{**everything, **changes})


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("k", [1, 17, 60])
def test_every_policy_meets_its_budget_by_its_seed(name, k):
    policy = POLICIES[name]
    choice = policy.choose(features(), k, seed=3)
    assert len(set(choice.rows.tolist())) == k
    assert choice.rows.min() >= 0
    assert choice.rows.max() < 60
    assert choice.weights.min() >= 0
    again = policy.choose(features(), k, seed=3)
    np.testing.assert_array_equal(choice.rows, again.rows)
    np.testing.assert_array_equal(choice.weights, again.weights)


@pytest.mark.parametrize(
    "name", ["random", "random_no_replacement", "label_balanced", "loss", "rs2", "kcenter"]
)
def test_another_seed_draws_others(name):
    one, other = (POLICIES[name].choose(features(), 10, seed).rows.tolist() for seed in (1, 2))
    assert one != other


@pytest.mark.parametrize("name", sorted(n for n, p in POLICIES.items() if p.needs))
def test_what_a_policy_needs_must_be_given(name):
    need = POLICIES[name].needs[-1]
    with pytest.raises(SelectionError, match=f"{name!r} needs"):
        POLICIES[name].choose(Features(5), 2)
    if need in ("vectors", "labels", "triggers", "used"):
        short = features(**{need: getattr(features(), need)[:9]})
    else:
        short = features(scores={n: np.full(60, np.nan) for n in (*SCORES, "reference_loss")})
    with pytest.raises(SelectionError, match=r"give one each|not finite"):
        POLICIES[name].choose(short, 2)


@pytest.mark.parametrize("k", [0, 61])
def test_a_budget_that_does_not_fit_is_refused(k):
    with pytest.raises(SelectionError, match=f"k is {k}, but there are 60 samples"):
        POLICIES["random"].choose(features(), k)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.data())
def test_shares_are_as_even_as_the_groups_allow(sizes, data):
    k = data.draw(st.integers(0, sum(sizes)))
    sizes = np.array(sizes)
    shares = equal_shares(sizes, k)
    assert shares.sum() == k
    assert (shares <= sizes).all()
    full = shares[shares < sizes]
    # Whoever could have got more has at most one less than anybody.
    assert not len(full) or shares.max() - full.min() <= 1


@pytest.mark.parametrize(
    ("name", "column"), [("label_balanced", "labels"), ("trigger_balanced", "triggers")]
)
def test_balanced_really_is_balanced(name, column):
    groups = np.array([0] * 100 + [1] * 7 + [2] * 30)
    rows = POLICIES[name].choose(features(137, **{column: groups}), 47).rows
    assert np.bincount(groups[rows]).tolist() == [20, 7, 20]


def test_no_sample_comes_twice_before_all_have_come():
    used = np.zeros(60, dtype=int)
    for seed in range(7):
        used[POLICIES["random_no_replacement"].choose(features(used=used), 25, seed).rows] += 1
        assert used.max() - used.min() <= 1


def test_rs2_goes_through_all_samples_before_it_repeats_one():
    def subset(epoch, name="rs2"):
        return POLICIES[name].choose(features(epoch=epoch), 20, seed=1).rows.tolist()

    assert sorted(subset(0) + subset(1) + subset(2)) == list(range(60))
    assert sorted(subset(3) + subset(4) + subset(5)) == list(range(60))
    assert subset(0) != subset(3)
    assert len(set(subset(0, "rs2_with_replacement")) & set(subset(1, "rs2_with_replacement"))) > 0
    odd = [POLICIES["rs2"].choose(features(epoch=e), 23, seed=1).rows.tolist() for e in range(6)]
    assert all(len(set(rows)) == 23 for rows in odd)
    assert len(set(odd[0] + odd[1])) == 46


@pytest.mark.parametrize("name", ["margin", "entropy", "least_confidence"])
def test_the_most_uncertain_are_chosen(name):
    made = features()
    choice = POLICIES[name].choose(made, 9)
    rest = np.setdiff1d(np.arange(60), choice.rows)
    assert made.scores[name][choice.rows].min() >= made.scores[name][rest].max()
    assert (choice.weights == 1).all()


def test_rholoss_prefers_what_the_reference_understands():
    loss, reference = np.array([5.0, 5.0, 1.0, 1.0]), np.array([5.0, 1.0, 1.0, 0.5])
    given_scores = {"loss": loss, "reference_loss": reference}
    assert POLICIES["rholoss"].choose(Features(4, scores=given_scores), 2).rows.tolist() == [1, 3]


def test_drawing_by_loss_follows_the_losses_and_its_weights_undo_that():
    loss = np.array([1.0, 2.0, 3.0, 4.0])
    rule = drawn("loss")
    counts = np.zeros(4)
    values = np.array([7.0, -2.0, 4.0, 1.0])
    estimates = []
    for seed in range(4000):
        choice = rule(Features(4, scores={"loss": loss}), 1, seed)
        counts[choice.rows] += 1
        estimates.append(choice.weights @ values[choice.rows])
    np.testing.assert_allclose(counts / 4000, loss / 10, atol=0.025)
    assert np.mean(estimates) == pytest.approx(values.mean(), abs=0.3)


def test_samples_without_loss_only_fill_the_budget():
    loss = np.array([0.0, 1.0, 0.0, 1.0])
    for seed in range(50):
        rows = POLICIES["loss"].choose(Features(4, scores={"loss": loss}), 3, seed).rows
        assert {1, 3} <= set(rows.tolist())
    with pytest.raises(SelectionError, match=r"lowest is -1\.0"):
        POLICIES["loss"].choose(Features(4, scores={"loss": loss - 1}), 3)


def radius(x, rows):
    return np.sqrt(((x[:, None] - x[None, rows]) ** 2).sum(axis=2)).min(axis=1).max()


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 9), st.integers(1, 4), st.integers(0, 10**6))
def test_kcenter_is_within_twice_the_best_radius(count, k, seed):
    k = min(k, count)
    x = np.random.default_rng(seed).normal(size=(count, 2))
    found = radius(x, POLICIES["kcenter"].choose(Features(count, vectors=x), k, seed).rows)
    best = min(radius(x, list(rows)) for rows in itertools.combinations(range(count), k))
    assert found <= 2 * best + 1e-9


def covered(near, rows):
    return near[:, list(rows)].max(axis=1).sum()


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 9), st.integers(1, 4), st.integers(0, 10**6), st.booleans())
def test_lazy_facility_location_is_greedy_and_within_its_bound(count, k, seed, ties):
    k = min(k, count)
    rng = np.random.default_rng(seed)
    near = rng.integers(0, 4, (count, count)).astype(float) if ties else rng.random((count, count))
    rows = facility_location(near, k)
    taken = []
    for row in rows:
        gains = [covered(near, [*taken, other]) for other in range(count)]
        assert gains[row] >= max(g for i, g in enumerate(gains) if i not in taken) - 1e-9
        taken.append(row)
    best = max(covered(near, chosen) for chosen in itertools.combinations(range(count), k))
    assert covered(near, rows) >= (1 - 1 / math.e) * best - 1e-9


def test_facility_location_covers_every_cluster():
    x = clustered(90, 16, 3, seed=2)
    centres = unit(x @ x.T > 0.5)
    kinds = np.unique((centres @ centres.T > 0.5), axis=0, return_inverse=True)[1]
    rows = POLICIES["submodular"].choose(Features(90, vectors=x), 3).rows
    assert len(set(kinds[rows].tolist())) == 3


def test_craig_weights_say_how_many_each_stands_for():
    x = np.concatenate([np.zeros((50, 2)), np.full((30, 2), 10.0), np.full((20, 2), -10.0)])
    x += np.random.default_rng(0).normal(size=x.shape) * 0.1
    choice = POLICIES["craig"].choose(Features(100, vectors=x), 3)
    assert sorted(choice.weights.tolist()) == [20, 30, 50]
    error = choice.weights @ x[choice.rows] - x.sum(axis=0)
    assert np.linalg.norm(error) < 0.05 * np.abs(x).sum()
    copies = POLICIES["craig"].choose(Features(4, vectors=np.ones((4, 2))), 3)
    assert copies.weights.sum() == 4
    assert copies.weights.min() >= 1


def test_gradmatch_comes_closer_to_the_whole_gradient_with_every_sample():
    x = np.random.default_rng(4).normal(size=(80, 12)) + 0.3
    whole = x.sum(axis=0)
    ridge = RIDGE * (x * x).sum(axis=1).mean()
    errors, penalised = [], []
    for k in range(1, 25):
        choice = POLICIES["gradmatch"].choose(Features(80, vectors=x), k)
        errors.append(np.linalg.norm(choice.weights @ x[choice.rows] - whole))
        penalised.append(errors[-1] ** 2 + ridge * choice.weights @ choice.weights)
    assert all(b <= a + 1e-6 for a, b in itertools.pairwise(penalised))
    assert errors[-1] < 0.02 * np.linalg.norm(whole)
    random_rows = POLICIES["random"].choose(features(80), 24).rows
    assert errors[-1] < 0.1 * np.linalg.norm(x[random_rows].mean(axis=0) * 80 - whole)


def test_gradients_of_zero_are_no_obstacle():
    choice = POLICIES["gradmatch"].choose(Features(5, vectors=np.zeros((5, 3))), 4)
    assert np.isfinite(choice.weights).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10**6))
def test_non_negative_least_squares_meets_the_optimality_conditions(size, seed):
    rng = np.random.default_rng(seed)
    half = rng.normal(size=(size, size + 2))
    system, right = half @ half.T + 0.1 * np.eye(size), rng.normal(size=size) * 5
    weights = non_negative(system, right, np.zeros(size))
    slope = system @ weights - right
    assert weights.min() >= 0
    assert slope.min() > -1e-5
    assert abs(slope @ weights) < 1e-4


def test_too_many_samples_for_all_pairs_are_refused():
    many = Features(20_001, vectors=np.zeros((20_001, 1)))
    for name in ("craig", "submodular"):
        with pytest.raises(SelectionError, match="too many for all pairs"):
            POLICIES[name].choose(many, 5)


def test_scores_are_those_of_their_definitions():
    logits = torch.randn(40, 9, generator=torch.Generator().manual_seed(0)) * 3
    targets = torch.arange(40) % 9
    found = scores_of(logits.numpy(), targets.numpy())
    p = torch.softmax(logits, dim=1).double()
    ordered = p.sort(dim=1, descending=True).values
    onehot = torch.nn.functional.one_hot(targets, 9)
    expected = {
        "loss": torch.nn.functional.cross_entropy(logits, targets, reduction="none"),
        "margin": 1 - (ordered[:, 0] - ordered[:, 1]),
        "entropy": -(p * p.log()).sum(dim=1),
        "least_confidence": 1 - ordered[:, 0],
        "gradnorm": (p - onehot).norm(dim=1),
    }
    assert set(found) == set(SCORES) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values.double().numpy(), atol=2e-5)
