"""POST /v1/completions"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request, Response

from deltaserve.server.generate import Piece
from deltaserve.server.logprobs import answer_ids, of_completion, of_prompt
from deltaserve.server.prompts import beside, text_prompts
from deltaserve.server.protocol import CompletionRequest
from deltaserve.server.reading import read_request
from deltaserve.server.requests import Service, check_prompt
from deltaserve.server.respond import respond
from deltaserve.server.tokenizers import ModelTokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's


class CompletionShape:
    kind = chunk_kind = "text_completion"

    def __init__(
        self, body: CompletionRequest, prompts: list[list[int]], tokenizer: ModelTokenizer
    ) -> None:
        self._body = body
        self._prompts = prompts
        self._tokenizer = tokenizer

    def whole(self, piece: Piece) -> dict[str, Any]:
        return self._choice(piece, first=True)

    def parts(self, piece: Piece, first: bool) -> Iterator[dict[str, Any]]:
        yield self._choice(piece, first)

    def around(self, pieces: list[Piece]) -> dict[str, Any]:
        return {}

    def _choice(self, piece: Piece, first: bool) -> dict[str, Any]:
        body, prompt = self._body, self._prompts[piece.index // (self._body.n or 1)]
        choice = {
            "index": piece.index,
            "text": piece.text,
            "logprobs": None,
            "finish_reason": piece.finish_reason,
        }
        if body.num_logprobs is not None:
            choice["logprobs"] = of_completion(piece.tokens, body.num_logprobs, self._tokenizer)
        if body.return_token_ids:
            choice["token_ids"] = answer_ids(piece.tokens)
            if first:
                choice["prompt_token_ids"] = prompt
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = of_prompt(
                piece.prompt_logprobs or (), body.prompt_logprobs, self._tokenizer
            )
        return choice


def completions_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions")
    async def create_completion(request: Request) -> Response:
        body = await read_request(request, CompletionRequest)
        model = await service.model(request, body.model)
        prompts = await beside(
            request, lambda: text_prompts(body, body.prompt, model, body.max_tokens, "prompt")
        )
        limits = [
            check_prompt(model, prompt, body.max_tokens, DEFAULT_MAX_TOKENS, "prompt")
            for prompt in prompts
        ]
        response_id = f"cmpl-{request.state.request_id}"
        generation = service.generation(request, response_id, body, model, prompts, limits)
        shape = CompletionShape(body, prompts, model.tokenizer)
        return await respond(request, body, model, generation, shape, response_id)

    return router
