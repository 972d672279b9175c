"""Compressing a checkpoint several times larger than the memory that may be used.

    python -m deltaserve.bench.compress_memory --limit-mb 600

Base and fine-tune are Llamas of random weights, each at least three times the limit. The command
line runs in a memory cgroup, which the kernel enforces for everything: heap, activations and
the pages of mapped files, which are thrown out of the page cache before so that the group pays
for all that it reads. Needs root and cgroups, version 1 or 2. A large ``--vocabulary`` makes most
of the checkpoint embedding and head, all of whose rows changed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deltaserve.artifact.safetensors_io import SafetensorsWriter
from deltaserve.bench.record import record
from deltaserve.demo.tokenizer import build_tokenizer

TIMES = 3.1
HIDDEN, INTERMEDIATE = 768, 2048
# Layers that the fine-tune changed: the others are read like them, and cost no fitting.
CHANGED = 6
RUNS = {
    "balanced (default)": [],
    "calibrated 1 bit": ["--calibrate", "--bits", "1", "--group-size", "0"],
    "plain": ["--plain"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compress under a hard memory limit.")
    parser.add_argument("--limit-mb", type=int, default=600)
    parser.add_argument("--vocabulary", type=int, help="tokens (default: the tokenizer's)")
    parser.add_argument("--runs", nargs="*", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--out", type=Path, default=Path("bench/results/compress_memory.json"))
    arguments = parser.parse_args()
    limit = arguments.limit_mb << 20
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        root = Path(folder)
        size = make_pair(root, int(TIMES * limit), arguments.vocabulary)
        text = root / "text.jsonl"
        lines = ({"text": f"{a}+{b}={a + b}; {a * b} and more of it"} for a, b in _pairs())
        text.write_text("".join(json.dumps(line) + "\n" for line in lines))
        for name in arguments.runs:
            options = RUNS[name]
            if "--plain" not in options:
                options = [*options, "--data", str(text), "--samples", "24"]
            results.append({"run": name, **measure(root, name, options, limit, size)})
            print(results[-1], file=sys.stderr)
    command = f"python -m deltaserve.bench.compress_memory --limit-mb {arguments.limit_mb}"
    if arguments.vocabulary:
        command += f" --vocabulary {arguments.vocabulary}"
    if arguments.runs != list(RUNS):
        command += " --runs " + " ".join(f"'{name}'" for name in arguments.runs)
    record(arguments.out, command, results)


def _pairs() -> Iterator[tuple[int, int]]:
    return ((a, b) for a in range(10, 20) for b in range(30, 36))


def make_pair(root: Path, least: int, vocabulary: int | None = None) -> int:
    """Base and fine-tune of at least so many bytes, written layer by layer; returns the size."""
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=vocabulary or len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=1,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    torch.manual_seed(0)
    state = LlamaForCausalLM(config).state_dict()
    layer = {name: t for name, t in state.items() if ".layers.0." in name}
    outside = sum(t.nbytes for name, t in state.items() if name not in layer)
    count = max(CHANGED, -(-(least - outside) // sum(t.nbytes for t in layer.values())))
    config.num_hidden_layers, config.architectures = count, ["LlamaForCausalLM"]
    config.layer_types = None
    sizes = []
    for name in ("base", "tuned"):
        (root / name).mkdir()
        writer = SafetensorsWriter(root / name, "model", max_shard_bytes=1 << 40)
        for parameter, tensor in state.items():
            for number in range(count if parameter in layer else 1):
                changed = name == "tuned" and (parameter not in layer or number >= count - CHANGED)
                noise = 0.002 * torch.randn_like(tensor) if changed and tensor.dim() > 1 else 0
                writer.add(parameter.replace(".layers.0.", f".layers.{number}."), tensor + noise)
        sizes.append(sum(writer.finish().files.values()))
        config.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return min(sizes)


def measure(root: Path, name: str, options: list[str], limit: int, size: int) -> dict[str, Any]:
    """Run the command line under the limit; raises if it fails."""
    out = root / name.replace(" ", "-")
    argv = [sys.executable, "-m", "deltaserve", "compress", str(root / "base"),
            str(root / "tuned"), "-o", str(out), *options]  # fmt: skip
    forget_pages(root)
    with memory_group(limit) as (group, peak):
        start = time.perf_counter()
        enter = f"import os; open({str(group)!r}, 'w').write(str(os.getpid())); "
        enter += f"os.execv({sys.executable!r}, {argv!r})"
        done = subprocess.run([sys.executable, "-c", enter], capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode not in (0, 1):
            raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stderr[-2000:]}")
        highest = int(peak.read_text())
    manifest = json.loads((out / "delta.json").read_text())
    return {
        "checkpoint_bytes": size,
        "limit_bytes": limit,
        "times_larger": round(size / limit, 2),
        "highest_bytes": highest,
        "seconds": round(seconds, 1),
        "digest": manifest["digest"],
        "kl": manifest.get("quality", {}).get("kl_mean"),
    }


def forget_pages(root: Path) -> None:
    """Whoever has read a page first is charged for it as long as it is cached."""
    for path in root.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def memory_group(limit: int) -> Iterator[tuple[Path, Path]]:
    """A cgroup of that limit, swap included: the file to enter it, and that of its peak."""
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    one = (v1 / "memory.limit_in_bytes").exists()
    group = (v1 if one else v2) / f"deltaserve-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if one else "memory.max")).write_text(str(limit))
        swap = group / ("memory.memsw.limit_in_bytes" if one else "memory.swap.max")
        if swap.exists():
            swap.write_text(str(limit if one else 0))
    except OSError as cause:
        raise SystemExit(f"a memory cgroup is needed, which takes root: {cause}") from None
    try:
        peak = group / ("memory.max_usage_in_bytes" if one else "memory.peak")
        yield group / "cgroup.procs", peak
    finally:
        group.rmdir()


if __name__ == "__main__":
    main()
