"""The demo's prompts without DeltaServe: ``python -m deltaserve.bench.demo_baseline``.

Plain ``transformers.generate``, one dense model after the other, each asked the same prompts
as in ``deltaserve demo``, ``--batch-size`` at a time. Compare with the tokens per second of
the demo's table, on the same machine. Loading is not counted, HTTP does not occur: both
favour this baseline.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from deltaserve.bench.record import record
from deltaserve.demo.family import BASE, Family, load_base, load_member
from deltaserve.demo.questions import Question, questions_for
from deltaserve.demo.tokenizer import render
from deltaserve.demo.train import build_family


@dataclass(frozen=True)
class Measured:
    """One model's share. tokens: generated, the end of each answer included."""

    model: str
    prompts: int
    tokens: int
    seconds: float


@torch.inference_mode()
def measure(family: Family, batch_size: int) -> list[Measured]:
    found = []
    by_model = sorted(questions_for(family), key=lambda q: (q.model, q.task))
    for name, group in itertools.groupby(by_model, key=lambda q: q.model):
        questions = list(group)
        load = load_base(family.base, torch.bfloat16) if name == BASE else None
        model, tokenizer = load or load_member(family, name, torch.bfloat16)
        model.eval()
        start = time.perf_counter()
        tokens = sum(
            _generate(model, tokenizer, questions[i : i + batch_size])
            for i in range(0, len(questions), batch_size)
        )
        found.append(Measured(name, len(questions), tokens, time.perf_counter() - start))
    return found


def _generate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question]
) -> int:
    """Answer one batch; the number of tokens that count."""
    chats = [render(tokenizer, question.example.prompt) for question in questions]
    batch = tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False)
    out_BT = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=max(question.max_tokens for question in questions),
        do_sample=False,
    )
    # What follows the end of an answer is padding.
    return int((out_BT[:, batch["input_ids"].shape[1] :] != tokenizer.pad_token_id).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, help="the demo's folder (default: its own)")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write a JSON file as well")
    args = parser.parse_args()
    results = measure(build_family(args.dir), args.batch_size)
    print(f"{'model':<10}{'prompts':>8}{'tokens':>8}{'seconds':>9}{'tokens/s':>10}")
    sums = (sum(getattr(r, name) for r in results) for name in ("prompts", "tokens", "seconds"))
    for r in [*results, Measured("all", *sums)]:
        speed = r.tokens / r.seconds
        print(f"{r.model:<10}{r.prompts:>8}{r.tokens:>8}{r.seconds:>9.1f}{speed:>10.1f}")
    if args.out:
        command = f"python -m deltaserve.bench.demo_baseline --batch-size {args.batch_size}"
        record(args.out, command, [asdict(result) for result in results])


if __name__ == "__main__":
    main()
