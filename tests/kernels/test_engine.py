"""The engine with the kernels in place of the reference gives the same answers, token for token."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltaserve.compress.export import export
from deltaserve.compress.plan import make_plan
from deltaserve.compress.run import compress
from deltaserve.engine.layers import DeltaLinear
from deltaserve.kernels.attention import dispatch as attention_dispatch
from deltaserve.kernels.attention import launch
from deltaserve.kernels.delta_matmul import dispatch
from tests.e2e import test_families
from tests.engine_helpers import BASE
from tests.families import FAMILIES, make_base, make_fine_tune

CODECS = {
    "int2": ("int", {"bits": 2, "group_size": 32}),
    "nm24": ("nm24", {"bits": 4, "group_size": 64}),
    "rows": ("rows", {}),
}


@pytest.mark.slow
def test_a_mixed_batch_on_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "has_kernels", lambda name, base: True)
    monkeypatch.setattr(attention_dispatch, "pick", lambda *_: launch)
    # The interpreter takes seconds for a step.
    monkeypatch.setitem(FAMILIES["mistral"][1], "num_hidden_layers", 1)
    monkeypatch.setattr(test_families, "MAX_TOKENS", 2)
    applied = []
    attach = DeltaLinear.attach

    def watch(layer: DeltaLinear, *args: object) -> None:
        attach(layer, *args)  # type: ignore[arg-type]
        applied.append(len(layer.grouped))

    monkeypatch.setattr(DeltaLinear, "attach", watch)
    base = make_base("mistral", tmp_path / "base")
    deltas, checkpoints = {}, {BASE: base}
    for i, (label, (codec, params)) in enumerate(CODECS.items()):
        tune = make_fine_tune(base, tmp_path / f"{label}.full", seed=i, added_tokens=3 * (i == 1))
        delta = tmp_path / f"{label}.delta"
        plan = make_plan(
            codec=codec, params=params, vocabulary_codec=codec, vocabulary_params=params
        )
        compress(base, tune, delta, plan)
        export(base, delta, tmp_path / label)
        deltas[label], checkpoints[label] = delta, tmp_path / label
    test_families.check_against_reference(base, deltas, checkpoints, exact_bytes=False)
    assert all(applied)
