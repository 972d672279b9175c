"""A base at 4 and 8 bits with deltas on top, against its dequantised weights in float64."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.artifact.reader import Delta
from deltaserve.cli.main import dispatch
from deltaserve.compress.plan import make_plan
from deltaserve.compress.run import compress
from deltaserve.config import EngineConfig
from deltaserve.engine.core import Engine
from deltaserve.engine.layers import DeltaLinear
from deltaserve.engine.projections import part_of
from deltaserve.engine.quantisation import loaded_bytes
from deltaserve.engine.routing import Routing, segments
from deltaserve.errors import ConfigError
from tests.engine_helpers import BASE, greedy, make_engine, run
from tests.families import COMMON, FAMILIES, make_base, make_fine_tune

functional = pytest.importorskip("bitsandbytes.functional")

METHODS = ("bitsandbytes", "bitsandbytes-int8")
CODECS: dict[str, tuple[str, dict[str, Any]]] = {
    "one": ("int", {"bits": 1, "scale_axis": "row"}),
    "four": ("int", {"bits": 4, "group_size": 64}),
    "pruned": ("nm24", {"bits": 4, "group_size": 64}),
    "exact": ("raw", {}),
}
LAYER = "model.layers.1.self_attn.q_proj"
# Products of one layer, relative to the largest: NF4 multiplies in bfloat16 on some CPUs, int8
# rounds each row of the input to 8 bits.
LIMITS = {"bitsandbytes": 0.006, "bitsandbytes-int8": 0.012}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base whose layers NF4 takes, with biases, and a delta of each codec."""
    root = tmp_path_factory.mktemp("quantised")
    shapes = {"hidden_size": 128, "intermediate_size": 192, "attention_bias": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "llama", ("llama", shapes))
        found = {BASE: make_base("llama", root / BASE)}
        for seed, (name, (codec, params)) in enumerate(CODECS.items()):
            tune = make_fine_tune(found[BASE], root / f"{name}.full", seed=seed)
            plan = make_plan(
                codec=codec, params=params, vocabulary_codec="rows", vocabulary_params={}
            )
            compress(found[BASE], tune, root / name, plan)
            found[name] = root / name
    return found


def quantised_engine(models: dict[str, Path], method: str, *names: str, **knobs: Any) -> Engine:
    deltas = {name: models[name] for name in names}
    return make_engine(models[BASE], deltas, quantization=method, device="cpu", **knobs)


def rounded(weight: torch.Tensor, method: str) -> torch.Tensor:
    """What bitsandbytes' own functions make of a weight, as float64."""
    if method == "bitsandbytes":
        codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        return functional.dequantize_4bit(codes, state).double()
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    return codes.double() * scales.double()[:, None] / 127


def tuned(
    models: dict[str, Path], method: str, name: str, dtype: str = "float32"
) -> dict[str, torch.Tensor]:
    """All parameters of a fine-tune over the quantised base, in float64. dtype: in which the base
    is loaded, before it is quantised."""
    base = Checkpoint.open(models[BASE])
    weights = {key: base.tensor(key).double() for key in base.names()}
    projections = [key for key in weights if key.endswith("_proj.weight")]
    weights |= {
        key: rounded(base.tensor(key).to(getattr(torch, dtype)), method) for key in projections
    }
    if name == BASE:
        return weights
    delta = Delta.read(models[name])
    for key in delta.names():
        before = base.tensor(key)
        after = delta.decode(key, before).double()
        # A codec of values replaces the weight, one of differences is added to it.
        exact = delta.manifest.tensors[key].codec in ("raw", "rows")
        weights[key] = after if exact else weights[key] + after - before.double()
    return weights


def layer_of(engine: Engine) -> DeltaLinear:
    layer, start = part_of(engine.residency.maker.modules[LAYER])
    assert isinstance(layer, DeltaLinear)
    assert layer.quantised
    assert start == 0
    return layer


def compute(engine: Engine, layer: DeltaLinear, x: torch.Tensor, names: list[str]) -> torch.Tensor:
    slots = [0 if n == BASE else engine.residency.current(n).slot for n in names]
    found = segments(slots)  # type: ignore[arg-type]
    layer.step.routing = Routing(found, found, torch.tensor(slots))
    with torch.inference_mode():
        return layer(x[None])[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_adds_each_delta_to_the_quantised_base(
    models: dict[str, Path], method: str, dtype: str
) -> None:
    engine = quantised_engine(models, method, *CODECS, dtype=dtype)
    layer = layer_of(engine)
    names = [name for name in (BASE, *CODECS) for _ in range(7)]
    x = torch.randn(len(names), 128, generator=torch.Generator().manual_seed(0))
    y = compute(engine, layer, x.to(layer.grouped.base_NK.dtype), names)
    assert str(y.dtype) == f"torch.{dtype}"
    for name in (BASE, *CODECS):
        rows = slice(names.index(name), names.index(name) + 7)
        weights = tuned(models, method, name, dtype)
        wanted = F.linear(x[rows].double(), weights[f"{LAYER}.weight"], weights[f"{LAYER}.bias"])
        limit = LIMITS[method] + (0 if dtype == "float32" else 2**-7)
        assert (y[rows] - wanted).abs().max() < limit * wanted.abs().max(), name
    engine.close()


@pytest.mark.parametrize("method", METHODS)
def test_a_row_does_not_depend_on_its_neighbours(models: dict[str, Path], method: str) -> None:
    """Also where one of them is far larger than all others, which must not change the scales."""
    engine = quantised_engine(models, method, "four")
    layer = layer_of(engine)
    x = torch.randn(40, 128, generator=torch.Generator().manual_seed(1))
    x[7] *= 1000
    among = compute(engine, layer, x, [BASE] * 20 + ["four"] * 20)
    for row, name in ((3, BASE), (30, "four")):
        alone = compute(engine, layer, x[row : row + 1], [name])
        torch.testing.assert_close(alone[0], among[row], rtol=1e-5, atol=1e-5)
    engine.close()


@pytest.mark.parametrize("method", METHODS)
def test_answers_are_those_of_the_dequantised_models(models: dict[str, Path], method: str) -> None:
    engine = quantised_engine(models, method, *CODECS)
    prompt = [5, 6, 7, 8]
    served = run(engine, [greedy(name, name, prompt, 1) for name in (BASE, *CODECS)])
    model = AutoModelForCausalLM.from_pretrained(models[BASE], attn_implementation="eager").double()
    for name in (BASE, *CODECS):
        model.load_state_dict(tuned(models, method, name))
        with torch.inference_mode():
            wanted = model(torch.tensor([prompt])).logits[0, -1]
        found = served.logits[name][0].double()
        # What quantising the base itself changes is ten times as much with NF4.
        assert (found - wanted).abs().max() < 0.08 * wanted.abs().max(), name
    engine.close()


@pytest.mark.parametrize(("method", "bits"), [("bitsandbytes", 4.3), ("bitsandbytes-int8", 8.3)])
def test_budget_and_model_list_know_what_is_loaded(
    models: dict[str, Path], method: str, bits: float
) -> None:
    plain = make_engine(models[BASE], {}, dtype="bfloat16")
    engine = quantised_engine(models, method, dtype="bfloat16")
    config = engine.base.config
    width, inner, kv = 128, 192, config.num_key_value_heads * (128 // config.num_attention_heads)
    weights = config.num_hidden_layers * (2 * width * (width + kv) + 3 * width * inner)
    saved = plain.base.num_bytes - engine.base.num_bytes
    assert saved > weights * (16 - bits) / 8
    assert saved < weights * (16 - bits + 0.6) / 8
    (base,) = engine.models()
    assert base.resident_bytes == engine.base.num_bytes < base.full_bytes == base.disk_bytes
    assert engine.scheduler.byte_budget.step_bytes([], engine.residency) == base.resident_bytes
    plain.close()
    engine.close()


def test_bytes_in_memory_count_what_is_tied_once() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(8, 4, bias=False))
    model[1].weight = model[0].weight
    assert loaded_bytes(model) == 4 * (8 * 4 + 4)


def test_layers_that_nf4_does_not_take_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """96 inputs are no multiple of 64: three layers' down projections stay."""
    assert COMMON["intermediate_size"] == 96
    engine = make_engine(make_base("llama", tmp_path), {}, quantization=METHODS[0])
    assert "model.layers.0.mlp.down_proj and 2 others stay unquantised" in caplog.text
    assert run(engine, [greedy("a", BASE, [5, 6, 7], 3)]).tokens["a"]
    engine.close()


def test_nothing_is_merged(models: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"merge_memory_bytes.*bitsandbytes.*exclude"):
        EngineConfig(str(models[BASE]), quantization="bitsandbytes", merge_memory_bytes=1 << 20)
    engine = quantised_engine(models, METHODS[0], "four", merge_memory_bytes=0)
    limits, version = engine.residency.device.limits, engine.residency.current("four")
    assert limits.merge_bytes == version.needs.merged_bytes == 0
    engine.close()


def test_a_missing_library_is_named_with_the_remedy(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    command = ["serve", str(models[BASE]), "--quantization", "bitsandbytes", "--port", "0"]
    assert dispatch([*command, "--no-engine-process"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install bitsandbytes" in line
