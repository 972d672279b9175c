"""A base at 4 or 8 bits with deltas on top, against the dense model that its bits stand for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.artifact.reader import Delta
from deltaserve.cli.main import dispatch
from deltaserve.compress.run import compress
from deltaserve.compress.weights import of_delta
from deltaserve.engine.core import Engine
from deltaserve.errors import ConfigError
from tests.engine_helpers import BASE, greedy, make_engine, run
from tests.families import make_base

KINDS = ("bitsandbytes", "bitsandbytes-int8")
# Of logits: INT8 rounds what goes in as well, and NF4 computes in bfloat16 where the CPU can.
LOOSENESS = 0.03
PROMPT = [5, 17, 3, 60, 22, 9]
TOKENS = 6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base whose projections fill NF4's blocks, and a delta of it."""
    root = tmp_path_factory.mktemp("quantised")
    config = AutoConfig.for_model(
        "llama",
        vocab_size=96,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(root / "base")
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(root / "tuned")
    compress(root / "base", root / "tuned", root / "delta")
    return root / "base", root / "delta"


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest, models: tuple[Path, Path]) -> Engine:
    return make_engine(models[0], {"tuned": models[1]}, quantization=request.param)


def dense_weight(layer: nn.Module) -> torch.Tensor:
    """What a quantised layer's bits stand for."""
    if type(layer).__name__ == "Linear4bit":  # laid out as the CPU at hand likes it
        with torch.inference_mode():
            return layer(torch.eye(layer.in_features)).T.double()  # type: ignore[arg-type]
    codes, scales = layer.weight.data, layer.state.SCB  # type: ignore[union-attr]
    return codes.double() * scales.double()[:, None] / 127


def expected(engine: Engine, models: tuple[Path, Path], name: str) -> torch.Tensor:
    """Logits of PROMPT's last token in float64: the base's bits, plus what the delta adds."""
    base, delta = models
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval()
    own = dict(model.state_dict())
    stored = of_delta(Checkpoint.open(base), Delta.open(delta))
    state = {key: own[key] if name == BASE else stored(key).double() for key in own}
    for path, layer in engine.base.model.named_modules():
        if type(layer).__name__ in ("Linear4bit", "Linear8bitLt"):
            key = path.replace(".inner", ".weight")
            error = dense_weight(layer) - own[key]
            assert error.norm() < 0.12 * own[key].norm(), f"{key} is not what was quantised"
            state[key] = state[key] + error
    model.load_state_dict(state)
    with torch.inference_mode():
        return model(torch.tensor([PROMPT])).logits[0, -1]


def test_logits_are_those_of_the_bits_and_the_delta(
    engine: Engine, models: tuple[Path, Path]
) -> None:
    wanted = {name: expected(engine, models, name) for name in (BASE, "tuned")}
    for name, logits in wanted.items():
        trace = run(engine, [greedy(name, name, PROMPT, 1)])
        error = (trace.logits[name][0].double() - logits).norm() / logits.norm()
        assert error < LOOSENESS, (name, float(error))
    assert (wanted[BASE] - wanted["tuned"]).norm() > 10 * LOOSENESS * wanted[BASE].norm()


def test_a_row_does_not_depend_on_the_others(engine: Engine) -> None:
    alone = run(engine, [greedy("mine", "tuned", PROMPT, TOKENS)])
    others = [greedy(f"r{n}", (BASE, "tuned")[n % 2], [9 + n, 4], TOKENS) for n in range(5)]
    together = run(engine, [*others, greedy("mine", "tuned", PROMPT, TOKENS)])
    assert alone.tokens["mine"] == together.tokens["mine"]


def test_the_base_counts_with_what_it_takes(engine: Engine) -> None:
    whole = engine.base.checkpoint.num_bytes
    # Float32 before; embedding and head, a sixth of it, stay so.
    share = {"bitsandbytes": 0.36, "bitsandbytes-int8": 0.43}[engine.config.quantization]
    assert engine.base.num_bytes < share * whole
    base = engine.models()[0]
    assert (base.resident_bytes, base.full_bytes) == (engine.base.num_bytes, whole)
    assert engine.residency.merger.limit_bytes == 0


def test_shapes_that_nf4_does_not_take_stay_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(make_base("llama", tmp_path), {}, quantization="bitsandbytes")
    assert "down_proj and 2 others stay unquantised" in caplog.text
    assert len(run(engine, [greedy("r", BASE, PROMPT, 2)]).tokens["r"]) == 2


def test_merging_is_refused(models: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        make_engine(models[0], {}, quantization="bitsandbytes", merge_memory_bytes=1 << 20)


def test_without_the_library_one_line_says_what_to_do(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    options = ["--quantization", "bitsandbytes-int8", "--no-engine-process"]
    assert dispatch(["serve", str(models[0]), *options]) == 2
    assert "pip install bitsandbytes" in capsys.readouterr().err
    assert dispatch(["serve", str(models[0]), "--quantization", "gptq"]) == 2
    assert "bitsandbytes-int8" in capsys.readouterr().err
