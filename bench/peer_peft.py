"""PEFT's multi-adapter ``generate`` as a peer: in a process of its own, asked through a pipe.

It has no HTTP server, so the comparison favours it: no request is received, queued or streamed,
all prompts are as long and come as one batch. Its adapters compute in the base's bf16.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from deltaserve.bench.peer_models import prompt


@dataclass(frozen=True)
class Question:
    """One load: prompts ``first`` and following, the adapters taking turns."""

    adapters: tuple[str, ...]
    requests: int
    tokens: int
    first: int


class PeftProcess:
    """Loads base and adapters and answers; ended by ``stop``."""

    def __init__(self, base: Path, adapters: Sequence[Path]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, base, tuple(adapters)), daemon=True
        )
        self._process.start()
        theirs.close()

    def wait_until_ready(self, seconds: float) -> None:
        """Raises TimeoutError, or EOFError: it ended."""
        self._receive(seconds)

    def ask(self, question: Question, seconds: float) -> tuple[list[int], float]:
        """Tokens of each answer, and seconds. Raises TimeoutError, or EOFError: it ended."""
        start = time.perf_counter()
        self._connection.send(question)
        return self._receive(seconds), time.perf_counter() - start

    def _receive(self, seconds: float) -> list[int]:
        if not self._connection.poll(seconds):
            raise TimeoutError
        answer: list[int] = self._connection.recv()
        return answer

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()


def _serve(connection: Connection, base: Path, adapters: tuple[Path, ...]) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    first, *others = adapters
    # Without the cast to float32 that training wants: it would only slow them down here.
    tuned = PeftModel.from_pretrained(
        model, first, adapter_name=first.stem, autocast_adapter_dtype=False
    )
    for adapter in others:
        tuned.load_adapter(adapter, adapter_name=adapter.stem, autocast_adapter_dtype=False)
    tuned.eval()
    connection.send([])
    while True:
        question: Question = connection.recv()
        connection.send(_generate(tuned, tokenizer, question))


def _generate(model: Any, tokenizer: Any, question: Question) -> list[int]:
    """Tokens of each answer; texts are made as well, as a server would."""
    import torch

    chats = [
        [{"role": "user", "content": prompt(question.first + i)}] for i in range(question.requests)
    ]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    names = [question.adapters[i % len(question.adapters)] for i in range(question.requests)]
    mixed = {"adapter_names": names} if len(question.adapters) > 1 else {}
    if not mixed:
        model.set_adapter(names[0])  # the faster way where all rows have the same
    with torch.inference_mode():
        answers = model.generate(
            **inputs, **mixed, max_new_tokens=question.tokens, do_sample=False, pad_token_id=0
        )[:, inputs["input_ids"].shape[1] :]
    assert len(tokenizer.batch_decode(answers)) == question.requests
    return [len(answer) for answer in answers]
