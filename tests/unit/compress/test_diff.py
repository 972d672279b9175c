"""What the numbers of a diff say: where a parameter belongs, and which codec it suits."""

from __future__ import annotations

import pytest

from deltaserve.cli.diff_tables import print_diff
from deltaserve.compress.diff import ParameterDiff


def changed(
    name: str = "model.layers.3.self_attn.q_proj.weight",
    shape: tuple[int, ...] = (64, 64),
    unchanged: float = 0.0,
    rows: float = 1.0,
    energy_rank: int = 40,
) -> ParameterDiff:
    return ParameterDiff(name, "linear", shape, unchanged, rows, 1.0, 0.1, 20.0, energy_rank)


@pytest.mark.parametrize(
    ("each", "codec"),
    [
        (changed(unchanged=1.0), ""),
        (changed(shape=(64,)), "raw"),
        (changed(rows=0.1, unchanged=0.9), "rows"),
        (changed(unchanged=0.95), "sparse"),
        (changed(energy_rank=3), "lowrank"),
        (changed(energy_rank=5), "int"),
        (changed(shape=(4, 16, 64), energy_rank=3), "lowrank"),
    ],
)
def test_the_codec_that_a_change_suits(each: ParameterDiff, codec: str) -> None:
    assert each.suits == codec


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.self_attn.q_proj.weight", ("layer 3", "q_proj")),
        ("model.layers.12.self_attn.q_proj.bias", ("layer 12", "q_proj.bias")),
        ("transformer.h.0.mlp.c_fc.weight", ("layer 0", "c_fc")),
        ("model.embed_tokens.weight", ("", "embed_tokens")),
        ("lm_head.weight", ("", "lm_head")),
    ],
)
def test_where_a_parameter_belongs(name: str, place: tuple[str, str]) -> None:
    assert changed(name).place == place


def test_the_picture_has_a_row_for_each_layer(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"model.layers.{i}.mlp.{p}_proj.weight" for i in (10, 2) for p in ("up", "down")]
    print_diff([changed(name) for name in names], parameters=True)
    out = capsys.readouterr().out.splitlines()
    rows = [line.split()[1] for line in out if line.lstrip().startswith("layer ")]
    assert rows[:4] == ["2", "10", "2", "10"]  # two pictures, layers in order of their numbers
    assert any("█ 10.0%" in line for line in out)
    assert any("layer 10 up_proj" in line and "int" in line for line in out)


def test_nothing_to_draw(capsys: pytest.CaptureFixture[str]) -> None:
    print_diff([changed("model.norm.weight", (64,), unchanged=1.0)])
    assert "nothing to store" in capsys.readouterr().out
