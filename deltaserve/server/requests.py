"""From an HTTP request to engine requests: the body, the model, the prompts, the settings."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request

from deltaserve import __version__
from deltaserve.config import ServerConfig
from deltaserve.engine.client import EngineClient
from deltaserve.engine.types import EngineRequest, ModelInfo, SamplingParams
from deltaserve.errors import CheckpointError, RequestError, UnknownModelError
from deltaserve.server.auth import caller_of
from deltaserve.server.billing import Bill, open_bill
from deltaserve.server.bodies import PooledRequest
from deltaserve.server.errors import ApiError
from deltaserve.server.generate import Generation
from deltaserve.server.metrics import Metrics
from deltaserve.server.office import Office
from deltaserve.server.protocol import Body, CompletionRequest, GenerationRequest
from deltaserve.server.tokenizers import ModelTokenizer, Tokenizers

T = TypeVar("T")
OtherT = TypeVar("OtherT", bound=Body)

logger = logging.getLogger("deltaserve.server")

MAX_CHOICES = 2048
"""Prompts times n in one HTTP request."""
MAX_REPORTED = 2**20
"""Logprobs of prompts' tokens in one answer, unless it is about a single sequence: there may be 21
for each token, and n choices repeat them all."""
MIN_TEMPERATURE = 1e-5
"""Below it logits overflow; the answer is the greedy one anyway (vLLM's bound)."""
MODELS_IN_MESSAGE = 5


@dataclass(frozen=True)
class ServedModel:
    """A model that requests can name."""

    info: ModelInfo
    tokenizer: ModelTokenizer
    max_model_len: int

    @property
    def fingerprint(self) -> str:
        """Changes when answers may: with the delta or the version of the server."""
        identity = f"{__version__}/{self.info.name}/{self.info.digest}"
        return f"fp_{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


class Service:
    """What the routes share: the engine, the models that it serves now, and who pays."""

    def __init__(
        self,
        client: EngineClient,
        tokenizers: Tokenizers,
        config: ServerConfig,
        metrics: Metrics,
        office: Office | None = None,
    ) -> None:
        """``office``: None where there are no tenants."""
        self.client = client
        self.config = config
        self.metrics = metrics
        self._tokenizers = tokenizers
        self._office = office

    def models(self, request: Request) -> dict[str, ModelInfo]:
        """What the caller may name, whether it is loaded or not. Others do not exist for him."""
        caller = caller_of(request)
        return {
            info.name: info
            for info in self.client.models()
            if info.state != "draining" and (caller is None or caller.allows(info.name))
        }

    def info(self, request: Request, name: str) -> ModelInfo:
        """Raises UnknownModelError."""
        models = self.models(request)
        if name in models:
            return models[name]
        some = ", ".join(list(models)[:MODELS_IN_MESSAGE])
        more = len(models) - MODELS_IN_MESSAGE
        raise UnknownModelError(
            f"The model {name[:128]!r} does not exist. GET /v1/models lists those that do: {some}"
            + (f" and {more} more." if more > 0 else "."),
            param="model",
        )

    def default(self, request: Request) -> str:
        """The model of requests that need not name one: the first that the caller may use.

        Raises UnknownModelError: there is none.
        """
        for name in self.models(request):
            return name
        raise UnknownModelError("There is no model that you may use.", param="model")

    async def model(self, request: Request, name: str) -> ServedModel:
        """The present version, with its own tokenizer.

        Raises:
            UnknownModelError: there is none.
            ApiError: it cannot be served (HTTP 503).
        """
        while True:
            info = self.info(request, name)
            if info.state == "error":
                reason = "it could not be loaded"
                if caller_of(request) is None:  # of the machine behind it tenants learn nothing
                    reason = (info.error or "").replace(info.path, "its directory")
                raise ApiError(503, f"{name} cannot be served: {reason}", code="model_unavailable")
            tokenizer = self._tokenizers.find(info)
            if tokenizer is not None:
                return ServedModel(info, tokenizer, self.client.max_model_len)
            await self._load_tokenizer(info)  # meanwhile another version may have come

    async def _load_tokenizer(self, info: ModelInfo) -> None:
        try:
            await asyncio.to_thread(self._tokenizers.of, info)
        except CheckpointError as error:
            logger.error("%s has no tokenizer: %s", info.name, error)
            raise ApiError(
                503,
                f"{info.name} cannot be served: its tokenizer is missing or damaged",
                code="model_unavailable",
            ) from error
        self._tokenizers.keep([info, *self.client.models()])

    def generation(
        self,
        request: Request,
        request_id: str,
        body: GenerationRequest,
        model: ServedModel,
        prompts: Sequence[Sequence[int]],
        max_tokens: Sequence[int],
        markers: Sequence[str] = (),
    ) -> Generation:
        """The engine requests for ``prompts``, queued.

        markers: special tokens that show in the text. Raises what ``submit`` raises; ApiError,
        LimitError.
        """
        self._require_same(request, model)
        _check_reported(body, prompts)
        if body.priority and self.config.engine.scheduling_policy == "fcfs":
            raise RequestError(
                "priority has no effect here: the server runs requests in the order in which "
                "they come (scheduling_policy is fcfs)",
                param="priority",
            )
        terms = self._terms(request, body)
        tokenizer = model.tokenizer
        show_all = body.skip_special_tokens is False
        requests = [
            EngineRequest(
                f"{request_id}-{index}",
                model.info.name,
                tuple(prompt),
                _sampling(body, model, limit),
                **terms,
            )
            for index, (prompt, limit) in enumerate(zip(prompts, max_tokens, strict=True))
        ]
        generation = Generation(
            self.client,
            tokenizer.showing_all() if show_all else tokenizer.showing(markers),
            body.stops,
            body.n or 1,
            requests,
            echo=isinstance(body, CompletionRequest) and bool(body.echo),
            timeout_s=self.config.request_timeout_s,
            keep_stop=bool(body.include_stop_str_in_output),
            track=body.num_logprobs is not None or bool(body.return_token_ids),
            metrics=self.metrics,
            bill=self._bill(request, body, model, prompts, max_tokens),
        )
        generation.submit()
        return generation

    def _terms(self, request: Request, body: GenerationRequest) -> dict[str, Any]:
        """How the engine shall treat the request beside others."""
        caller, asked = caller_of(request), body.priority or 0
        if caller is None or self._office is None:
            return {"cache_salt": body.cache_salt or "", "priority": asked}
        return {
            "cache_salt": self._office.accounts.salt(caller, body.cache_salt),
            "tenant": caller.tenant.id,
            "weight": caller.tenant.weight,
            "priority": max(asked, caller.priority),  # nobody lets himself go before others
        }

    def _bill(
        self,
        request: Request,
        body: GenerationRequest,
        model: ServedModel,
        prompts: Sequence[Sequence[int]],
        max_tokens: Sequence[int],
    ) -> Bill | None:
        if self._office is None:
            return None
        most = sum(map(len, prompts)) + (body.n or 1) * sum(max_tokens)
        return open_bill(request, self._office.usage, model.info, body.user, most)

    def _require_same(self, request: Request, model: ServedModel) -> None:
        """Token ids of one version mean something else to another that has its own tokenizer."""
        info = self.info(request, model.info.name)
        if info.digest != model.info.digest:
            raise ApiError(
                503,
                f"{info.name} was replaced by another version while this request was read: "
                "send it again",
                code="model_replaced",
            )


def check_prompt(
    model: ServedModel,
    prompt: Sequence[int],
    max_tokens: int | None,
    default: int | None,
    param: str,
) -> int:
    """The number of tokens that may be generated after ``prompt``.

    Args:
        max_tokens: what the client asked for.
        default: what it gets otherwise; None is the rest of the context.

    Raises:
        RequestError: empty, with tokens that the model does not have, or too long.
    """
    if not prompt:
        raise RequestError(f"{param} is empty: it must hold at least one token", param=param)
    room = model.max_model_len - len(prompt)
    needed = 1 if max_tokens is None else max_tokens
    if room < needed:
        asked = "at least 1 to generate" if max_tokens is None else f"max_tokens = {max_tokens}"
        raise ApiError(
            400,
            # OpenAI's own words: clients look for them to try again with less, or elsewhere.
            f"This model's maximum context length is {model.max_model_len} tokens, but this "
            f"request to {model.info.name} needs {len(prompt) + needed}: {len(prompt)} in the "
            f"prompt and {asked}. Shorten the prompt or lower max_tokens.",
            param=param,
            code="context_length_exceeded",
        )
    if min(prompt) < 0 or max(prompt) >= model.info.vocab_size:
        wrong = next(token for token in prompt if not 0 <= token < model.info.vocab_size)
        raise RequestError(
            f"{param} holds the token id {wrong}, but {model.info.name} has ids from 0 "
            f"to {model.info.vocab_size - 1}",
            param=param,
        )
    return min(room, default or room) if max_tokens is None else max_tokens


def check_choices(num_prompts: int, n: int | None) -> None:
    """Raises RequestError when one HTTP request asks for too many sequences."""
    total = num_prompts * (n or 1)
    if total > MAX_CHOICES:
        raise RequestError(
            f"prompts times n is {total}, but at most {MAX_CHOICES} in one request", param="n"
        )


def _check_reported(body: GenerationRequest, prompts: Sequence[Sequence[int]]) -> None:
    """Raises RequestError when the answer would be mostly prompts' logprobs, and huge."""
    if body.num_prompt_logprobs is None or len(prompts) * (body.n or 1) == 1:
        return
    reported = sum(map(len, prompts)) * (body.n or 1) * (body.num_prompt_logprobs + 1)
    if reported > MAX_REPORTED:
        param = "logprobs" if body.prompt_logprobs is None else "prompt_logprobs"
        raise RequestError(
            f"{param}: {reported} of the prompts' tokens would be reported, but at most "
            f"{MAX_REPORTED} in one request: send fewer prompts, or ask for a smaller n",
            param=param,
        )


def _sampling(body: GenerationRequest, model: ServedModel, max_tokens: int) -> SamplingParams:
    temperature = 1.0 if body.temperature is None else body.temperature
    if (body.min_tokens or 0) > max_tokens:
        raise RequestError(
            f"min_tokens is {body.min_tokens}, but at most {max_tokens} may be generated",
            param="min_tokens",
        )
    ends = frozenset() if body.ignore_eos else model.tokenizer.eos_ids
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature if temperature >= MIN_TEMPERATURE else 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        seed=body.seed,
        stop_token_ids=ends | frozenset(body.stop_token_ids or ()),
        min_tokens=body.min_tokens or 0,
        min_p=body.min_p or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=_logit_bias(body.logit_bias or {}, model),
        logprobs=body.num_logprobs,
        prompt_logprobs=body.num_prompt_logprobs,
        allowed_token_ids=_allowed(body.allowed_token_ids, model),
        pooling=body.pooling if isinstance(body, PooledRequest) else None,
        grammar=asked[1] if (asked := body.grammar()) is not None else None,
    )


def _allowed(token_ids: list[int] | None, model: ServedModel) -> tuple[int, ...] | None:
    """Raises RequestError for what is no token of the model."""
    if token_ids is None:
        return None
    if max(token_ids) >= model.info.vocab_size:
        raise RequestError(
            f"allowed_token_ids holds {max(token_ids)}, but {model.info.name} has ids from 0 "
            f"to {model.info.vocab_size - 1}",
            param="allowed_token_ids",
        )
    return tuple(token_ids)


def _logit_bias(biases: Mapping[str, float], model: ServedModel) -> tuple[tuple[int, float], ...]:
    """Raises RequestError for what is no token of the model."""
    size = model.info.vocab_size
    for key in biases:
        # isdecimal alone would let other scripts' digits, and thousands of them, through.
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < size):
            raise RequestError(
                f"logit_bias: {key[:32]!r} is not a token id from 0 to {size - 1}",
                param="logit_bias",
            )
    return tuple((int(key), value) for key, value in biases.items())
