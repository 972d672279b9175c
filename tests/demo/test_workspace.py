"""The demo's folder: whose files it holds, and deltas that are never stale or half there."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltaserve.demo import workspace
from deltaserve.demo.family import Family
from deltaserve.demo.recipe import MemberRecipe, Recipe, Schedule
from deltaserve.demo.train import build_family
from deltaserve.demo.workspace import DELTAS, check_folder, compress_members, write_json
from deltaserve.errors import ConfigError

STEPS = Schedule(steps=1, batch=2, lr=1e-3, warmup=1)
TINY = Recipe(
    hidden=64,
    layers=1,
    heads=2,
    kv_heads=1,
    intermediate=64,
    base=STEPS,
    members=(
        MemberRecipe("add", "add", "full", STEPS),
        MemberRecipe("shift", "shift", "lora", STEPS, lora_rank=4),
    ),
    score_prompts=2,
)


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return build_family(tmp_path / "family", recipe=TINY)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_new_empty_and_own_folders_are_accepted(family: Family, tmp_path: Path) -> None:
    check_folder(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    check_folder(tmp_path / "empty")
    compress_members(family, lambda done: None)
    write_json(family.root / "results.json", {})
    (family.root / "server.log").touch()
    (family.root / ".add.partial").mkdir()  # what a killed run leaves
    check_folder(family.root)


@pytest.mark.parametrize("name", ["notes.txt", "deltas", "base", "server.log"])
def test_foreign_folders_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=name):
        check_folder(tmp_path)


def test_foreign_files_in_a_family_are_refused(family: Family) -> None:
    (family.root / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"not the demo's \(notes.txt\)"):
        check_folder(family.root)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        check_folder(tmp_path / "file")


def test_equal_deltas_stay_and_stale_ones_go(family: Family) -> None:
    shares: list[float] = []
    compress_members(family, shares.append)
    assert shares == [0.5, 1.0]
    kept, stale = family.root / DELTAS / "shift", family.root / DELTAS / "add"
    inode, before = kept.stat().st_ino, content(family.root / DELTAS)
    (stale / "chat_template.jinja").write_text("of an older fine-tune")

    compress_members(family, lambda done: None)

    assert kept.stat().st_ino == inode
    assert content(family.root / DELTAS) == before


def test_interruption_leaves_whole_deltas(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(base: Path, model: Path, out: Path) -> object:
        if model.name == "shift":
            raise KeyboardInterrupt
        return workspace_compress(base, model, out)

    workspace_compress = workspace.compress
    monkeypatch.setattr(workspace, "compress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress_members(family, lambda done: None)
    assert [path.name for path in (family.root / DELTAS).iterdir()] == ["add"]
    assert not list(family.root.glob(".deltas*"))

    monkeypatch.undo()
    assert set(compress_members(family, lambda done: None)) == {"add", "shift"}
    assert {path.name for path in (family.root / DELTAS).iterdir()} == {"add", "shift"}
