"""The demo's folder: what belongs in it, and the deltas that it keeps there.

family.json, base/, <member>/   written by `train.build_family`
deltas/<member>/                the compressed fine-tunes
server.log, results.json        of the last run
"""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deltaserve.artifact.manifest import Manifest
from deltaserve.artifact.staging import replacing
from deltaserve.compress.run import compress
from deltaserve.demo.family import BASE, RECORD, Family, Record
from deltaserve.demo.recipe import Recipe
from deltaserve.demo.train import LOCK, locked
from deltaserve.errors import ConfigError

DELTAS = "deltas"
SERVER_LOG = "server.log"
RESULTS = "results.json"


def check_folder(root: Path) -> None:
    """Raises ConfigError unless `root` is absent, empty, or a folder of this demo's.

    A family's record is what makes a folder the demo's: without one, even a folder
    called "base" is somebody else's.
    """
    if root.exists() and not root.is_dir():
        raise ConfigError(f"{root} is a file; choose another --dir")
    if not root.is_dir():
        return
    foreign = sorted(path.name for path in root.iterdir() if not _is_ours(path, root))
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise ConfigError(
            f"{root} holds files that are not the demo's ({', '.join(foreign[:3])}{more}); "
            "choose an empty or new --dir"
        )


def _is_ours(path: Path, root: Path) -> bool:
    record = Record.read(root)
    ours = {LOCK, f".{RECORD}.partial"}
    if record is not None:
        models = {BASE, *record.tasks, *(member.name for member in Recipe().members)}
        whole = models | {RECORD, DELTAS, SERVER_LOG, RESULTS}
        ours |= whole | {f".{name}.partial" for name in models | {DELTAS, RESULTS}}
    return path.name in ours


def compress_members(family: Family, report: Callable[[float], None]) -> dict[str, Manifest]:
    """Bring `deltas/` up to date and return the manifests by member.

    Every member is compressed afresh, which takes a second and can never serve
    something stale; a delta that comes out the same, byte for byte, is left in
    place, since a server may be reading it.  `report` gets the share done.
    """
    folder, fresh = family.root / DELTAS, family.root / f".{DELTAS}.partial"
    manifests = {}
    with locked(family.root), _single_threaded():
        shutil.rmtree(fresh, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        try:
            for done, member in enumerate(family.members, start=1):
                made = fresh / member.name
                manifests[member.name] = compress(family.base, member.path, made)
                _adopt(made, folder / member.name)
                report(done / len(family.members))
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return manifests


def write_json(path: Path, content: Any) -> None:
    """Replace `path` atomically."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _adopt(made: Path, place: Path) -> None:
    """Move a whole new delta to its place; the place never holds half of one."""
    if _same_files(made, place):
        return
    if place.exists():
        place.rename(made.with_name(f"{made.name}.old"))
    made.rename(place)


def _same_files(one: Path, other: Path) -> bool:
    if not other.is_dir():
        return False
    names = sorted(path.name for path in one.iterdir())
    if names != sorted(path.name for path in other.iterdir()):
        return False
    return all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)


@contextmanager
def _single_threaded() -> Iterator[None]:
    """One thread of torch: the family's matrices are so small that threads only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
