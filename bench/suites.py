"""The suites of ``configs/bench/``, each on its own server: ``python -m deltaserve.bench.suites``.

Each suite gets what it needs: a small base of random weights and its LoRA deltas, a server of its
own with its tenants and their keys, and ``deltaserve bench serve`` in front of it, whose exit code
is the suite's: 0 where every threshold of the workload was kept. Time and counts only: a model of
this size says nothing about the speed of others.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deltaserve.bench.load.result import read_result
from deltaserve.bench.peer_models import build_base, build_lora
from deltaserve.bench.record import record
from deltaserve.demo.tokenizer import build_tokenizer
from deltaserve.tenancy.keys import digest, new_key

WORKLOADS = Path("configs/bench")
HIDDEN, LAYERS, RANK = 128, 2, 4
DELTA_BYTES = 48 << 10
"""Of a delta of that shape, about."""
KV_BYTES = 256 << 20
KEPT = ("started", "ended", "seconds", "summary", "tenants", "probes", "slowdown", "client")
"""Of a result, for the record, with the thresholds: what has a bounded size."""


@dataclass(frozen=True)
class Suite:
    """deltas: registered with its server; room: for so many of them at a time, None is for all;
    tenants: with keys, in the order of the workload's."""

    deltas: int
    room: int | None = None
    tenants: tuple[str, ...] = ()


SUITES = {
    "noisy-neighbour": Suite(2, tenants=("polite", "flooding")),
    "thousand-deltas": Suite(1000, room=64),
    "streams-500": Suite(8),
    "soak": Suite(8),
}


def run(name: str, root: Path, options: list[str], out: Path | None) -> int:
    """One suite: its exit code. Models are made below ``root`` where they are missing."""
    suite = SUITES[name]
    keys = {tenant: new_key() for tenant in suite.tenants}
    result = root / f"{name}.json"
    command = ["bench", "serve", str(WORKLOADS / f"{name}.yaml"), *options]
    command += ["--spawn", str(server(root, name, keys)), "--out", str(result)]
    for number, tenant in enumerate(keys):
        command += ["--set", f"tenants.{number}.api_key_env={_variable(tenant)}"]
    secrets = {_variable(tenant): key for tenant, key in keys.items()}
    if keys:  # with tenants, its metrics are for who holds this one
        secrets["DELTASERVE_ADMIN_KEY"] = new_key()
    result.unlink(missing_ok=True)
    code = subprocess.run(
        [sys.executable, "-m", "deltaserve", *command], env=os.environ | secrets, check=False
    ).returncode
    if out is not None and result.is_file():
        record(out, " ".join(["python -m deltaserve.bench.suites", name, *options]), kept(result))
    print(f"{name}: {'pass' if code == 0 else f'FAIL (exit code {code})'}", flush=True)
    return code


def server(root: Path, name: str, keys: Mapping[str, str]) -> Path:
    """The file of the suite's server: base, deltas, and tenants with these keys."""
    suite = SUITES[name]
    base = build_base(root / "base", HIDDEN, LAYERS, build_tokenizer())
    loras = [
        build_lora(base, root / f"lora-{seed:04d}", seed, rank=RANK) for seed in range(suite.deltas)
    ]
    content: dict[str, Any] = {
        "base": str(base),
        "deltas": {lora.stem: str(lora) for lora in loras},
        "device": "cpu",
        "kv-cache-memory-bytes": KV_BYTES,
    }
    if suite.room is not None:
        content["delta-memory-bytes"] = suite.room * DELTA_BYTES
        content["host-memory-bytes"] = 2 * suite.room * DELTA_BYTES
    if keys:
        tenants = [
            {"id": tenant, "models": ["*"], "keys": [{"sha256": digest(key)}]}
            for tenant, key in keys.items()
        ]
        content["tenants"] = str(_written(root / f"{name}-tenants.yaml", {"tenants": tenants}))
        content["state-dir"] = str(root / f"{name}-state")
    return _written(root / f"{name}-server.yaml", content)


def _written(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False), encoding="utf-8")
    return path


def kept(result: Path) -> dict[str, Any]:
    found = read_result(result)
    return {key: found[key] for key in (*KEPT, "thresholds")}


def _variable(tenant: str) -> str:
    return f"SUITE_{tenant.upper()}_KEY"


def main() -> int:
    """The worst exit code of the suites."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SUITES)}")
    parser.add_argument("--dir", type=Path, help="keep models and results here")
    parser.add_argument("--duration", type=float, help="seconds, instead of the workload's")
    parser.add_argument("--record", type=Path, help="folder that gets suite-NAME.json")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in SUITES]:
        parser.error(f"no suite is called {unknown[0]!r}; there are {', '.join(SUITES)}")
    options = [] if args.duration is None else ["--duration", f"{args.duration:g}"]
    if args.record:  # a mistake in it shall not show after half an hour
        args.record.mkdir(parents=True, exist_ok=True)
    code = 0
    with contextlib.ExitStack() as stack:
        root = args.dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root = root.resolve()
        root.mkdir(parents=True, exist_ok=True)
        for name in args.names or SUITES:
            out = args.record and args.record / f"suite-{name}.json"
            code = max(code, run(name, root, options, out))
    return code


if __name__ == "__main__":
    sys.exit(main())
