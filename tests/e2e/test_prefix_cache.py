"""A shared beginning is computed once, changes no answer, and is shared with nobody else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from deltaserve.compress.plan import make_plan
from deltaserve.compress.run import compress
from deltaserve.engine.core import Engine
from deltaserve.engine.types import EngineRequest
from tests.engine_helpers import BASE, greedy, make_engine, reference, run
from tests.families import make_base, make_fine_tune

PREFIX = [7, 9, 11, 40, 41, 42, 43, 44, 45, 46, 47, 50]
TOKENS = 8


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    root = tmp_path_factory.mktemp("prefix")
    base = make_base("gemma2", root / "base")
    tune = make_fine_tune(base, root / "tune", seed=1)
    compress(base, tune, root / "delta", make_plan(codec="raw"))
    return base, tune, root / "delta"


def ask(engine: Engine, request: EngineRequest) -> tuple[list[int], int]:
    """Generated tokens, and how many of the prompt's were cached."""
    before = engine.stats().cached_tokens
    tokens = run(engine, [request]).tokens[request.request_id]
    return tokens, engine.stats().cached_tokens - before


def test_answers_stay_the_same_and_models_stay_apart(models: tuple[Path, Path, Path]) -> None:
    base, tune, delta = models
    engine = make_engine(base, {"tune": delta, "copy": delta}, block_size=4)
    checkpoints = {BASE: base, "tune": tune, "copy": tune}
    expected_cached = {
        ("base", BASE): 0,  # the first of all
        ("tune", "tune"): 0,  # the base's blocks are not the fine-tune's
        ("base again", BASE): 12,
        ("tune again", "tune"): 12,
        ("copy", "copy"): 12,  # the same weights under another name
    }
    for (name, model), cached in expected_cached.items():
        prompt = [*PREFIX, 60, len(name)]
        request = greedy(name, model, prompt, TOKENS)
        expected, _ = reference(checkpoints[model], prompt, TOKENS)
        assert ask(engine, request) == (expected, cached)
    assert engine.stats().kv_blocks_used == 0
    engine.scheduler.pool.check([])


def test_an_equal_prompt_still_computes_its_last_token(models: tuple[Path, Path, Path]) -> None:
    engine = make_engine(models[0], {}, block_size=4)
    first, _ = ask(engine, greedy("first", BASE, PREFIX, TOKENS))
    assert ask(engine, greedy("second", BASE, PREFIX, TOKENS)) == (first, 8)


def test_what_was_generated_is_shared_with_the_next_turn(models: tuple[Path, Path, Path]) -> None:
    engine = make_engine(models[0], {}, block_size=4)
    answer, _ = ask(engine, greedy("first", BASE, PREFIX, TOKENS))
    conversation = [*PREFIX, *answer, 5, 6]
    expected, _ = reference(models[0], conversation, TOKENS)
    # 12 + 8 tokens are known, the last of which was drawn but never computed.
    assert ask(engine, greedy("next", BASE, conversation, TOKENS)) == (expected, 16)


def test_salts_keep_tenants_apart(models: tuple[Path, Path, Path]) -> None:
    engine = make_engine(models[0], {}, block_size=4)
    request = greedy("a", BASE, PREFIX, TOKENS)
    ask(engine, replace(request, cache_salt="one"))
    assert ask(engine, replace(request, request_id="b", cache_salt="two"))[1] == 0
    assert ask(engine, replace(request, request_id="c", cache_salt="one"))[1] == 8


def test_it_can_be_switched_off(models: tuple[Path, Path, Path]) -> None:
    engine = make_engine(models[0], {}, block_size=4, enable_prefix_caching=False)
    for name in ("a", "b"):
        assert ask(engine, greedy(name, BASE, PREFIX, TOKENS))[1] == 0
