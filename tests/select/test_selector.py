"""Selector: from files to rows, budgets, conditional selection, receipts, baselines."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.errors import SelectionError
from deltaserve.select.baselines import gains_in_order, score, stratified, take
from deltaserve.select.budgets import Budget, make_limits
from deltaserve.select.duplicates import plain_words
from deltaserve.select.graph import Graph
from deltaserve.select.lexical import embed_words
from deltaserve.select.policies import POLICIES
from deltaserve.select.pool import Columns, Pool
from deltaserve.select.receipt import monotone_share
from deltaserve.select.scale import unit
from deltaserve.select.selector import Selector
from deltaserve.select.solve import Problem, objective
from deltaserve.select.store import Store
from deltaserve.select.utility import SCORES
from tests.select.pools import clustered, make_causal, sentences, write_lines

COUNT = 120
ALL = Columns(label="topic", tokens="cost")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    rng = np.random.default_rng(0)
    texts = sentences(COUNT, low=6, high=20)
    records = [
        {"id": f"s{i}", "text": t, "topic": "ab"[i % 3 == 0], "cost": len(t.split()), "worth": w}
        for i, (t, w) in enumerate(zip(texts, rng.random(COUNT).tolist(), strict=True))
    ]
    return write_lines(tmp_path_factory.mktemp("pool") / "pool.jsonl", records)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_causal(tmp_path_factory.mktemp("model")))


def test_fit_gives_ids_gains_and_a_receipt(path, tmp_path):
    selector = Selector(k=20, utility="column:worth", alpha=0.4, bounding=None).fit(path)
    assert len(set(selector.ids_)) == 20
    assert selector.ids_ == [f"s{row}" for row in selector.rows_]
    assert (np.diff(selector.gains_) <= 1e-6).all()
    receipt = selector.receipt_
    assert receipt["objective"] == pytest.approx(selector.gains_.sum())
    assert receipt["score"] == pytest.approx(100, abs=1)
    assert set(receipt["baselines"]) == {"random", "stratified random", "top utility", "length"}
    scores = [each["score"] for each in receipt["baselines"].values()]
    assert min(scores) == 0
    assert max(scores) < receipt["score"]
    assert receipt["graph"]["recall"] == 1
    selector.save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "receipt.json").read_text()) == receipt


def test_the_same_settings_select_the_same_and_bounding_changes_nothing(path):
    def rows(**changes):
        return Selector(k=30, utility="column:worth", **changes).fit(path).rows_.tolist()

    assert rows() == rows() == rows(workers=2)
    assert rows() == rows(workers=2, backend="processes")
    assert set(rows()) == set(rows(bounding=None)) == set(rows(solver="greedy", bounding=None))


def test_copies_are_not_selected_together(tmp_path):
    texts = sentences(40, seed=1, low=8, high=20)
    doubled = write_lines(tmp_path / "a.jsonl", [{"text": t} for t in texts + texts])
    selector = Selector(k=40, alpha=0.5, neighbours=5, dedup=None).fit(doubled)
    assert len(set(selector.pool_.contents[selector.rows_].tolist())) == 40
    for dedup in ("exact", "minhash", "cosine"):
        deduped = Selector(k=40, dedup=dedup).fit(doubled)
        assert deduped.receipt_["duplicates"]["removed"] == 40
        with pytest.raises(
            SelectionError, match="only 40 points, after 40 duplicates were removed"
        ):
            Selector(k=41, dedup=dedup).fit(doubled)
    assert len(Selector(k=41, dedup=None).fit(doubled).ids_) == 41


def test_equal_shares_and_counts_per_label(path):
    equal = Selector(k=21, per="label", columns=ALL).fit(path)
    assert sorted(np.bincount(equal.pool_.labels.codes[equal.rows_])) == [10, 11]
    first = Selector(k=20, columns=ALL).fit(path)
    rest = {"k": 100, "per": "label", "columns": ALL, "keep": first.ids_}
    assert len(Selector(**rest).fit(path).ids_) == 100
    named = Selector(per="label", counts={"a": 12}, columns=ALL).fit(path)
    assert {named.pool_.labels.names[c] for c in named.pool_.labels.codes[named.rows_]} == {"a"}
    assert len(named.rows_) == 12
    for each in named.receipt_["baselines"].values():
        assert each["samples"] == 12


def test_a_budget_in_tokens_is_kept(path):
    selector = Selector(tokens=100, columns=ALL).fit(path)
    assert 80 < selector.pool_.tokens[selector.rows_].sum() <= 100
    assert "skipped" in " ".join(selector.receipt_["explanation"])


@pytest.mark.parametrize("dedup", [None, "exact", "minhash"])
def test_more_is_added_to_what_was_selected_before(path, tmp_path, dedup):
    first = Selector(k=10, utility="column:worth").fit(path)
    first.save(tmp_path / "out")
    more = Selector(k=5, utility="column:worth", keep=tmp_path / "out", dedup=dedup).fit(path)
    assert not set(first.ids_) & set(more.ids_)
    whole = Selector(k=15, utility="column:worth").fit(path)
    assert set(first.ids_) | set(more.ids_) == set(whole.ids_)
    listed = Selector(k=5, utility="column:worth", keep=first.ids_).fit(path)
    assert listed.ids_ == more.ids_
    with pytest.raises(SelectionError, match="k is 111, but the pool has only 110"):
        Selector(k=111, keep=first.ids_).fit(path)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_selects_from_a_pool(path, model, name):
    needs = POLICIES[name].needs
    models = {"model": model} if {*SCORES} & {*needs} else {}
    models |= {"reference": model} if "reference_loss" in needs else {}
    selector = Selector(k=9, objective=name, columns=ALL, dedup="minhash", **models).fit(path)
    assert len(set(selector.ids_)) == 9
    assert selector.receipt_["objective"] == pytest.approx(selector.gains_.sum())
    if name == "craig":
        assert selector.weights_.sum() == pytest.approx(len(selector.pool_))


@pytest.mark.parametrize("utility", ["length", "loss", "margin", "rho", "relevance"])
def test_every_utility_orders_the_pool(path, model, utility, tmp_path):
    target = write_lines(tmp_path / "target.jsonl", [{"text": "red fox runs"}])
    settings = {"embed": model}
    settings |= {"model": model} if utility in ("loss", "margin", "rho") else {}
    settings |= {"reference": model} if utility == "rho" else {}
    settings |= {"target": target} if utility == "relevance" else {}
    selector = Selector(k=9, utility=utility, beta=0.0, **settings).fit(path)
    top = selector.receipt_["baselines"]["top utility"]
    assert top["shared"] == 9
    assert selector.receipt_["utility"]["from"] == utility


def test_utilities_and_embeddings_from_arrays_and_files(path, tmp_path):
    worth, x = np.arange(COUNT, dtype=float), clustered(COUNT, 8, 10)
    np.save(tmp_path / "u.npy", worth)
    np.save(tmp_path / "e.npy", x)
    one = Selector(k=9, utility=worth, embeddings=x).fit(path)
    files = {"utility": str(tmp_path / "u.npy"), "embeddings": tmp_path / "e.npy"}
    assert one.ids_ == Selector(k=9, **files).fit(path).ids_
    with pytest.raises(SelectionError, match="utility of sample 3 is nan"):
        Selector(k=9, utility=np.where(np.arange(COUNT) == 3, np.nan, worth)).fit(path)
    with pytest.raises(SelectionError, match="has 100 embeddings, the pool 120"):
        Selector(k=9, embeddings=x[:100]).fit(path)


def test_an_interrupted_selection_goes_on_from_its_folder(path, model, tmp_path, monkeypatch):
    options = {"k": 9, "utility": "loss", "model": model, "embed": model, "dedup": "cosine"}
    fresh = Selector(**options).fit(path)
    work = tmp_path / "work"

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("deltaserve.select.prepare.find_neighbours", stop)
        with pytest.raises(KeyboardInterrupt):
            Selector(**options, work=work).fit(path)
    for name in ("embed_pool", "score_pool"):  # found in the folder, not made again
        monkeypatch.setattr(f"deltaserve.select.prepare.{name}", stop)
    assert Selector(**options, work=work).fit(path).ids_ == fresh.ids_
    monkeypatch.setattr("deltaserve.select.prepare.find_neighbours", stop)
    assert Selector(**options, work=work).fit(path).ids_ == fresh.ids_
    assert not list(work.glob("*.partial*"))


def test_another_model_in_the_same_place_is_noticed(path, tmp_path):
    make_causal(tmp_path / "model")
    options = {"k": 9, "utility": "loss", "model": str(tmp_path / "model")}
    one = Selector(**options, work=tmp_path / "work").fit(path)
    make_causal(tmp_path / "model", seed=1)
    other = Selector(**options, work=tmp_path / "work").fit(path)
    assert one.receipt_["utility"]["digest"] != other.receipt_["utility"]["digest"]


def test_a_pool_opened_without_the_column_is_refused(path):
    with pytest.raises(SelectionError, match="opened without its utility column 'worth'"):
        Selector(k=5, utility="column:worth").fit(Pool(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "how much to select"),
        ({"k": 0}, "k must be at least 1"),
        ({"k": 500}, "k is 500, but the pool has only 120"),
        ({"k": 5, "objective": "best"}, "no objective 'best'"),
        ({"k": 5, "utility": "quality"}, "no utility 'quality'"),
        ({"k": 5, "utility": "loss"}, "cannot do without a model"),
        (
            {"k": 5, "utility": "rho", "model": "m"},
            "rho and rholoss cannot do without a reference model",
        ),
        ({"k": 5, "utility": "relevance"}, "relevance cannot do without target examples"),
        ({"k": 5, "model": "m"}, "a model given, but only loss, .* would use it"),
        ({"k": 5, "target": "t.jsonl"}, "target examples given, but only relevance"),
        ({"k": 5, "objective": "label_balanced"}, "needs the column of the labels"),
        ({"k": 5, "objective": "kcenter", "per": "source"}, "takes k and no other budget"),
        ({"tokens": 5}, "needs the column that counts them"),
        ({"tokens": 3, "columns": ALL}, "no point of the pool is that short"),
        ({"counts": {"a": 5}}, "counts of what"),
        ({"per": "label", "k": 5}, "needs the column of the labels"),
        ({"per": "label", "counts": {"c": 5}, "columns": ALL}, "no label 'c' in the pool"),
        ({"per": "label", "counts": {"b": 100}, "columns": ALL}, "has 40 samples, 100 were asked"),
        ({"k": 5, "dedup": "simhash"}, "no dedup 'simhash'"),
        ({"k": 5, "dedup_threshold": 2.0}, "dedup_threshold must lie in 0 to 1"),
        ({"k": 5, "embed": "m", "embeddings": np.ones((1, 1))}, "not both"),
        ({"k": 5, "alpha": -1.0}, "alpha is"),
        ({"k": 5, "keep": ["nobody"]}, "no sample with the id 'nobody'"),
        ({"k": 5, "backend": "beam"}, "no backend 'beam'"),
        ({"k": 5, "seed": -1}, "seed must be 0 or more"),
    ],
)
def test_what_cannot_be_is_refused(path, options, message):
    with pytest.raises(SelectionError, match=message):
        Selector(**options).fit(path)


def random_problem(seed, count=30, **changes):
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.random((count, count)) * (rng.random((count, count)) < 0.2), 1)
    rows, cols = np.nonzero(upper)
    graph = Graph.from_edges(count, rows, cols, upper[rows, cols].astype(np.float32), shards=3)
    utility = rng.random(count).astype(np.float32)
    return Problem(graph, utility, **{"budget": Budget(10), **changes})


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_gains_in_any_order_add_up_to_the_objective(seed, conditional):
    rng = np.random.default_rng(seed)
    chosen = rng.random(30) < 0.3 if conditional else None
    problem = random_problem(seed, chosen=chosen)
    free = np.arange(30) if chosen is None else np.flatnonzero(~chosen)
    rows = rng.permutation(free)[:10]
    gains = gains_in_order(problem, rows)
    for at in range(len(rows) + 1):
        before = objective(problem, rows[:0])
        assert gains[:at].sum() == pytest.approx(objective(problem, rows[:at]) - before, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_baselines_fill_the_budget_and_never_exceed_it(seed):
    rng = np.random.default_rng(seed)
    groups, lengths = rng.integers(0, 3, 40), rng.integers(1, 9, 40)
    counts = {int(g): int(rng.integers(0, (groups == g).sum() + 1)) for g in np.unique(groups)}
    budget = Budget(groups=groups, counts=counts, tokens=60, lengths=lengths)
    if not any(counts.values()):
        return
    limits = make_limits(budget, 40, None)
    order = rng.permutation(40)
    rows = take(order, limits)
    taken = np.bincount(groups[rows], minlength=3)
    assert all(taken[g] <= counts.get(g, 0) for g in range(3))
    assert lengths[rows].sum() <= 60
    for row in np.setdiff1d(order, rows):  # nothing that was passed over would still fit
        full = taken[groups[row]] >= counts.get(int(groups[row]), 0)
        assert full or lengths[rows].sum() + lengths[row] > 60


def test_every_beginning_of_a_stratified_order_is_proportional():
    strata = np.repeat([0, 1, 2], [600, 300, 100])
    order = stratified(strata, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(1000))
    for k in (50, 200, 700):
        shares = np.bincount(strata[order[:k]], minlength=3) / k
        np.testing.assert_allclose(shares, [0.6, 0.3, 0.1], atol=0.04)


def test_the_score_is_a_share_of_the_difference():
    assert score(-5.0, -10.0, 0.0) == 50
    assert score(1.0, 1.0, 1.0) is None


def test_the_monotone_share_counts_what_always_adds():
    graph = Graph.from_edges(3, np.array([0, 1]), np.array([1, 2]), np.ones(2, dtype=np.float32))
    problem = Problem(graph, np.array([1, 1, 0.5], dtype=np.float32), Budget(1), alpha=0.5)
    assert monotone_share(problem) == pytest.approx(1 / 3)  # 1 has two neighbours, 2 is worth less


def test_words_in_common_make_texts_alike():
    texts = ["the red fox runs over the hill", "THE red fox runs, over a hill!", "yes", "no", ""]
    x = unit(embed_words(texts, 5))
    cosine = x @ x.T
    assert cosine[0, 1] > 0.6
    assert abs(cosine[2, 3]) < 0.5
    assert plain_words(texts[1]) == b"the red fox runs over a hill"
    many = sentences(300, seed=2, low=20, high=40)
    y = unit(embed_words(many + many, 600))
    np.testing.assert_allclose((y[:300] * y[300:]).sum(axis=1), 1, atol=1e-5)


def test_a_stored_array_is_made_once(tmp_path):
    store, made = Store(tmp_path), []

    def make(path):
        made.append(path)
        return np.arange(3)

    for _ in range(2):
        assert store.array(make, "a", 1).tolist() == [0, 1, 2]
    store.array(make, "a", 2)
    assert len(made) == 2
