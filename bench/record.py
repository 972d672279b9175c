"""Where results go, and on what machine they were measured."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from deltaserve.artifact.staging import replacing


def machine() -> dict[str, Any]:
    """What can be told without loading torch."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
    }


def environment() -> dict[str, Any]:
    """Versions and hardware, so that a number can be judged."""
    import torch
    import transformers

    return machine() | {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def record(path: Path, command: str, results: Any) -> None:
    """Write one JSON file: the command, the environment, the results."""
    save(path, command, results)
    print(f"written to {path}", file=sys.stderr)


def save(path: Path, command: str, results: Any) -> None:
    """``record`` without a word: for results that grow. Missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"command": command, "environment": environment(), "results": results}
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
