"""POST /v1/chat/completions"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request, Response

from deltaserve.engine.types import FinishReason
from deltaserve.server.generate import Piece
from deltaserve.server.logprobs import answer_ids, of_chat, of_prompt
from deltaserve.server.prompts import beside, chat_prompt
from deltaserve.server.protocol import ChatRequest
from deltaserve.server.requests import Service, check_prompt, read_request
from deltaserve.server.respond import respond
from deltaserve.server.tokenizers import ModelTokenizer


class ChatShape:
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, body: ChatRequest, prompt: list[int], tokenizer: ModelTokenizer) -> None:
        self._body = body
        self._prompt = prompt
        self._tokenizer = tokenizer

    def whole(self, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {
            "index": piece.index,
            "message": message,
            "logprobs": None,
            "finish_reason": piece.finish_reason,
            **self._tokens(piece),
        }

    def around(self, pieces: list[Piece]) -> dict[str, Any]:
        said: dict[str, Any] = {}
        if self._body.return_token_ids:
            said["prompt_token_ids"] = self._prompt
        if self._body.prompt_logprobs is not None:
            found = pieces[0].prompt_logprobs or ()
            said["prompt_logprobs"] = of_prompt(found, self._body.prompt_logprobs, self._tokenizer)
        return said

    def parts(self, piece: Piece, first: bool) -> Iterator[dict[str, Any]]:
        """The role comes before the text, the reason after it, each in a chunk of its own."""
        if first:
            yield _part(piece.index, {"role": "assistant", "content": ""})
        if piece.text or piece.tokens:
            yield _part(piece.index, {"content": piece.text}) | self._tokens(piece)
        if piece.finish_reason is not None:
            yield _part(piece.index, {}, piece.finish_reason)

    def _tokens(self, piece: Piece) -> dict[str, Any]:
        """What a choice says of its tokens."""
        said: dict[str, Any] = {}
        if self._body.num_logprobs is not None:
            said["logprobs"] = of_chat(piece.tokens, self._body.num_logprobs, self._tokenizer)
        if self._body.return_token_ids:
            said["token_ids"] = answer_ids(piece.tokens)
        return said


def _part(index: int, delta: dict[str, str], reason: FinishReason | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def chat_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def create_chat_completion(request: Request) -> Response:
        body = await read_request(request, ChatRequest)
        model = await service.model(request, body.model)
        prompt = await beside(request, lambda: chat_prompt(body, model))
        asked = body.max_completion_tokens or body.max_tokens
        limit = check_prompt(model, prompt, asked, None, "messages")
        response_id = f"chatcmpl-{request.state.request_id}"
        generation = service.generation(request, response_id, body, model, [prompt], [limit])
        shape = ChatShape(body, prompt, model.tokenizer)
        return await respond(request, body, model, generation, shape, response_id)

    return router
