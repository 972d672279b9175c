"""Logprobs as clients expect them: OpenAI's two shapes, and vLLM's for prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltaserve.engine.types import TokenLogprobs
from deltaserve.server.detokenize import Token
from deltaserve.server.tokenizers import ModelTokenizer

LEAST = -9999.0
"""Instead of minus infinity, which JSON does not have (vLLM's number)."""


def of_completion(tokens: Sequence[Token], num_top: int, tokenizer: ModelTokenizer) -> Any:
    """The shape of /v1/completions. The first token of a prompt has no logprob.

    The likeliest tokens include the token itself, as in vLLM.
    """
    return {
        "tokens": [token_text(token.token_id, tokenizer) for token in tokens],
        "token_logprobs": [
            _shown(token.logprobs.logprob) if token.logprobs else None for token in tokens
        ],
        "top_logprobs": [
            _by_text(token.logprobs, num_top, tokenizer) if token.logprobs else None
            for token in tokens
        ],
        "text_offset": [token.offset for token in tokens],
    }


def of_chat(tokens: Sequence[Token], num_top: int, tokenizer: ModelTokenizer) -> Any:
    """The shape of /v1/chat/completions."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_text(token_id, tokenizer),
            "logprob": _shown(logprob),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    found = [token.logprobs for token in tokens if token.logprobs is not None]
    content = [
        entry(one.token_id, one.logprob) | {"top_logprobs": [entry(*t) for t in one.top[:num_top]]}
        for one in found
    ]
    return {"content": content, "refusal": None}


def of_prompt(
    logprobs: Sequence[TokenLogprobs], num_top: int, tokenizer: ModelTokenizer
) -> list[dict[str, Any] | None]:
    """vLLM's ``prompt_logprobs``: for each token of the prompt, by token id; null for the first."""

    def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        text = token_text(token_id, tokenizer)
        return {"logprob": _shown(logprob), "rank": rank, "decoded_token": text}

    def entries(one: TokenLogprobs) -> dict[str, Any]:
        top = {
            str(token_id): entry(token_id, logprob, rank)
            for rank, (token_id, logprob) in enumerate(one.top[:num_top], start=1)
        }
        return {str(one.token_id): entry(one.token_id, one.logprob, one.rank)} | top

    return [None, *(entries(one) for one in logprobs)]


def answer_ids(tokens: Sequence[Token]) -> list[int]:
    return [token.token_id for token in tokens if not token.echoed]


def token_text(token_id: int, tokenizer: ModelTokenizer) -> str:
    """The token as text; of one that is no whole character, its bytes as OpenAI spells them."""
    spelled = tokenizer.token_bytes(token_id)
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def _by_text(one: TokenLogprobs, num_top: int, tokenizer: ModelTokenizer) -> dict[str, float]:
    """Tokens that read alike share an entry: the likelier's."""
    found: dict[str, float] = {}
    for token_id, logprob in (*one.top[:num_top], (one.token_id, one.logprob)):
        text = token_text(token_id, tokenizer)
        found[text] = max(found.get(text, LEAST), _shown(logprob))
    return found


def _shown(logprob: float) -> float:
    return max(logprob, LEAST)
