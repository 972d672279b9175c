"""Quality per byte: our presets beside the published recipes, on fine-tunes of two bases.

    python -m deltaserve.bench.quality --out bench/results/quality.json

All calibrated methods read the same text, from the training split of the fine-tune's tasks;
exact matches and divergences are those of the held-out split. After each published recipe ours
runs again with no more bytes in memory than that recipe took. No setting of ours was chosen on
these fine-tunes' held-out text.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.artifact.quality import Quality
from deltaserve.artifact.reader import Delta
from deltaserve.bench.quality_methods import OURS, PUBLISHED, Method, no_larger
from deltaserve.bench.quality_models import Subject, build_subjects, held_out, stream
from deltaserve.bench.quality_report import plot, summary
from deltaserve.bench.record import record
from deltaserve.compress.allocate import Table
from deltaserve.compress.jsonl import read_tasks, read_text
from deltaserve.compress.models import load_tokenizer
from deltaserve.compress.run import Target, compress_many
from deltaserve.compress.textsource import TextOptions
from deltaserve.compress.verify import Question, Thresholds, examine
from deltaserve.compress.weights import of_delta, of_model
from deltaserve.demo.tasks import Example

CALIBRATION = 256
CONTEXT = 256


@dataclass(frozen=True)
class Row:
    """rival: the recipe that this run of ours may not exceed in bytes. gain: share of what tuning
    added to the base's score that base + delta keeps. seconds: of compressing, without measuring
    candidates where they were known."""

    method: str
    rival: str
    ours: bool
    fine_tune: str
    heavy: bool
    disk_bytes: int
    resident_bytes: int
    disk_ratio: float
    resident_ratio: float
    kl: float
    agreement: float
    score: float
    gain: float
    seconds: float


class Bench:
    """One fine-tune, its texts, and the candidates that were measured for it."""

    def __init__(self, subject: Subject, work: Path) -> None:
        self._subject, self._work = subject, work
        train = itertools.islice(stream(subject.tasks, "train", 1), CALIBRATION * 5 // 4)
        examples = held_out(subject.tasks)
        self._text = TextOptions(write_chats(work / "train.jsonl", train), CALIBRATION)
        held = write_chats(work / "held.jsonl", examples)
        tokenizer = load_tokenizer(subject.model, subject.base)
        text = read_text(
            held, tokenizer, samples=len(examples), seq_len=None, context=CONTEXT, seed=0
        )
        self._asked = Question(text, tasks=read_tasks(held, tokenizer, CONTEXT))
        self._table: Table | None = None

    def rows(self) -> Iterable[Row]:
        """Every method; ours once more beside each published one."""
        for method in OURS:
            yield self._row(method)
        for method in PUBLISHED:
            theirs = self._row(method)
            yield theirs
            ours = no_larger(method.name, self._subject.model, theirs.resident_bytes)
            yield self._row(ours, rival=method.name)

    def _row(self, method: Method, rival: str = "") -> Row:
        subject = self._subject
        request = method.ask(subject.base, subject.model, self._text)
        if method.ours:
            request = replace(request, table=self._table)
        with tempfile.TemporaryDirectory(dir=self._work) as folder:
            out, start = Path(folder) / "delta", time.perf_counter()
            [chosen] = compress_many(subject.base, [Target(subject.model, out)], request)
            seconds = time.perf_counter() - start
            self._table = self._table or chosen.table
            quality = self._judge(out)
        sizes = chosen.manifest.sizes
        assert quality.tasks_delta is not None
        assert quality.tasks_fine_tune is not None
        gained = quality.tasks_fine_tune - subject.base_score
        row = Row(
            method=method.name,
            rival=rival,
            ours=method.ours,
            fine_tune=subject.name,
            heavy=subject.steps > 0 and len(subject.tasks) > 1,
            disk_bytes=sizes.disk.total,
            resident_bytes=sizes.resident.total,
            disk_ratio=round(sizes.disk_ratio, 2),
            resident_ratio=round(sizes.resident_ratio, 2),
            kl=quality.kl_mean,
            agreement=quality.agreement,
            score=quality.tasks_delta,
            gain=(quality.tasks_delta - subject.base_score) / gained,
            seconds=round(seconds, 1),
        )
        say(row)
        return row

    def _judge(self, out: Path) -> Quality:
        base, model = Checkpoint.open(self._subject.base), Checkpoint.open(self._subject.model)
        delta = Delta.open(out)
        with tempfile.TemporaryDirectory(dir=self._work) as folder:
            mine, theirs = of_model(base, model), of_delta(base, delta)
            report = examine(base, mine, theirs, self._asked, Path(folder), "cpu")
        return report(delta.manifest.digest, Thresholds())


def say(row: Row) -> None:
    print(
        f"{row.fine_tune:13} {row.method:40} {row.resident_bytes:9,} bytes "
        f"{row.resident_ratio:6.2f}x  KL {row.kl:.5f}  gain {row.gain:.3f}  {row.seconds:.0f} s",
        file=sys.stderr,
        flush=True,
    )


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


def main() -> None:
    parser = argparse.ArgumentParser(description="Quality per byte of every method.")
    parser.add_argument("--subjects", nargs="*", help="which fine-tunes; all by default")
    parser.add_argument("--out", type=Path, default=Path("bench/results/quality.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    subjects = build_subjects()
    chosen = arguments.subjects or [subject.name for subject in subjects]
    rows: list[Row] = []
    for subject in subjects:
        if subject.name in chosen:
            with tempfile.TemporaryDirectory() as work:
                rows += Bench(subject, Path(work)).rows()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    command = "python -m deltaserve.bench.quality"
    if arguments.subjects:
        command += " --subjects " + " ".join(chosen)
    table = [asdict(row) for row in rows]
    record(arguments.out, command, {"rows": table, "summary": summary(table)})
    arguments.out.with_suffix(".svg").write_text(plot(table))


if __name__ == "__main__":
    main()
