"""POST /v1/chat/completions"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fastapi import APIRouter, Request, Response

from deltaserve.errors import RequestError
from deltaserve.server.chat import ChatShape
from deltaserve.server.prompts import beside, chat_prompt
from deltaserve.server.protocol import ChatRequest
from deltaserve.server.reading import read_request
from deltaserve.server.requests import ServedModel, Service, check_prompt
from deltaserve.server.respond import respond
from deltaserve.server.tools.choose import PARSERS
from deltaserve.server.tools.events import ToolParser
from deltaserve.server.tools.forced import ForcedCall, ForcedCalls


def chat_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def create_chat_completion(request: Request) -> Response:
        body = await read_request(request, ChatRequest)
        model = await service.model(request, body.model)
        make_parser = _parser(body, model, service.config.tool_call_parser)
        prompt = await beside(request, lambda: chat_prompt(body, model))
        asked = body.max_completion_tokens or body.max_tokens
        limit = check_prompt(model, prompt, asked, None, "messages")
        response_id = f"chatcmpl-{request.state.request_id}"
        markers = make_parser().markers if make_parser else ()
        generation = service.generation(
            request, response_id, body, model, [prompt], [limit], markers
        )
        shape = ChatShape(body, prompt, model.tokenizer, make_parser)
        return await respond(request, body, model, generation, shape, response_id)

    return router


def _parser(
    body: ChatRequest, model: ServedModel, configured: str
) -> Callable[[], ToolParser] | None:
    """How calls are found in the answer. Raises RequestError: nobody knows."""
    if not body.shown_tools:
        return None
    if (named := body.named_tool) is not None:
        return partial(ForcedCall, named.name)
    if body.tool_choice == "required":
        return ForcedCalls
    name = model.tokenizer.tool_format if configured == "auto" else configured
    if name is None:
        raise RequestError(
            f"the chat template of {model.info.name} does not show how it calls tools: send "
            "tool_choice=required, or have the server started with --tool-call-parser",
            param="tools",
        )
    return PARSERS[name]
