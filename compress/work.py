"""What a run has finished so far, in a hidden folder beside its output.

A run that is killed leaves it; the same command finds it and goes on from there. A run that
ends, well or with an error, removes it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from deltaserve.artifact.codecs.base import Encoded, dtype_name
from deltaserve.artifact.manifest import DTYPES
from deltaserve.artifact.staging import replacing
from deltaserve.compress.change import Change
from deltaserve.errors import ConfigError

JOB = "job.json"


class Work:
    """``with Work(out, job) as work: ...``. job: JSON-able, all that the result depends on.

    Raises ConfigError while another process works on the same output.
    """

    def __init__(self, out: Path, job: dict[str, Any]) -> None:
        out = Path(os.path.abspath(out))
        # The output's parents may not be there yet, and are nobody's until it appears.
        near = next(parent for parent in out.parents if parent.is_dir())
        key = hashlib.sha256(str(out).encode()).hexdigest()[:8]
        self.path = near / f".{out.name}.{key}.work"
        self._job = json.loads(json.dumps(job))
        self._out = out

    def __enter__(self) -> Work:
        self.path.mkdir(exist_ok=True)
        self._lock = (self.path / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{self._out} is being written by another process") from None
        if self.get(JOB) != self._job:
            for entry in self.path.iterdir():
                if entry.name != "lock":
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            self.put(JOB, self._job)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Ctrl-C and the like are no errors: whoever stops a run may want to go on later.
        if error is None or isinstance(error, Exception):
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()

    def folder(self, name: str) -> Path:
        path = self.path / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def forget(self, name: str) -> None:
        """Remove a folder."""
        shutil.rmtree(self.path / name, ignore_errors=True)

    def get(self, name: str) -> Any:
        """JSON that was put; None if it was not."""
        try:
            return json.loads((self.path / name).read_text())
        except (FileNotFoundError, ValueError):
            return None

    def put(self, name: str, value: Any) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(json.dumps(value))

    def changes(self, name: str, make: Callable[[], list[Change]]) -> list[Change]:
        """What ``make`` returned, in this run or in the one that was killed."""
        path = self.path / f"{name}.safetensors"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, make())
        return _read(path)


def _write(path: Path, changes: list[Change]) -> None:
    tensors, entries = {}, []
    for number, change in enumerate(changes):
        enc = change.enc
        stored = None if enc is None else [enc.codec, enc.params, enc.shape, dtype_name(enc.dtype)]
        entries.append([change.name, change.kind, change.error, change.full_bytes, stored])
        for part, tensor in {} if enc is None else enc.tensors.items():
            tensors[f"{number}/{part}"] = tensor.contiguous()
    with replacing(path) as partial:
        save_file(tensors, partial, {"changes": json.dumps(entries)})


def _read(path: Path) -> list[Change]:
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        entries = json.loads(file.metadata()["changes"])
    found = []
    for number, (name, kind, error, full, stored) in enumerate(entries):
        enc = None
        if stored is not None:
            codec, params, shape, dtype = stored
            start = f"{number}/"
            parts = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
            enc = Encoded(codec, params, tuple(shape), DTYPES[dtype], parts)
        found.append(Change(name, kind, enc, error, full))
    return found
