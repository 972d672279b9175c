"""POST /tokenize and /detokenize, GET /tokenizer_info, in vLLM's shapes

They cost the server work and show a model's template, so they live under /v1, behind the key and
the limits; ``Aliases`` lets vLLM's clients find them.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from deltaserve.errors import RequestError
from deltaserve.server.bodies import DetokenizeRequest, TokenizeChat, TokenizeText
from deltaserve.server.errors import encode, json_response
from deltaserve.server.logprobs import token_text
from deltaserve.server.prompts import beside
from deltaserve.server.reading import read_either, read_request
from deltaserve.server.requests import Service

ALIASES = {path: f"/v1{path}" for path in ("/tokenize", "/detokenize", "/tokenizer_info")}


class Aliases:
    """Pure ASGI middleware, outside all others: a request is judged by its real path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] in ALIASES:
            scope = {**scope, "path": ALIASES[scope["path"]]}
        await self._app(scope, receive, send)


def tokenize_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/tokenize")
    async def tokenize(request: Request) -> Response:
        """A text (``prompt``) or a conversation (``messages``) as token ids."""
        body = await read_either(request, TokenizeChat, TokenizeText, "messages")
        model = await service.model(request, body.model or service.default(request))
        tokenizer = model.tokenizer

        def answer() -> bytes:
            if isinstance(body, TokenizeChat):
                tokens = tokenizer.encode_chat(body)
            else:
                tokens = tokenizer.encode(body.prompt, body.add_special_tokens is not False)
            shown = [token_text(t, tokenizer) for t in tokens] if body.return_token_strs else None
            found = {"count": len(tokens), "max_model_len": model.max_model_len}
            return encode({**found, "tokens": tokens, "token_strs": shown})

        return json_response(await beside(request, answer))

    @router.post("/v1/detokenize")
    async def detokenize(request: Request) -> Response:
        """Token ids as text, special tokens by their names."""
        body = await read_request(request, DetokenizeRequest)
        model = await service.model(request, body.model or service.default(request))
        size = model.info.vocab_size

        def answer() -> bytes:
            if (most := max(body.tokens, default=0)) >= size:
                raise RequestError(
                    f"tokens holds {most}, but {model.info.name} has ids from 0 to {size - 1}",
                    param="tokens",
                )
            return encode(
                {"prompt": model.tokenizer.decode(body.tokens, skip_special_tokens=False)}
            )

        return json_response(await beside(request, answer))

    @router.get("/v1/tokenizer_info")
    async def tokenizer_info(request: Request, model: str | None = None) -> Response:
        """The chat template, and which tokens begin and end a text: clients without the model's
        files (lm-eval's remote tokenizer) make prompts with it."""
        served = await service.model(request, model or service.default(request))
        return json_response(served.tokenizer.about())

    return router
