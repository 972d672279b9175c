"""Held-out prompts for every model of a family, asked over HTTP all at once."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from deltaserve.demo.family import BASE, Family
from deltaserve.demo.recipe import Recipe
from deltaserve.demo.score import score_texts
from deltaserve.demo.tasks import TASKS, Example
from deltaserve.demo.train import HELD_OUT_SEED

IN_FLIGHT = 48
REQUEST_SECONDS = 120.0


@dataclass(frozen=True)
class Question:
    """One held-out example for one model. max_tokens: as for the reference score."""

    model: str
    task: str
    example: Example
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    """What came back over HTTP."""

    question: Question
    text: str
    completion_tokens: int


@dataclass(frozen=True)
class EngineWork:
    """What the engine did between two readings of its counters."""

    steps: int
    mixed_steps: int
    max_models_in_step: int


@dataclass(frozen=True)
class Session:
    """All answers, the wall-clock seconds from the first request to the last answer."""

    answers: tuple[Answer, ...]
    seconds: float
    engine: EngineWork

    def score(self, model: str, task: str) -> float:
        """Exact match of `model` on `task`, 0 to 1."""
        chosen = [a for a in self.answers if (a.question.model, a.question.task) == (model, task)]
        return score_texts([a.question.example.answer for a in chosen], [a.text for a in chosen])

    def completion_tokens(self, model: str) -> int:
        return sum(a.completion_tokens for a in self.answers if a.question.model == model)

    def prompts(self, model: str) -> int:
        return sum(answer.question.model == model for answer in self.answers)


def questions_for(family: Family) -> list[Question]:
    """Every fine-tune is asked its own task, the base all of them.

    They are the prompts of the reference scores, so that scores differ by what was
    served and by nothing else.  Models take turns, so that batches mix them.
    """
    groups: list[list[Question]] = []
    for member in family.members:
        task = TASKS[member.task]
        examples = task.examples("held_out", Recipe().score_prompts, HELD_OUT_SEED)
        limit = max(len(example.answer) for example in examples) + 2  # as score.exact_match
        for model in (member.name, BASE):
            groups.append([Question(model, task.name, e, limit) for e in examples])
    return [question for turn in zip(*groups, strict=True) for question in turn]


def ask(url: str, questions: Sequence[Question], report: Callable[[float], None]) -> Session:
    """Ask the server at `url`, `IN_FLIGHT` questions at a time; `report` gets the share done.

    To be called in the main thread.  SIGTERM ends it with KeyboardInterrupt, as Ctrl-C does.

    Raises:
        openai.OpenAIError, httpx.HTTPError: a request failed.
    """
    before = _counters(url)
    start = time.perf_counter()
    try:
        answers = asyncio.run(_ask(url, questions, report))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    seconds = time.perf_counter() - start
    after = _counters(url)
    work = EngineWork(
        steps=after["steps"] - before["steps"],
        mixed_steps=after["mixed_steps"] - before["mixed_steps"],
        max_models_in_step=after["max_models_in_step"],
    )
    return Session(tuple(answers), seconds, work)


async def _ask(
    url: str, questions: Sequence[Question], report: Callable[[float], None]
) -> list[Answer]:
    # trust_env: a proxy of the environment has no business between two local processes.
    http = DefaultAsyncHttpxClient(trust_env=False, timeout=REQUEST_SECONDS)
    answers: list[Answer] = []
    waiting = iter(questions)
    async with AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none needed", http_client=http, max_retries=0
    ) as client:
        workers = (
            _worker(client, waiting, answers, len(questions), report) for _ in range(IN_FLIGHT)
        )
        with _cancelled_by_sigterm():
            await asyncio.gather(*workers)
    return answers


@contextmanager
def _cancelled_by_sigterm() -> Iterator[None]:
    """An exception out of a signal handler would leave the other tasks' tracebacks on stderr."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    before = signal.signal(signal.SIGTERM, lambda *_: loop.call_soon_threadsafe(task.cancel))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


async def _worker(
    client: AsyncOpenAI,
    waiting: Iterator[Question],
    answers: list[Answer],
    total: int,
    report: Callable[[float], None],
) -> None:
    for question in waiting:
        answers.append(await _answer(client, question))
        report(len(answers) / total)


async def _answer(client: AsyncOpenAI, question: Question) -> Answer:
    completion = await client.chat.completions.create(
        model=question.model,
        messages=[{"role": "user", "content": question.example.prompt}],
        temperature=0,
        max_tokens=question.max_tokens,
    )
    assert completion.usage is not None
    text = completion.choices[0].message.content or ""
    return Answer(question, text, completion.usage.completion_tokens)


def _counters(url: str) -> Mapping[str, int]:
    """The engine's counters since its start."""
    response = httpx.get(f"{url}/v1/stats", trust_env=False, timeout=REQUEST_SECONDS)
    response.raise_for_status()
    counters: Mapping[str, int] = response.json()
    return counters
