"""From what clients send to token ids. All of it may take long: not for the event loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import Request

from deltaserve.errors import RequestError
from deltaserve.server.protocol import ChatRequest, GenerationRequest
from deltaserve.server.requests import ServedModel, check_choices
from deltaserve.server.sse import while_connected
from deltaserve.server.turns import in_turn

T = TypeVar("T")


async def beside(request: Request, work: Callable[[], T]) -> T:
    """Run in a thread, in the tenant's turn; nobody waits for it when the client has gone."""
    return await while_connected(request.receive, in_turn(request, work))


def text_prompts(
    body: GenerationRequest, given: Any, model: ServedModel, max_tokens: int | None, param: str
) -> list[list[int]]:
    """The token ids of each prompt, ``given`` in one of the four forms. Raises RequestError."""
    single = isinstance(given, str) or (given and isinstance(given[0], int))
    prompts: list[str | list[int]] = [given] if single else given
    check_choices(len(prompts), body.n)
    if not prompts or "" in prompts:
        raise RequestError(f"{param} is empty: it must hold at least one token", param=param)
    special = body.add_special_tokens is not False
    found = [model.tokenizer.encode(p, special) if isinstance(p, str) else p for p in prompts]
    return [_truncate(body, model, ids, max_tokens) for ids in found]


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
