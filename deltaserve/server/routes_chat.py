"""POST /v1/chat/completions"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request, Response

from deltaserve.engine.types import FinishReason
from deltaserve.errors import RequestError
from deltaserve.server.generate import Piece
from deltaserve.server.protocol import ChatRequest, Message
from deltaserve.server.requests import Service, check_prompt, read_request
from deltaserve.server.respond import respond
from deltaserve.server.sse import while_connected


class ChatShape:
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def whole(self, index: int, text: str, reason: FinishReason) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}

    def parts(self, piece: Piece, first: bool) -> Iterator[dict[str, Any]]:
        """The role comes before the text, the reason after it, each in a chunk of its own."""
        if first:
            yield _part(piece.index, {"role": "assistant", "content": ""})
        if piece.text:
            yield _part(piece.index, {"content": piece.text})
        if piece.finish_reason is not None:
            yield _part(piece.index, {}, piece.finish_reason)


def _part(index: int, delta: dict[str, str], reason: FinishReason | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def chat_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def create_chat_completion(request: Request) -> Response:
        body = await read_request(request, ChatRequest)
        model = service.model(body.model)
        if not model.tokenizer.has_chat_template:
            raise RequestError(
                f"{model.info.name} has no chat template: use /v1/completions, or add "
                "chat_template.jinja to the model and compress it again",
                param="model",
            )
        messages = [_plain(message) for message in body.messages]
        prompt = await while_connected(
            request.receive, asyncio.to_thread(model.tokenizer.encode_chat, messages)
        )
        asked = body.max_completion_tokens or body.max_tokens
        limit = check_prompt(model, prompt, asked, None, "messages")
        response_id = f"chatcmpl-{request.state.request_id}"
        generation = service.generation(response_id, body, model, [prompt], [limit])
        return await respond(request, body, model, generation, ChatShape(), response_id)

    return router


def _plain(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it: one text."""
    content = message.content or ""
    if isinstance(content, list):
        content = "\n".join(part.text or "" for part in content)
    plain = {"role": message.role, "content": content}
    return plain | ({"name": message.name} if message.name is not None else {})
