"""What clients may send. A field that would change the answer is obeyed or refused by name."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from deltaserve.engine.types import Grammar
from deltaserve.errors import RequestError
from deltaserve.server import unsupported
from deltaserve.server.grammars import (
    Choices,
    ResponseFormat,
    Schema,
    StructuredOutputs,
    Text,
    only_one,
    read,
)
from deltaserve.server.messages import ChatPrompt, Function, Tool
from deltaserve.server.strict import Items, Strict, one_of
from deltaserve.server.tools.forced import one_call, some_calls

INT64_MAX = 2**63 - 1
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
MAX_STOP_IDS = 128
MAX_BIASES = 1024
MAX_LOGPROBS = 20
"""Most of the likeliest tokens that can be asked for, OpenAI's and vLLM's limit."""

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Priority = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Salt = Annotated[str, Field(min_length=1, max_length=1024)]
Prompts = Annotated[
    str | Items[str] | Items[int] | Items[Items[int]],
    one_of("a text, a list of texts, a list of token ids, or a list of lists of token ids"),
]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Body(Strict):
    """What is sent to a route."""

    def check(self) -> None:
        """What no single field tells. Raises RequestError."""


BodyT = TypeVar("BodyT", bound=Body)


class StreamOptions(Strict):
    neutral = unsupported.STREAM_OPTIONS

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """With include_usage: every chunk has the counts so far."""


class GenerationRequest(Body):
    """What completions and chat have in common."""

    neutral = unsupported.GENERATION
    instead = unsupported.INSTEAD

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    """0 and -1 switch it off."""
    seed: Annotated[int, Field(ge=-INT64_MAX - 1, le=INT64_MAX)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=INT64_MAX)] | None = None
    stop: Annotated[
        Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
        | Annotated[
            Items[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
            Field(max_length=MAX_STOPS),
        ]
        | None,
        one_of(f"a text or up to {MAX_STOPS} texts, each of 1 to {MAX_STOP_LENGTH} characters"),
    ] = None
    stop_token_ids: Annotated[Items[TokenId], Field(max_length=MAX_STOP_IDS)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT64_MAX)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_BIASES)] | None = None
    """Token id, as text, to what is added to its logit."""
    prompt_logprobs: NumLogprobs | None = None
    return_token_ids: bool | None = None
    allowed_token_ids: Annotated[Items[TokenId], Field(min_length=1)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # vLLM's names before structured_outputs
    guided_json: Schema | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None
    skip_special_tokens: bool | None = None
    """False shows special tokens as text."""
    include_stop_str_in_output: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=INT64_MAX)] | None = None
    """Keep so many of the prompt's last tokens; -1 is as many as fit."""
    add_special_tokens: bool | None = None
    priority: Priority | None = None
    """Lower runs first."""
    cache_salt: Salt | None = None
    """Computed prompts are shared with requests of the same salt only."""
    # For the operator's records; they have no effect on answers.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, Any] | None = None

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream=true", param="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError(
                "prompt_logprobs are not sent with stream=true: ask without it, or use "
                "/v1/completions with echo and logprobs",
                param="prompt_logprobs",
            )
        if self.truncate_prompt_tokens == 0:
            raise RequestError(
                "truncate_prompt_tokens is 0, but a prompt needs a token",
                param="truncate_prompt_tokens",
            )

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def grammar(self) -> tuple[str, Grammar] | None:
        """(the field that says what the answer must match, the grammar)

        Raises RequestError if several fields do, or one is incomplete.
        """
        found = {}
        if self.response_format is not None and (asked := self.response_format.grammar()):
            found["response_format"] = asked
        if self.structured_outputs is not None:
            for name, grammar in self.structured_outputs.grammars().items():
                found[f"structured_outputs.{name}"] = grammar
        old = read(self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)
        found |= {f"guided_{name}": grammar for name, grammar in old.items()}
        if found and self.allowed_token_ids is not None:
            raise RequestError(
                f"{next(iter(found))} and allowed_token_ids exclude each other: send one of them",
                param="allowed_token_ids",
            )
        return only_one(found)

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to report beside each token; None is no report."""

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same of the prompt's tokens, for whatever part of the answer."""
        return self.prompt_logprobs


class CompletionRequest(GenerationRequest):
    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0, le=INT64_MAX)] | None = None
    """0 only reads the prompt, for ``echo`` or ``prompt_logprobs``."""
    echo: bool | None = None
    logprobs: Annotated[
        NumLogprobs | Literal[False] | None, one_of(f"a whole number from 0 to {MAX_LOGPROBS}")
    ] = None

    @property
    def num_logprobs(self) -> int | None:
        return None if self.logprobs is False else self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        echoed = self.num_logprobs if self.echo else None
        asked = [number for number in (echoed, self.prompt_logprobs) if number is not None]
        # Without an answer it is the prompt's logprobs that the engine works for.
        return max(asked, default=0 if self.max_tokens == 0 else None)

    def check(self) -> None:
        super().check()
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise RequestError(
                "max_tokens is 0: that needs echo or prompt_logprobs, or nothing would be answered",
                param="max_tokens",
            )


class FunctionChoice(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionChoice


class ChatRequest(GenerationRequest, ChatPrompt):
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT64_MAX)] | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedTool | None,
        one_of("none, auto, required, or the name of a function as OpenAI writes it"),
    ] = None
    parallel_tool_calls: bool | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def shown_tools(self) -> list[Tool]:
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def several_calls(self) -> bool:
        return self.parallel_tool_calls is not False

    @property
    def named_tool(self) -> Function | None:
        """The function that must be called. Raises RequestError: there is no such."""
        if not isinstance(self.tool_choice, NamedTool):
            return None
        name = self.tool_choice.function.name
        found = [tool.function for tool in self.tools or () if tool.function.name == name]
        if not found:
            raise RequestError(f"tools has no function {name!r}", param="tool_choice")
        return found[0]

    def grammar(self) -> tuple[str, Grammar] | None:
        asked = super().grammar()
        if (named := self.named_tool) is not None:
            forced = one_call(named)
        elif self.tool_choice == "required":
            functions = [tool.function for tool in self.tools or ()]
            forced = some_calls(functions, several=self.several_calls)
        else:
            return asked
        if asked is not None or self.allowed_token_ids is not None:
            other = "allowed_token_ids" if asked is None else asked[0]
            raise RequestError(
                f"{other} and a tool_choice that forces a call exclude each other: send one",
                param="tool_choice",
            )
        return "tools", forced

    def check(self) -> None:
        super().check()
        self.check_prompt()
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise RequestError("tool_choice needs tools", param="tool_choice")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise RequestError(
                "max_tokens and max_completion_tokens differ: send one of them", param="max_tokens"
            )
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs=true", param="top_logprobs")


def parse(model: type[BodyT], body: bytes) -> BodyT:
    """Read a request.

    Raises:
        RequestError: malformed JSON, a wrong value, or a field that is not supported.
    """
    try:
        request = model.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error) from None
    request.check()
    request.refuse_extra()
    return request


def _explain(error: ValidationError) -> RequestError:
    """The first problem, without a repetition of what was sent."""
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return RequestError(f"the body is not valid JSON: {reason}")
    if not first["loc"]:
        return RequestError("the body must be a JSON object")
    param = ".".join(str(part) for part in first["loc"])
    message = f"{param} is missing" if first["type"] == "missing" else f"{param}: {first['msg']}"
    return RequestError(message, param=param)
