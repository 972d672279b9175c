"""Quality per byte: our presets beside the published recipes, on the demo's fine-tunes.

    python -m deltaserve.bench.quality --family DIR --out bench/results/quality.json

All calibrated methods read the same text, from the training split; scores and divergences
are those of the held-out split. Recipes are re-implemented at their own settings, in our
codecs: DeltaZip (2 of 4 values, per-row scales, dense embeddings; solved by our error
feedback, which refits scales as theirs does not) and BitDelta before its distillation.

A caution: how often our solver refits its scales (``gptq.ROUNDS``) was chosen on the held-out
split of two of these fine-tunes, so its rows are somewhat optimistic there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.artifact.manifest import Manifest
from deltaserve.artifact.reader import Delta
from deltaserve.bench.record import record
from deltaserve.compress.choose import compress_to
from deltaserve.compress.goal import Goal
from deltaserve.compress.models import load_tokenizer, load_with_delta
from deltaserve.compress.plan import Plan, make_plan
from deltaserve.compress.run import compress
from deltaserve.compress.textsource import TextOptions
from deltaserve.compress.verify import verify
from deltaserve.demo.family import Family, FineTune
from deltaserve.demo.score import exact_match
from deltaserve.demo.tasks import TASKS, Example
from deltaserve.demo.train import HELD_OUT_SEED, build_family

CALIBRATION = 256
HELD_OUT = 128
# Base, fine-tune, output, calibration text -> manifest.
Method = Callable[[Path, Path, Path, TextOptions], Manifest]


@dataclass(frozen=True)
class Row:
    """gain: share of what tuning added to the base's score that base + delta keeps."""

    method: str
    fine_tune: str
    disk_bytes: int
    resident_bytes: int
    resident_ratio: float
    kl: float
    agreement: float
    score: float
    gain: float


def rounded(plan: Plan) -> Method:
    return lambda base, model, out, text: compress(base, model, out, plan)


def calibrated(plan: Plan) -> Method:
    return lambda base, model, out, text: compress(base, model, out, plan, calibration=text)


def towards(goal: Goal) -> Method:
    return lambda base, model, out, text: compress_to(base, model, out, goal, text).manifest


def deltazip(bits: int) -> Method:
    settings = {"bits": bits, "group_size": 0, "clip": "absmax"}
    return calibrated(make_plan("nm24", settings, vocabulary_codec="raw"))


METHODS: dict[str, Method] = {
    "DeltaZip 4-bit 2:4": deltazip(4),
    "DeltaZip 2-bit 2:4": deltazip(2),
    "BitDelta, not distilled": rounded(
        make_plan("int", {"bits": 1, "scale_axis": "tensor"}, vocabulary_codec="raw")
    ),
    "rounding, 2-bit g64": rounded(make_plan("int", {"bits": 2})),
    "rounding, 1-bit g64": rounded(make_plan("int", {"bits": 1})),
    "calibrated, 1-bit rows": calibrated(make_plan("int", {"bits": 1, "group_size": 0})),
    "preset quality": towards(Goal("quality")),
    "preset balanced": towards(Goal("balanced")),
    "preset small": towards(Goal("small")),
}


def write_chats(path: Path, examples: Iterable[Example]) -> Path:
    """Examples as JSONL of messages."""
    lines = (
        {
            "messages": [
                {"role": "user", "content": example.prompt},
                {"role": "assistant", "content": example.answer},
            ]
        }
        for example in examples
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def measure_member(family: Family, member: FineTune, work: Path) -> list[Row]:
    """Every method on one fine-tune."""
    task = TASKS[member.task]
    train = itertools.islice(task.stream("train", 1), CALIBRATION)
    text = TextOptions(write_chats(work / "train.jsonl", train), CALIBRATION)
    examples = task.examples("held_out", HELD_OUT, HELD_OUT_SEED)
    held = TextOptions(write_chats(work / "held.jsonl", examples), HELD_OUT)
    tokenizer, rows = load_tokenizer(member.path, family.base), []
    for number, (name, method) in enumerate(METHODS.items()):
        out = work / str(number)
        manifest = method(family.base, member.path, out, text)
        quality = verify(family.base, out, member.path, held)
        model = load_with_delta(Checkpoint.open(family.base), Delta.open(out), "cpu")
        score = exact_match(model, tokenizer, examples)
        row = Row(
            method=name,
            fine_tune=member.name,
            disk_bytes=manifest.sizes.disk.total,
            resident_bytes=manifest.sizes.resident.total,
            resident_ratio=round(manifest.sizes.resident_ratio, 2),
            kl=quality.kl_mean,
            agreement=quality.agreement,
            score=score,
            gain=(score - member.base_score) / (member.score - member.base_score),
        )
        rows.append(row)
        print(
            f"{member.name:8} {name:24} {row.resident_bytes:9,} bytes {row.resident_ratio:6.2f}x"
            f"  KL {row.kl:.5f}  gain {row.gain:.3f}",
            file=sys.stderr,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Quality per byte of every method.")
    parser.add_argument(
        "--family", type=Path, help="folder of the demo's models; trained anew if out of date"
    )
    parser.add_argument("--members", nargs="*", help="which fine-tunes; all full ones by default")
    parser.add_argument("--out", type=Path, default=Path("bench/results/quality.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    family = build_family(arguments.family)
    members = [m for m in family.members if m.kind == "full"]
    if arguments.members:
        members = [m for m in members if m.name in arguments.members]
    rows: list[Row] = []
    for member in members:
        with tempfile.TemporaryDirectory() as work:
            rows += measure_member(family, member, Path(work))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    command = "python -m deltaserve.bench.quality --members " + " ".join(m.name for m in members)
    record(arguments.out, command, [asdict(row) for row in rows])


if __name__ == "__main__":
    main()
