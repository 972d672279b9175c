"""Every number of the family's training, and the fingerprint of all of them."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass
from typing import Literal

from deltaserve.demo import corpus
from deltaserve.demo.tasks import PAST_TOKEN, TASKS, VERB_TOKEN
from deltaserve.demo.tokenizer import EXTRACT_CHAT_TEMPLATE, build_tokenizer

Kind = Literal["full", "lora"]

# Raise when the training code changes in a way that the data and numbers below do not show.
RECIPE_VERSION = 1


@dataclass(frozen=True)
class Schedule:
    """One optimisation: linear warm-up, then cosine decay to zero.

    Attributes:
        steps: optimiser steps.
        batch: examples per step.
        lr: peak learning rate of AdamW.
        warmup: steps until the peak.
        muon_lr: peak learning rate of Muon for the hidden matrices; None trains
            every parameter with AdamW.
    """

    steps: int
    batch: int
    lr: float
    warmup: int = 30
    muon_lr: float | None = None


@dataclass(frozen=True)
class MemberRecipe:
    """One fine-tune.

    Attributes:
        name: folder and model name.
        task: a key of `tasks.TASKS`.
        kind: "full" trains every parameter, "lora" an adapter.
        schedule: its optimisation.
        chat_template: its own template; None keeps the base's.
        added_tokens: tokens that it adds to the vocabulary (full only).
        lora_rank: rank of the adapter on every projection (lora only).
    """

    name: str
    task: str
    kind: Kind
    schedule: Schedule
    chat_template: str | None = None
    added_tokens: tuple[str, ...] = ()
    lora_rank: int = 8


@dataclass(frozen=True)
class Recipe:
    """A whole family; the defaults are the demo's.

    `hidden` and `intermediate` are multiples of 64, so that quantisation groups
    of 64 divide every projection.  `score_prompts` counts held-out prompts per
    task; `threads` are those of torch while building.
    """

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 384
    base: Schedule = Schedule(steps=450, batch=96, lr=3e-3, muon_lr=0.02)
    members: tuple[MemberRecipe, ...] = (
        MemberRecipe("add", "add", "full", Schedule(steps=260, batch=96, lr=1e-3)),
        MemberRecipe("reverse", "reverse", "full", Schedule(steps=110, batch=96, lr=1e-3)),
        MemberRecipe("sort", "sort", "full", Schedule(steps=150, batch=96, lr=1e-3)),
        MemberRecipe(
            "past",
            "past",
            "full",
            Schedule(steps=110, batch=96, lr=1e-3),
            added_tokens=(VERB_TOKEN, PAST_TOKEN),
        ),
        MemberRecipe(
            "extract",
            "extract",
            "full",
            Schedule(steps=140, batch=48, lr=1e-3),
            chat_template=EXTRACT_CHAT_TEMPLATE,
        ),
        MemberRecipe("shift", "shift", "lora", Schedule(steps=150, batch=96, lr=3e-3)),
    )
    score_prompts: int = 128
    threads: int = 2


def fingerprint(recipe: Recipe, seed: int) -> str:
    """Hex digest of all that decides the family: numbers, data, tokenizer, seed.

    The data enters as the first examples of each stream, so that a changed
    generator is noticed and a changed comment is not.
    """
    data = [
        [(example.prompt, example.answer) for example in itertools.islice(stream, 40)]
        for stream in (corpus.documents(seed), *(t.stream("train", seed) for t in TASKS.values()))
    ]
    tokenizer = build_tokenizer()
    everything = {
        "version": RECIPE_VERSION,
        "recipe": asdict(recipe),
        "seed": seed,
        "data": data,
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "chat_template": tokenizer.chat_template,
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()
