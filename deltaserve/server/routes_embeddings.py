"""POST /v1/embeddings: what the decoder makes of a text, as one vector of length 1.

The models were not trained for this; a fine-tune that was gives vectors that compare.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from deltaserve.server.bodies import EmbeddingRequest
from deltaserve.server.errors import json_response
from deltaserve.server.generate import Piece
from deltaserve.server.prompts import beside, text_prompts
from deltaserve.server.reading import read_request
from deltaserve.server.requests import Service, check_prompt
from deltaserve.server.respond import collect, with_list


def embeddings_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/embeddings")
    async def create_embeddings(request: Request) -> Response:
        body = await read_request(request, EmbeddingRequest)
        model = await service.model(request, body.model)
        work = body.pooled
        prompts = await beside(request, lambda: text_prompts(work, body.input, model, 0, "input"))
        limits = [check_prompt(model, prompt, 0, None, "input") for prompt in prompts]
        request_id = f"embd-{request.state.request_id}"
        generation = service.generation(request, request_id, work, model, prompts, limits)
        pieces = await collect(request, generation)
        count = generation.prompt_tokens
        about = {
            "id": request_id,
            "object": "list",
            "model": model.info.name,
            "usage": {"prompt_tokens": count, "total_tokens": count},
        }
        items = (_item(piece, body.encoding_format) for piece in pieces)
        # Millions of numbers, when there are many: other tenants' answers go on meanwhile.
        return json_response(await beside(request, lambda: with_list(about, "data", items)))

    return router


def _item(piece: Piece, encoding: str | None) -> dict[str, Any]:
    vector = _shown(piece.embedding or (), encoding)
    return {"object": "embedding", "index": piece.index, "embedding": vector}


def _shown(vector: tuple[float, ...], encoding: str | None) -> Any:
    """Of length 1; as numbers, or as the bytes of float32 in base64, as OpenAI's client asks."""
    vector_D = np.asarray(vector, dtype=np.float64)
    vector_D /= max(float(np.linalg.norm(vector_D)), 1e-12)
    if encoding == "base64":
        return base64.b64encode(vector_D.astype("<f4").tobytes()).decode()
    return vector_D.tolist()
