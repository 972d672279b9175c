"""Builds the family: trains what is missing, keeps what is there."""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deltaserve.demo import corpus
from deltaserve.demo.family import (
    BASE,
    RECORD,
    Family,
    FineTune,
    Record,
    default_dir,
    load_adapter,
    load_base,
    quiet,
)
from deltaserve.demo.fit import fit
from deltaserve.demo.recipe import RECIPE_VERSION, MemberRecipe, Recipe, fingerprint
from deltaserve.demo.score import exact_match
from deltaserve.demo.tasks import TASKS
from deltaserve.demo.tokenizer import BASE_CHAT_TEMPLATE, build_tokenizer

Progress = Callable[[str, float], None]

LOCK = ".lock"
MAX_POSITIONS = 1024  # room for long prompts in load tests; tasks need 64
HELD_OUT_SEED = 12345  # the scored prompts are the same for every seed


def build_family(
    dir: Path | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    recipe: Recipe | None = None,
) -> Family:
    """The family in `dir`, training only the models that are missing.

    Each model is written to a temporary folder and then renamed, so that an
    interrupted build leaves whole models or none, and the next call goes on from
    there.  A different seed, recipe or data rebuilds everything.  Builders of one
    folder wait for each other.

    Args:
        dir: the family's folder; the user's cache folder when None.
        seed: decides initial weights and training data.
        progress: called with a phase ("base", a member, "score ...") and the share
            of it that is done, 0 to 1; not called when nothing is missing.
        recipe: sizes and schedules; the demo's own when None.

    Raises:
        ValueError: `dir` holds folders that this function did not make.
    """
    root = (dir or default_dir()).expanduser().resolve()
    recipe = recipe or Recipe()
    report = progress or (lambda phase, done: None)
    root.mkdir(parents=True, exist_ok=True)
    with locked(root), _training_state(recipe.threads):
        record = _open_record(root, recipe, seed)
        _build_base(root, recipe, seed, record, report)
        for member in recipe.members:
            _build_member(root, member, seed, record, report)
        _score_base(root, recipe, record, report)
        for member in recipe.members:
            _score_member(root, member, record, report)
    return _family(root, recipe, record)


def _family(root: Path, recipe: Recipe, record: Record) -> Family:
    members = tuple(
        FineTune(
            name=member.name,
            path=root / member.name,
            task=member.task,
            kind=member.kind,
            base_score=record.base_scores[member.name],
            score=record.scores[member.name],
        )
        for member in recipe.members
    )
    return Family(root=root, base=root / BASE, members=members)


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Wait until nobody else writes in `root`, then keep others out."""
    with (root / LOCK).open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield  # closing the file releases the lock


@contextmanager
def _training_state(threads: int) -> Iterator[None]:
    """Leave the caller's thread count and random state as they were."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(before)


def _open_record(root: Path, recipe: Recipe, seed: int) -> Record:
    """The record that fits this recipe; models of any other recipe are removed."""
    wanted = fingerprint(recipe, seed)
    names = [member.name for member in recipe.members] + [BASE]
    record = Record.read(root)
    if record is None:
        strangers = [name for name in names if (root / name).exists()]
        if strangers:
            raise ValueError(
                f"{root} holds {', '.join(strangers)} but no readable {RECORD}, so it is not a "
                "demo family; choose another folder or remove these"
            )
    elif record.fingerprint == wanted and (root / BASE).exists():
        return record
    else:
        # Members first: a member must never outlive the base it was tuned from.
        for name in [*record.tasks, BASE]:
            shutil.rmtree(root / name, ignore_errors=True)
    record = Record(
        fingerprint=wanted,
        seed=seed,
        version=RECIPE_VERSION,
        score_prompts=recipe.score_prompts,
        tasks={member.name: member.task for member in recipe.members},
    )
    record.write(root)
    return record


@contextmanager
def _whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well."""
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _timed(root: Path, record: Record, phase: str, report: Progress) -> Iterator[None]:
    report(phase, 0.0)
    start = time.perf_counter()
    yield
    record.seconds[phase] = round(time.perf_counter() - start, 1)
    record.write(root)
    report(phase, 1.0)


def _build_base(root: Path, recipe: Recipe, seed: int, record: Record, report: Progress) -> None:
    if (root / BASE).exists():
        return
    with _timed(root, record, BASE, report), _whole_folder(root / BASE) as folder:
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        model = LlamaForCausalLM(_llama_config(recipe, tokenizer))
        stream = corpus.documents(seed)
        fit(model, tokenizer, stream, recipe.base, lambda done: report(BASE, done))
        _save(model, tokenizer, folder)


def _llama_config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    with quiet():
        model.to(dtype=torch.bfloat16)  # type: ignore[call-arg]  # decorated in transformers
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _build_member(
    root: Path, member: MemberRecipe, seed: int, record: Record, report: Progress
) -> None:
    if (root / member.name).exists():
        return
    record.scores.pop(member.name, None)
    with (
        _timed(root, record, member.name, report),
        _whole_folder(root / member.name) as folder,
    ):
        torch.manual_seed(seed + 1)
        train = _train_lora if member.kind == "lora" else _train_full
        train(root / BASE, member, seed, folder, lambda done: report(member.name, done))


def _train_full(
    base: Path, member: MemberRecipe, seed: int, folder: Path, report: Callable[[float], None]
) -> None:
    model, _ = load_base(base)
    tokenizer = build_tokenizer(member.chat_template or BASE_CHAT_TEMPLATE, member.added_tokens)
    if len(tokenizer) != model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    fit(model, tokenizer, TASKS[member.task].stream("train", seed), member.schedule, report)
    _save(model, tokenizer, folder)


def _train_lora(
    base: Path, member: MemberRecipe, seed: int, folder: Path, report: Callable[[float], None]
) -> None:
    with quiet():
        from peft import LoraConfig, get_peft_model  # slow to import, needed for adapters only

    model, tokenizer = load_base(base)
    config = LoraConfig(
        r=member.lora_rank,
        lora_alpha=2 * member.lora_rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with quiet():
        adapted = get_peft_model(model, config)
    # The adapter's layers sit inside `model` now; the wrapper only saves them.
    fit(model, tokenizer, TASKS[member.task].stream("train", seed), member.schedule, report)
    with quiet():
        adapted.to(dtype=torch.bfloat16)
        adapted.save_pretrained(str(folder))


def _score_base(root: Path, recipe: Recipe, record: Record, report: Progress) -> None:
    missing = [m for m in recipe.members if m.name not in record.base_scores]
    if not missing:
        return
    with _timed(root, record, "score base", report):
        model, tokenizer = load_base(root / BASE)
        for done, member in enumerate(missing, start=1):
            examples = TASKS[member.task].examples("held_out", recipe.score_prompts, HELD_OUT_SEED)
            record.base_scores[member.name] = exact_match(model, tokenizer, examples)
            report("score base", done / len(missing))


def _score_member(root: Path, member: MemberRecipe, record: Record, report: Progress) -> None:
    if member.name in record.scores:
        return
    with _timed(root, record, f"score {member.name}", report):
        path = root / member.name
        lora = member.kind == "lora"
        model, tokenizer = load_adapter(root / BASE, path) if lora else load_base(path)
        examples = TASKS[member.task].examples("held_out", record.score_prompts, HELD_OUT_SEED)
        record.scores[member.name] = exact_match(model, tokenizer, examples)
