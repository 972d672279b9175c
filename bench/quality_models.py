"""The models of the quality benchmark: the demo's family, a second base, and heavy fine-tunes.

A heavy fine-tune learns every task at once, for several times as many steps at several times
the learning rate, so its difference from the base is large and of high rank.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from deltaserve.demo import corpus
from deltaserve.demo.family import default_dir, quiet
from deltaserve.demo.fit import fit
from deltaserve.demo.recipe import Schedule
from deltaserve.demo.tasks import TASKS, Example
from deltaserve.demo.tokenizer import build_tokenizer
from deltaserve.demo.train import HELD_OUT_SEED, build_family

SCORED = 128
# Sequences that calibrated methods read; the file has a quarter more, for the check.
CALIBRATION = 256
HEAVY = ("add", "reverse", "sort", "shift")
QWEN_BASE = Schedule(steps=330, batch=96, lr=3e-3, muon_lr=0.02)
LONG = Schedule(steps=700, batch=96, lr=4e-3)
# name -> tasks, schedule, of the second base.
QWEN_MEMBERS: dict[str, tuple[tuple[str, ...], Schedule]] = {
    "qwen-reverse": (("reverse",), Schedule(steps=110, batch=96, lr=1e-3)),
    "qwen-shift": (("shift",), Schedule(steps=140, batch=96, lr=1e-3)),
    "qwen-heavy": (HEAVY, LONG),
}
VERSION = 1


@dataclass(frozen=True)
class Subject:
    """One fine-tune to compress: where it and its base are, and JSONL of messages.

    train: what is calibrated on; held: prompts with the only right answers, which nothing but
    the scores sees. heavy: tuned for long and far from its base.
    """

    name: str
    base: Path
    model: Path
    train: Path
    held: Path
    heavy: bool = False


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


def stream(tasks: tuple[str, ...], split: Any, seed: int) -> Iterator[Example]:
    """Endless examples of all tasks in random order."""
    streams = [TASKS[name].stream(split, seed) for name in tasks]
    rng = random.Random(seed)
    while True:
        yield next(rng.choice(streams))


def held_out(tasks: tuple[str, ...], count: int = SCORED) -> list[Example]:
    """The prompts that are scored, as many of each task."""
    each = [TASKS[name].examples("held_out", count // len(tasks), HELD_OUT_SEED) for name in tasks]
    return list(itertools.chain(*each))


def build_subjects(root: Path | None = None) -> list[Subject]:
    """All fine-tunes, trained where they are missing (about ten minutes on two cores).

    root: folder of the second family; beside the demo's in the user's cache when None.
    """
    root = root or default_dir().parent / "quality"
    family = build_family()
    with torch.random.fork_rng(devices=[]):
        found = [
            _subject(root, m.name, family.base, m.path, (m.task,))
            for m in family.members
            if m.kind == "full"
        ]
        found.append(_tuned(root, "llama-heavy", family.base, HEAVY, LONG))
        base = _qwen_base(root)
        for name, (tasks, schedule) in QWEN_MEMBERS.items():
            found.append(_tuned(root, name, base, tasks, schedule))
    return found


def _subject(root: Path, name: str, base: Path, model: Path, tasks: tuple[str, ...]) -> Subject:
    root.mkdir(parents=True, exist_ok=True)
    train = itertools.islice(stream(tasks, "train", 1), CALIBRATION * 5 // 4)
    return Subject(
        name, base, model,
        write_chats(root / f"{name}-train.jsonl", train),
        write_chats(root / f"{name}-held.jsonl", held_out(tasks)),
        heavy=len(tasks) > 1,
    )  # fmt: skip


def _qwen_base(root: Path) -> Path:
    path = root / "qwen-base"
    if path.exists():
        return path
    torch.manual_seed(7)
    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model: Any = Qwen3ForCausalLM(config)
    fit(model, tokenizer, corpus.documents(7), QWEN_BASE, lambda done: None)
    _save(model, tokenizer, path)
    return path


def _tuned(
    root: Path, name: str, base: Path, tasks: tuple[str, ...], schedule: Schedule
) -> Subject:
    path, record = root / name, root / f"{name}.json"
    wanted = {"version": VERSION, "tasks": list(tasks), "schedule": asdict(schedule)}
    known = json.loads(record.read_text()) if record.exists() else {}
    if known.get("recipe") != wanted:
        model, tokenizer = _load(base)
        torch.manual_seed(8)
        fit(model, tokenizer, stream(tasks, "train", 8), schedule, lambda done: None)
        _save(model, tokenizer, path)
        record.write_text(json.dumps({"recipe": wanted}) + "\n")
    return _subject(root, name, base, path, tasks)


def _load(path: Path) -> tuple[Any, Any]:
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(path)


def _save(model: Any, tokenizer: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with quiet():
        model.to(dtype=torch.bfloat16)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
