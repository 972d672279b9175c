"""The demo's real model family, built once on each machine (about three minutes on two cores)."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltaserve.compress.run import compress
from deltaserve.demo.family import Family
from deltaserve.demo.train import build_family


@pytest.fixture(scope="session")
def family() -> Family:
    """A base and its fine-tunes, in the user's cache folder. Not to be written to."""
    return build_family()


@pytest.fixture(scope="session")
def family_deltas(family: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Member -> its delta, made with the default plan."""
    folder = tmp_path_factory.mktemp("deltas")
    for member in family.members:
        compress(family.base, member.path, folder / member.name)
    return {member.name: folder / member.name for member in family.members}
