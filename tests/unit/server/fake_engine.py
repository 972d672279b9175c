"""An engine without a model: it repeats the prompt, or whatever a test scripted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

from deltaserve.engine.types import (
    EngineRequest,
    EngineStats,
    FinishReason,
    ModelInfo,
    TokenEvent,
    TokenLogprobs,
)
from deltaserve.errors import EngineDeadError

KEY = "sk-correct-horse"
"""What the locked server asks for."""

Script = Callable[[EngineRequest], Iterable[TokenEvent]]


def scored(token: int, num_top: int | None) -> tuple[TokenLogprobs, ...] | None:
    """Each token is its own likeliest, and the more likely the smaller its id."""
    if num_top is None:
        return None
    logprob = -0.01 * (token + 1)
    top = tuple((other, logprob - other) for other in range(1, num_top))
    return (TokenLogprobs(token, logprob, 1, ((token, logprob), *top)[:num_top]),)


def echo(request: EngineRequest) -> Iterable[TokenEvent]:
    """The prompt again, a token at a time, then the end-of-sequence token."""
    sampling = request.sampling
    of_prompt = None
    if sampling.prompt_logprobs is not None:
        rest = request.prompt_ids[1:]
        of_prompt = tuple(
            one for token in rest for one in scored(token, sampling.prompt_logprobs) or ()
        )
    limit = sampling.max_tokens
    if limit == 0:
        yield TokenEvent(request.request_id, (), FinishReason.LENGTH, prompt_logprobs=of_prompt)
    answer = [*request.prompt_ids, min(request.sampling.stop_token_ids)]
    for count, token in enumerate(answer[:limit], start=1):
        reason = None
        if count == len(answer):
            reason = FinishReason.STOP
        elif count == limit:
            reason = FinishReason.LENGTH
        found = scored(token, sampling.logprobs)
        yield TokenEvent(
            request.request_id, (token,), reason, logprobs=found, prompt_logprobs=of_prompt
        )
        of_prompt = None


class FakeEngine:
    """An EngineClient; ``script`` and ``pause`` (seconds before each event) are the test's."""

    def __init__(self, models: list[ModelInfo]) -> None:
        self._served = models
        self.reset()

    def reset(self) -> None:
        self.infos = list(self._served)
        self.max_model_len = 200
        self.script: Script = echo
        self.pause = 0.0
        self.dead = self.restarting = False
        self.submitted: list[EngineRequest] = []
        self.aborted: list[str] = []
        self.streaming: set[str] = set()

    def models(self) -> list[ModelInfo]:
        return self.infos

    def submit(self, request: EngineRequest) -> None:
        if self.dead:
            raise EngineDeadError("the engine failed: out of luck")
        self.submitted.append(request)

    async def stream(self, request_id: str) -> AsyncIterator[TokenEvent]:
        request = next(r for r in self.submitted if r.request_id == request_id)
        self.streaming.add(request_id)
        try:
            for event in self.script(request):
                await asyncio.sleep(self.pause)
                yield event
        finally:
            self.streaming.discard(request_id)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def stats(self) -> EngineStats:
        return EngineStats(*[0] * 11)

    def alive(self) -> bool:
        return not self.dead

    def recovering(self) -> bool:
        return self.dead and self.restarting

    def close(self, reason: str = "") -> None:
        pass
