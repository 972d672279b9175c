"""Allocation holds its budget and is optimal where it must be; goals are met or refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.compress.allocate import Candidate, allocate, largest, smallest
from deltaserve.compress.goal import Goal
from deltaserve.compress.plan import CodecChoice
from deltaserve.compress.run import compress_to
from deltaserve.compress.textsource import TextOptions
from deltaserve.errors import ConfigError
from tests.families import make_base, make_fine_tune, make_lora

TEXT = TextOptions(samples=16, seq_len=24)
RAW = CodecChoice("raw")

candidates = st.lists(
    st.builds(Candidate, st.just(RAW), st.integers(1, 60), st.floats(0, 9)), min_size=1, max_size=5
)
tables = st.lists(candidates, min_size=1, max_size=4).map(
    lambda rows: {str(number): row for number, row in enumerate(rows)}
)


@given(tables, st.integers(0, 260))
@settings(max_examples=150, deadline=None)
def test_allocation_is_within_the_budget_and_near_the_optimum(table, budget):
    chosen = allocate(table, budget)
    size = sum(c.bytes for c in chosen.values())
    error = sum(c.error for c in chosen.values())
    assert chosen.keys() == table.keys()
    assert size <= max(budget, smallest(table))
    fitting = [
        (sum(c.error for c in each), sum(c.bytes for c in each))
        for each in itertools.product(*table.values())
        if sum(c.bytes for c in each) <= budget
    ]
    if not fitting:
        assert size == smallest(table)
        return
    # A multiplier misses only what lies between two corners of the convex hull.
    worst_step = max(
        max(c.error for c in row) - min(c.error for c in row) for row in table.values()
    )
    assert error <= min(fitting)[0] + worst_step + 1e-9
    if budget >= largest(table):
        assert error <= min(fitting)[0] + 1e-9


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ({"preset": "tiny"}, "must be one of lossless, quality, balanced, small"),
        ({"preset": "small", "target_ratio": 8.0}, "both choose the size"),
        ({"preset": "lossless", "max_kl": 0.1}, "has no divergence"),
        ({"target_ratio": 0.5}, "must be above 1"),
        ({"max_kl": 0.0}, "must be above 0"),
    ],
)
def test_goals_that_contradict_themselves(goal, message):
    with pytest.raises(ConfigError, match=message):
        Goal(**goal)


def test_a_goal_knows_its_limit():
    assert Goal().limit == Goal("balanced").limit
    assert Goal(max_kl=0.3).limit == 0.3
    assert Goal(target_ratio=9.0).limit is None


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("choose")
    make_base("llama", root / "base")
    make_fine_tune(root / "base", root / "tuned", seed=1)
    make_lora(root / "base", root / "adapter", root / "merged")
    return root


def run(models, out, goal, model="tuned"):
    return compress_to(models / "base", models / model, out, goal, TEXT)


def test_a_ratio_is_met_and_reported(models, tmp_path):
    sizes = {}
    for ratio in (6.0, 12.0):
        chosen = run(models, tmp_path / f"{ratio}", Goal(target_ratio=ratio))
        sizes[ratio] = chosen.manifest.sizes.resident_ratio
        assert ratio <= sizes[ratio] < ratio * 1.1
        assert chosen.manifest.quality.passed
        assert chosen.picks.keys() == chosen.table.keys()
        assert len(chosen.table) == 23
    with pytest.raises(ConfigError, match="the smallest delta"):
        run(models, tmp_path / "x", Goal(target_ratio=500.0))
    assert not (tmp_path / "x").exists()


def test_a_divergence_is_held_by_spending_more(models, tmp_path):
    small = run(models, tmp_path / "loose", Goal(max_kl=50.0)).manifest
    tight = run(models, tmp_path / "tight", Goal(max_kl=small.quality.kl_mean / 4)).manifest
    assert tight.quality.passed
    assert tight.sizes.resident.total > small.sizes.resident.total
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loose", "tight"]


def test_a_lossless_delta_an_adapter_and_no_change_need_no_choice(models, tmp_path):
    lossless = run(models, tmp_path / "xor", Goal("lossless")).manifest
    assert {entry.codec for entry in lossless.tensors.values()} == {"xor"}
    adapter = run(models, tmp_path / "adapter", Goal(), "adapter")
    assert (adapter.table, adapter.manifest.source.kind) == (None, "lora")
    assert "exactly" in adapter.note
    assert run(models, tmp_path / "none", Goal(), "base").manifest.tensors == {}


def test_a_change_of_low_rank_is_found(models, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.mlp.up_proj.weight
            u, v = (torch.randn(n, 1, generator=generator) for n in weight.shape)
            weight += 0.05 * u @ v.T
    model.save_pretrained(tmp_path / "tuned")
    chosen = compress_to(models / "base", tmp_path / "tuned", tmp_path / "d", Goal("small"), TEXT)
    assert {pick.choice.codec for pick in chosen.picks.values()} == {"lowrank"}
    assert chosen.manifest.quality.agreement == 1


def test_what_cannot_be_calibrated_is_rounded_and_said(models, tmp_path):
    import json

    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        for file in (models / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        config = json.loads((tmp_path / name / "config.json").read_text())
        config["architectures"] = ["OtherForCausalLM"]
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    chosen = compress_to(tmp_path / "base", tmp_path / "tuned", tmp_path / "d", Goal(), TEXT)
    assert "OtherForCausalLM cannot be calibrated: rounded plainly" in chosen.note
    assert chosen.manifest.quality is None
