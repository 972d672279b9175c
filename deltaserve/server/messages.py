"""Conversations as clients send them, and as chat templates read them."""

from __future__ import annotations

import inspect
import json
from typing import Annotated, Any, Literal

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from deltaserve.errors import RequestError
from deltaserve.server import unsupported
from deltaserve.server.strict import Items, Strict, one_of

MAX_TOOLS = 256
RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {
    "messages"
}
"""What a template is given anyway; ``chat_template_kwargs`` cannot change it."""

FunctionName = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")]


class TextPart(Strict):
    type: str
    text: str | None = None


class CalledFunction(Strict):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str
    """A JSON object, as text."""


class MadeCall(Strict):
    """A call that the assistant made in an earlier turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None
    """Of streamed calls; some clients send it back."""


class Message(Strict):
    neutral = unsupported.MESSAGE

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Annotated[str | Items[TextPart] | None, one_of("a text or a list of text parts")] = (
        None
    )
    name: str | None = None
    tool_calls: Items[MadeCall] | None = None
    tool_call_id: str | None = None

    def check(self, where: str) -> None:
        """Raises RequestError."""
        if self.role == "function":
            raise RequestError("use role 'tool', not 'function'", param=f"{where}role")
        if self.role == "tool" and self.tool_call_id is None:
            raise RequestError(
                f"{where}tool_call_id is missing: a message of role 'tool' answers a call",
                param=f"{where}tool_call_id",
            )
        if self.tool_calls and self.role != "assistant":
            raise RequestError(
                f"{where}tool_calls: only the assistant calls tools", param=f"{where}tool_calls"
            )
        for part in self.content if isinstance(self.content, list) else ():
            if part.type != "text" or part.text is None:
                raise RequestError(
                    "only content parts of type 'text' are supported", param=f"{where}content"
                )
        if self.content is None and self.role != "assistant":
            raise RequestError(f"{where}content is missing", param=f"{where}content")
        for index, call in enumerate(self.tool_calls or ()):
            _read_arguments(call, f"{where}tool_calls.{index}.function.arguments")

    def plain(self) -> dict[str, Any]:
        """As chat templates expect it: one text, arguments as objects."""
        content = self.content or ""
        if isinstance(content, list):
            content = "\n".join(part.text or "" for part in content)
        plain: dict[str, Any] = {"role": self.role, "content": content}
        if self.name is not None:
            plain["name"] = self.name
        if self.tool_call_id is not None:
            plain["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            plain["tool_calls"] = [_plain_call(call) for call in self.tool_calls]
        return plain


class Function(Strict):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of an object; without it the function takes nothing."""
    strict: bool | None = None
    """Calls that are forced always match the schema; others are as the model wrote them."""

    @property
    def schema_text(self) -> str:
        nothing = {"type": "object", "properties": {}, "additionalProperties": False}
        return json.dumps(nothing if self.parameters is None else self.parameters)


class Tool(Strict):
    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True, exclude={"function": {"strict"}})


class ChatPrompt(Strict):
    """What a conversation's prompt is made of."""

    messages: Annotated[Items[Message], Field(min_length=1)]
    tools: Annotated[Items[Tool], Field(max_length=MAX_TOOLS)] | None = None
    add_generation_prompt: bool | None = None
    """Let the assistant begin to speak; the default."""
    continue_final_message: bool | None = None
    """The answer goes on where the last message ends. Needs add_generation_prompt=false."""
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    """On top of what the template writes, which is usually all."""

    @property
    def shown_tools(self) -> list[Tool]:
        """Those that the model is told of."""
        return self.tools or []

    def check_prompt(self) -> None:
        """Raises RequestError."""
        for index, message in enumerate(self.messages):
            message.check(f"messages.{index}.")
        if self.continue_final_message and self.add_generation_prompt is not False:
            raise RequestError(
                "continue_final_message needs add_generation_prompt=false: the answer either "
                "goes on with the last message or is a new one",
                param="continue_final_message",
            )
        if taken := sorted(RESERVED & (self.chat_template_kwargs or {}).keys()):
            raise RequestError(
                f"chat_template_kwargs cannot hold {taken[0]!r}", param="chat_template_kwargs"
            )
        names = [tool.function.name for tool in self.tools or ()]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise RequestError(f"two tools are called {twice!r}", param="tools")


def _plain_call(call: MadeCall) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": _read_arguments(call, "arguments")}
    named = {} if call.id is None else {"id": call.id}
    return {**named, "type": "function", "function": function}


def _read_arguments(call: MadeCall, where: str) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise RequestError(f"{where} must be a JSON object, as text", param=where)
    return arguments
