"""What can be told about a request without the engine. No torch: the server's side calls it."""

from __future__ import annotations

import math

from deltaserve.engine.types import EngineRequest
from deltaserve.errors import RequestError


def check_request(request: EngineRequest, vocab_size: int, max_model_len: int) -> None:
    """Raises RequestError for what could never run; names the field."""
    prompt, max_tokens = request.prompt_ids, request.sampling.max_tokens
    if not prompt:
        raise RequestError("the prompt is empty", param="prompt")
    if max_tokens < 1:
        raise RequestError(f"max_tokens must be at least 1, not {max_tokens}", param="max_tokens")
    if len(prompt) + max_tokens > max_model_len:
        raise RequestError(
            f"this model's maximum context length is {max_model_len} tokens, but the request "
            f"has {len(prompt)} in the prompt and asks for {max_tokens} more",
            param="max_tokens" if len(prompt) < max_model_len else "prompt",
        )
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise RequestError(f"token ids must lie between 0 and {vocab_size - 1}", param="prompt")
    if not 0 < request.weight < math.inf:
        raise RequestError(
            f"a tenant's weight is {request.weight}, but must be positive and finite"
        )
