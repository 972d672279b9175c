"""Quality per byte: our presets beside the published recipes, on fine-tunes of two bases.

    python -m deltaserve.bench.quality --out bench/results/quality.json

All calibrated methods read the same text, from the training split of the fine-tune's tasks;
exact matches and divergences are those of the held-out split. After each published recipe ours
runs again with no more bytes in memory than that recipe took. No setting of ours was chosen on
these fine-tunes' held-out text. With fine-tunes of your own:

    python -m deltaserve.bench.quality --pair NAME BASE MODEL train.jsonl held.jsonl --out own.json
"""

from __future__ import annotations

import argparse
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
from deltaserve.bench.quality_models import CALIBRATION, Subject, build_subjects
from deltaserve.bench.quality_report import plot, summary
from deltaserve.bench.record import record
from deltaserve.compress.allocate import Table
from deltaserve.compress.jsonl import read_tasks, read_text
from deltaserve.compress.models import load_tokenizer
from deltaserve.compress.run import Target, compress_many
from deltaserve.compress.textsource import TextOptions
from deltaserve.compress.verify import Question, Thresholds, examine
from deltaserve.compress.weights import Source, of_delta, of_model
from deltaserve.errors import ConfigError, DeltaServeError

CONTEXT = 256
# Held-out answers that divergence is measured on; all of them are scored.
HELD = 1024


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

    def __init__(self, subject: Subject, work: Path, device: str) -> None:
        self._subject, self._work, self._device = subject, work, device
        self._base = Checkpoint.open(subject.base)
        self._model = Checkpoint.open(subject.model)
        context = int(self._model.hf_config.get_text_config().max_position_embeddings)
        self._text = TextOptions(subject.train, CALIBRATION, seq_len=min(CONTEXT, context))
        tokenizer = load_tokenizer(subject.model, subject.base)
        text = read_text(
            subject.held, tokenizer, samples=HELD, seq_len=None, context=context, seed=0
        )
        self._asked = Question(text, tasks=read_tasks(subject.held, tokenizer, context))
        self._table: Table | None = None
        self._base_score = self._score_of_base()

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
        request = replace(method.ask(subject.base, subject.model, self._text), device=self._device)
        if method.ours:
            request = replace(request, table=self._table)
        with tempfile.TemporaryDirectory(dir=self._work) as folder:
            out, start = Path(folder) / "delta", time.perf_counter()
            [chosen] = compress_many(subject.base, [Target(subject.model, out)], request)
            seconds = time.perf_counter() - start
            self._table = self._table or chosen.table
            quality = self._judge(of_delta(self._base, Delta.open(out)))
        sizes = chosen.manifest.sizes
        assert quality.tasks_delta is not None
        assert quality.tasks_fine_tune is not None
        gained = quality.tasks_fine_tune - self._base_score
        if gained <= 0:
            raise ConfigError(
                f"{subject.name} answers {quality.tasks_fine_tune:.1%} of {subject.held}, its base "
                f"{self._base_score:.1%}: there is no gain of which a share could be kept"
            )
        row = Row(
            method=method.name,
            rival=rival,
            ours=method.ours,
            fine_tune=subject.name,
            heavy=subject.heavy,
            disk_bytes=sizes.disk.total,
            resident_bytes=sizes.resident.total,
            disk_ratio=round(sizes.disk_ratio, 2),
            resident_ratio=round(sizes.resident_ratio, 2),
            kl=quality.kl_mean,
            agreement=quality.agreement,
            score=quality.tasks_delta,
            gain=(quality.tasks_delta - self._base_score) / gained,
            seconds=round(seconds, 1),
        )
        say(row)
        return row

    def _judge(self, theirs: Source) -> Quality:
        """The fine-tune against another source of parameters."""
        mine = of_model(self._base, self._model)
        with tempfile.TemporaryDirectory(dir=self._work) as folder:
            report = examine(self._base, mine, theirs, self._asked, Path(folder), self._device)
        return report("", Thresholds())

    def _score_of_base(self) -> float:
        """The base's exact matches, over the tokens that it has."""
        embedding = self._base.embedding or ""
        if self._base.shape(embedding) != self._model.shape(embedding):
            return 0.0  # it cannot even read the tokens that were added
        score = self._judge(of_model(self._base, self._base)).tasks_delta
        assert score is not None
        return score


def say(row: Row) -> None:
    print(
        f"{row.fine_tune:13} {row.method:40} {row.resident_bytes:9,} bytes "
        f"{row.resident_ratio:6.2f}x  KL {row.kl:.5f}  gain {row.gain:.3f}  {row.seconds:.0f} s",
        file=sys.stderr,
        flush=True,
    )


def measured(arguments: argparse.Namespace) -> Iterable[Row]:
    """The rows of every fine-tune that was asked for."""
    subjects = [_own(*pair) for pair in arguments.pair] if arguments.pair else build_subjects()
    names = [subject.name for subject in subjects]
    if unknown := set(arguments.subjects or []) - set(names):
        raise ConfigError(f"--subjects: {min(unknown)} is none of {', '.join(names)}")
    for subject in subjects:
        if subject.name in (arguments.subjects or names):
            with tempfile.TemporaryDirectory() as work:
                yield from Bench(subject, Path(work), arguments.device).rows()


def _own(name: str, base: str, model: str, train: str, held: str) -> Subject:
    return Subject(name, Path(base), Path(model), Path(train), Path(held))


def main() -> None:
    parser = argparse.ArgumentParser(description="Quality per byte of every method.")
    parser.add_argument("--subjects", nargs="*", help="which fine-tunes; all by default")
    parser.add_argument(
        "--pair", nargs=5, action="append", metavar=("NAME", "BASE", "MODEL", "TRAIN", "HELD"),
        help="a fine-tune of yours instead: directories, and JSONL of messages to calibrate on "
        "and to score; may be repeated",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("bench/results/quality.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        rows = list(measured(arguments))
    except DeltaServeError as error:
        parser.exit(2, f"{error}\n")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    command = "python -m deltaserve.bench.quality"
    if arguments.subjects:
        command += " --subjects " + " ".join(arguments.subjects)
    for name, *_ in arguments.pair or []:
        command += f" --pair {name} ..."
    table = [asdict(row) for row in rows]
    record(arguments.out, command, {"rows": table, "summary": summary(table)})
    arguments.out.with_suffix(".svg").write_text(plot(table))


if __name__ == "__main__":
    main()
