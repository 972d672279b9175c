"""Embeddings: files of every kind, batched models against one sample at a time, whitening."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from transformers import AutoModel, AutoTokenizer

from deltaserve.errors import SelectionError
from deltaserve.select.embed import embed_pool, load_embeddings
from deltaserve.select.pool import Pool
from deltaserve.select.scale import (
    check_utility,
    fit_whitening,
    min_centred,
    robust_scaled,
    unit,
    untied,
)
from deltaserve.select.tokens import ModelOptions
from tests.select.pools import clustered, make_causal, make_encoder, sentences, write_lines

X = clustered(40, 6, 3)


def test_every_file_gives_the_same_embeddings(tmp_path):
    np.save(tmp_path / "e.npy", X)
    save_file({"e": X}, tmp_path / "e.safetensors")
    pq.write_table(pa.table({"vector": X.tolist()}), tmp_path / "e.parquet", row_group_size=7)
    for name in ("e.npy", "e.safetensors", "e.parquet"):
        found = load_embeddings(tmp_path / name, 40, "vector")
        np.testing.assert_array_equal(found, X)


def write_broken(path, kind):
    broken = {
        "short": X[:39],
        "flat": X[0],
        "whole": np.ones((40, 3), dtype=np.int64),
        "nan": np.where(np.arange(40)[:, None] == 17, np.nan, X),
    }
    np.save(path, broken[kind])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("short", "has 39 embeddings, the pool 40 samples"),
        ("flat", r"must be a matrix of floats, samples x dimensions, not float32 of shape \[6\]"),
        ("whole", "must be a matrix of floats"),
        ("nan", "embedding in row 17 is not finite"),
    ],
)
def test_wrong_embeddings_are_refused(tmp_path, kind, message):
    write_broken(tmp_path / "e.npy", kind)
    with pytest.raises(SelectionError, match=message):
        load_embeddings(tmp_path / "e.npy", 40)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1.0, 2.0], [1.0, 2.0], [1.0]], "different dimensions: row 2 has 1, those before it 2"),
        ([[1.0], None, [2.0]], "must hold a list of numbers in every row"),
        ([1.0, 2.0, 3.0], "must hold a list of numbers"),
        ([["a"], ["b"], ["c"]], "is not numbers"),
    ],
)
def test_wrong_columns_of_embeddings_are_refused(tmp_path, rows, message):
    pq.write_table(pa.table({"embedding": rows}), tmp_path / "e.parquet")
    with pytest.raises(SelectionError, match=message):
        load_embeddings(tmp_path / "e.parquet", 3)
    with pytest.raises(SelectionError, match="no column 'other'; it has embedding"):
        load_embeddings(tmp_path / "e.parquet", 3, "other")


def test_files_that_are_none_are_refused(tmp_path):
    for name in ("e.npy", "e.safetensors", "e.parquet"):
        with pytest.raises(SelectionError, match="cannot be read"):
            load_embeddings(tmp_path / name, 3)
    with pytest.raises(SelectionError, match=r"are \.npy, \.safetensors or \.parquet"):
        load_embeddings(tmp_path / "e.txt", 3)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    path = tmp_path_factory.mktemp("pool") / "pool.jsonl"
    return Pool(write_lines(path, [{"text": text} for text in sentences(50)]))


@pytest.mark.parametrize("kind", ["encoder", "causal"])
def test_batches_embed_as_one_sample_at_a_time_does(tmp_path, pool, kind):
    path = (make_encoder if kind == "encoder" else make_causal)(tmp_path / "model")
    found = embed_pool(pool, ModelOptions(str(path), batch_tokens=40), out=tmp_path / "e.npy")
    model, tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    for row, sample in enumerate(pool.samples()):
        ids = tokenizer(sample.text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            hidden = model(input_ids=ids).last_hidden_state[0].numpy()
        weights = np.ones(len(hidden)) if kind == "encoder" else np.arange(1, len(hidden) + 1)
        expected = (weights[:, None] * hidden).sum(axis=0) / weights.sum()
        np.testing.assert_allclose(found[row], expected, atol=1e-5)
    np.testing.assert_array_equal(np.load(tmp_path / "e.npy"), found)


def test_long_samples_are_cut(tmp_path, pool):
    path = str(make_causal(tmp_path / "model"))
    cut = embed_pool(pool, ModelOptions(path, max_length=3))
    texts = [" ".join(s.text.split()[:3]) for s in pool.samples()]
    short = Pool(write_lines(tmp_path / "short.jsonl", [{"text": text} for text in texts]))
    np.testing.assert_allclose(cut, embed_pool(short, ModelOptions(path)), atol=1e-5)


def test_samples_are_cut_to_what_the_model_reads(tmp_path):
    long = Pool(write_lines(tmp_path / "long.jsonl", [{"text": "red " * 200}]))
    cut = Pool(write_lines(tmp_path / "cut.jsonl", [{"text": "red " * 64}]))
    options = ModelOptions(str(make_encoder(tmp_path / "model")))
    np.testing.assert_allclose(embed_pool(long, options), embed_pool(cut, options), atol=1e-5)


def test_a_model_that_is_none_is_refused(tmp_path, pool):
    with pytest.raises(SelectionError, match="cannot be loaded"):
        embed_pool(pool, ModelOptions(str(tmp_path)))


def test_whitened_vectors_have_no_common_direction():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5000, 8)) * [9, 5, 3, 3, 2, 2, 2, 2] + 40
    assert (unit(x) @ unit(x[0:1]).T).min() > 0.7
    white = fit_whitening(x)(x)
    np.testing.assert_allclose(np.linalg.norm(white, axis=1), 1, atol=1e-5)
    assert abs(white.mean(axis=0)).max() < 0.02
    covariance = np.cov(white.T)
    assert abs(covariance - np.diag(np.diag(covariance))).max() < 0.01
    assert np.diag(covariance).max() / np.diag(covariance).min() < 1.5


def test_equal_embeddings_cannot_be_whitened_and_stay():
    x = np.ones((5, 3), dtype=np.float32)
    np.testing.assert_allclose(fit_whitening(x)(x), unit(x))


def test_robust_scaling_puts_every_source_on_the_same_scale():
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 3, 3000)
    raw = np.where(codes == 0, rng.normal(5, 1, 3000), rng.normal(-400, 100, 3000))
    raw[codes == 2] = 7.0
    raw[0], codes[0] = 1e12, 0
    scaled = robust_scaled(raw, codes)
    assert scaled.min() >= 0
    assert scaled.max() <= 1
    assert (scaled[codes == 2] == 0.5).all()
    assert abs(np.median(scaled[codes == 0]) - np.median(scaled[codes == 1])) < 0.05
    assert scaled[codes == 0].std() > 0.15
    assert min_centred(raw).min() == 0


@given(st.lists(st.sampled_from([0.0, 1.0, 1.5, 2.0, 50.0, 1e9, -3.0]), min_size=1, max_size=300))
def test_scaling_keeps_the_order_and_the_ties_and_lots_keep_the_order(values):
    raw = np.array(values)
    scaled = robust_scaled(raw, np.zeros(len(raw), dtype=int))
    drawn = untied(scaled, 0)
    for one in np.unique(raw):
        same, above = raw == one, raw > one
        assert np.ptp(scaled[same]) == 0
        assert not above.any() or scaled[above].min() > scaled[same].max()
        assert not above.any() or drawn[above].min() > drawn[same].max()
    assert len(np.unique(drawn)) == len(raw)


def test_utilities_must_be_finite_numbers():
    good = check_utility(np.array([1, 2, 3]), 3, "u")
    assert good.dtype == np.float64
    with pytest.raises(SelectionError, match="the utility of sample 1 is nan; utilities must be"):
        check_utility(np.array([1.0, np.nan, 3.0]), 3, "u")
    with pytest.raises(SelectionError, match="sample 0 is inf, as are those of 2 samples"):
        check_utility(np.array([np.inf, np.nan, 3.0]), 3, "u")
    with pytest.raises(SelectionError, match="must be 4 numbers"):
        check_utility(np.ones(3), 4, "u")
