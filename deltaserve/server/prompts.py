"""From what clients send to token ids. All of it may take long: not for the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from fastapi import Request

from deltaserve.errors import RequestError
from deltaserve.server.protocol import ChatRequest, CompletionRequest, GenerationRequest
from deltaserve.server.requests import ServedModel, check_choices
from deltaserve.server.sse import while_connected

T = TypeVar("T")


async def beside(request: Request, work: Callable[[], T]) -> T:
    """Run in a thread; nobody waits for it when the client has gone."""
    return await while_connected(request.receive, asyncio.to_thread(work))


def completion_prompts(body: CompletionRequest, model: ServedModel) -> list[list[int]]:
    """The token ids of each prompt. Raises RequestError."""
    prompts = body.prompts
    check_choices(len(prompts), body.n)
    if not prompts or "" in prompts:
        raise RequestError("prompt is empty: it must hold at least one token", param="prompt")
    special = body.add_special_tokens is not False
    found = [model.tokenizer.encode(p, special) if isinstance(p, str) else p for p in prompts]
    return [_truncate(body, model, ids, body.max_tokens) for ids in found]


def chat_prompt(body: ChatRequest, model: ServedModel) -> list[int]:
    """Raises RequestError."""
    asked = body.max_completion_tokens or body.max_tokens
    return _truncate(body, model, model.tokenizer.encode_chat(body), asked)


def _truncate(
    body: GenerationRequest, model: ServedModel, ids: list[int], max_tokens: int | None
) -> list[int]:
    limit = body.truncate_prompt_tokens
    if limit is None:
        return ids
    if limit == -1:
        needed = 1 if max_tokens is None else max_tokens
        limit = max(model.max_model_len - needed, 1)
    return ids[-limit:]
