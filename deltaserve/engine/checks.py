"""What can be told about a request without the engine. No torch: the server's side calls it."""

from __future__ import annotations

import math

from deltaserve.engine.types import EngineRequest, SamplingParams
from deltaserve.errors import RequestError


def check_request(request: EngineRequest, vocab_size: int, max_model_len: int) -> None:
    """Raises RequestError for what could never run; names the field."""
    prompt, max_tokens = request.prompt_ids, request.sampling.max_tokens
    if not prompt:
        raise RequestError("the prompt is empty", param="prompt")
    sampling = request.sampling
    least = 1 if sampling.prompt_logprobs is None and sampling.pooling is None else 0
    if max_tokens < least:
        raise RequestError(
            f"max_tokens must be at least {least}, not {max_tokens}", param="max_tokens"
        )
    if len(prompt) + max_tokens > max_model_len:
        raise RequestError(
            f"this model's maximum context length is {max_model_len} tokens, but the request "
            f"has {len(prompt)} in the prompt and asks for {max_tokens} more",
            param="max_tokens" if len(prompt) < max_model_len else "prompt",
        )
    _check_allowed(request.sampling, vocab_size)
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise RequestError(f"token ids must lie between 0 and {vocab_size - 1}", param="prompt")
    if not 0 < request.weight < math.inf:
        raise RequestError(
            f"a tenant's weight is {request.weight}, but must be positive and finite"
        )


def _check_allowed(sampling: SamplingParams, vocab_size: int) -> None:
    allowed = sampling.allowed_token_ids
    if allowed is None:
        return
    problem = None
    if sampling.grammar is not None:
        problem = "allowed_token_ids and a grammar exclude each other: send one of them"
    elif not allowed:
        problem = "allowed_token_ids is empty: nothing could be generated"
    elif min(allowed) < 0 or max(allowed) >= vocab_size:
        problem = f"allowed_token_ids must lie between 0 and {vocab_size - 1}"
    elif sampling.min_tokens and sampling.stop_token_ids.issuperset(allowed):
        problem = "allowed_token_ids holds only stop tokens, which min_tokens forbids"
    if problem is not None:
        raise RequestError(problem, param="allowed_token_ids")
