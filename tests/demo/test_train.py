"""Building and caching, with a family small enough to train in a second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltaserve.demo import train
from deltaserve.demo.family import BASE, RECORD, Family, default_dir, load_member
from deltaserve.demo.recipe import MemberRecipe, Recipe, Schedule, fingerprint
from deltaserve.demo.tasks import PAST_TOKEN, VERB_TOKEN
from deltaserve.demo.tokenizer import EXTRACT_CHAT_TEMPLATE, build_tokenizer

STEPS = Schedule(steps=2, batch=4, lr=1e-3, warmup=1)
TINY = Recipe(
    hidden=64,
    layers=1,
    heads=2,
    kv_heads=1,
    intermediate=64,
    base=Schedule(steps=2, batch=4, lr=1e-3, warmup=1, muon_lr=0.01),
    members=(
        MemberRecipe("plain", "reverse", "full", STEPS),
        MemberRecipe("own", "extract", "full", STEPS, chat_template=EXTRACT_CHAT_TEMPLATE),
        MemberRecipe("grown", "past", "full", STEPS, added_tokens=(VERB_TOKEN, PAST_TOKEN)),
        MemberRecipe("adapter", "shift", "lora", STEPS, lora_rank=4),
    ),
    score_prompts=4,
)
ONE = Recipe(**{**vars(TINY), "members": TINY.members[:1]})


class InterruptedHereError(Exception):
    pass


def interrupt_in(phase: str):
    def progress(current: str, done: float) -> None:
        if current == phase and done > 0:
            raise InterruptedHereError

    return progress


def folders(root: Path) -> set[str]:
    return {path.name for path in root.iterdir() if path.is_dir()}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return train.build_family(tmp_path_factory.mktemp("family"), recipe=TINY)


def test_family_is_described(family: Family) -> None:
    assert family.base == family.root / BASE
    assert [(m.name, m.task, m.kind) for m in family.members] == [
        ("plain", "reverse", "full"),
        ("own", "extract", "full"),
        ("grown", "past", "full"),
        ("adapter", "shift", "lora"),
    ]
    assert all(0 <= score <= 1 for m in family.members for score in (m.score, m.base_score))
    record = json.loads((family.root / RECORD).read_text())
    assert record["fingerprint"] == fingerprint(TINY, 0)
    assert set(record["scores"]) == set(record["base_scores"]) == set(record["tasks"])
    assert {BASE, "plain", "score base", "score plain"} <= set(record["seconds"])
    with pytest.raises(ValueError, match="no member 'other'"):
        family.member("other")


def test_checkpoints_are_bfloat16(family: Family) -> None:
    files = sorted(family.root.glob("*/*.safetensors"))
    assert len(files) == 5
    for file in files:
        assert {t.dtype for t in load_file(file).values()} == {torch.bfloat16}


def test_full_fine_tunes_train_every_parameter(family: Family) -> None:
    base = load_file(family.base / "model.safetensors")
    tuned = load_file(family.member("own").path / "model.safetensors")
    assert base.keys() == tuned.keys()
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    # Two small steps may round away in a norm's bfloat16 ones, never in a matrix.
    assert {name for name in base if base[name].ndim == 2} <= changed


def test_members_bring_template_tokens_and_adapter(family: Family) -> None:
    base_size = len(build_tokenizer())
    assert load_member(family, "own")[1].chat_template == EXTRACT_CHAT_TEMPLATE
    model, tokenizer = load_member(family, "grown")
    assert len(tokenizer) == base_size + 2
    assert model.get_input_embeddings().weight.shape == (base_size + 2, 64)
    adapter = family.member("adapter").path
    assert (adapter / "adapter_config.json").exists()
    assert (adapter / "adapter_model.safetensors").exists()
    adapted, tokenizer = load_member(family, "adapter")
    assert len(tokenizer) == base_size
    assert any("lora_A" in name for name, _ in adapted.named_parameters())


def test_cached_family_is_not_trained(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("nothing is missing")

    monkeypatch.setattr(train, "fit", fail)
    monkeypatch.setattr(train, "exact_match", fail)
    again = train.build_family(family.root, recipe=TINY, progress=fail)
    assert again == family


def test_interruption_leaves_whole_models_only(tmp_path: Path) -> None:
    with pytest.raises(InterruptedHereError):
        train.build_family(tmp_path, recipe=ONE, progress=interrupt_in(BASE))
    assert folders(tmp_path) == set()
    with pytest.raises(InterruptedHereError):
        train.build_family(tmp_path, recipe=ONE, progress=interrupt_in("plain"))
    assert folders(tmp_path) == {BASE}
    # What a killed process would leave.
    (tmp_path / ".plain.partial").mkdir()
    (tmp_path / ".plain.partial" / "model.safetensors").write_bytes(b"half")

    phases: list[str] = []
    train.build_family(tmp_path, recipe=ONE, progress=lambda phase, done: phases.append(phase))
    assert folders(tmp_path) == {BASE, "plain"}
    assert set(phases) == {"plain", "score base", "score plain"}


def test_same_seed_same_weights_other_seed_rebuilds(tmp_path: Path) -> None:
    def weights(folder: str, seed: int) -> dict[str, torch.Tensor]:
        built = train.build_family(tmp_path / folder, seed=seed, recipe=ONE)
        return load_file(built.member("plain").path / "model.safetensors")

    first, second = weights("one", 0), weights("two", 0)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = weights("one", 1)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert json.loads((tmp_path / "one" / RECORD).read_text())["seed"] == 1


def test_new_base_retrains_members(tmp_path: Path) -> None:
    train.build_family(tmp_path, recipe=ONE)
    (tmp_path / BASE / "model.safetensors").unlink()
    (tmp_path / BASE).rename(tmp_path / "elsewhere")
    phases: set[str] = set()
    train.build_family(tmp_path, recipe=ONE, progress=lambda phase, done: phases.add(phase))
    assert {BASE, "plain"} <= phases


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / BASE).mkdir()
    (tmp_path / BASE / "precious").touch()
    with pytest.raises(ValueError, match="not a demo family"):
        train.build_family(tmp_path, recipe=ONE)
    assert (tmp_path / BASE / "precious").exists()


def test_caller_keeps_threads_and_random_state(tmp_path: Path) -> None:
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    train.build_family(tmp_path, recipe=Recipe(**{**vars(ONE), "threads": threads + 1}))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)


def test_fingerprint_follows_recipe_and_seed() -> None:
    assert fingerprint(TINY, 0) == fingerprint(TINY, 0)
    assert len({fingerprint(TINY, 0), fingerprint(TINY, 1), fingerprint(ONE, 0)}) == 3


def test_default_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_dir() == tmp_path / "deltaserve" / "demo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_dir() == Path.home() / ".cache" / "deltaserve" / "demo"
