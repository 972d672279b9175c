"""Structured output: the fields that ask for it, OpenAI's and vLLM's old and new ones, as one."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import Field

from deltaserve.engine.types import Grammar
from deltaserve.errors import RequestError
from deltaserve.server import unsupported
from deltaserve.server.strict import Strict, one_of

MAX_CHOICES = 1024
MAX_GRAMMAR_LENGTH = 2**18
ANY_OBJECT = Grammar("json_schema", '{"type": "object"}')

Schema = Annotated[
    dict[str, Any] | Annotated[str, Field(max_length=MAX_GRAMMAR_LENGTH)],
    one_of("a JSON schema: an object, or its text"),
]
Text = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_LENGTH)]
Choices = Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)]


class JsonSchemaFormat(Strict):
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class ResponseFormat(Strict):
    """OpenAI's ``response_format``."""

    type: str
    json_schema: JsonSchemaFormat | None = None

    def grammar(self) -> Grammar | None:
        match self.type:
            case "text":
                return None
            case "json_object":
                return ANY_OBJECT
            case "json_schema":
                if self.json_schema is None or self.json_schema.schema_ is None:
                    where = "response_format.json_schema.schema"
                    raise RequestError(f"{where} is missing", param=where)
                return Grammar("json_schema", json.dumps(self.json_schema.schema_))
        raise RequestError(
            "response_format.type must be text, json_object or json_schema",
            param="response_format.type",
        )


class StructuredOutputs(Strict):
    """vLLM's ``structured_outputs``."""

    neutral = unsupported.STRUCTURED_OUTPUTS

    json_: Annotated[Schema | None, Field(alias="json")] = None
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    json_object: bool | None = None

    def grammars(self) -> dict[str, Grammar]:
        found = read(self.json_, self.regex, self.choice, self.grammar)
        if self.json_object:
            found["json_object"] = ANY_OBJECT
        return found


def read(
    schema: dict[str, Any] | str | None,
    regex: str | None,
    choice: list[str] | None,
    grammar: str | None,
) -> dict[str, Grammar]:
    """What was asked for, by the name that the field has in vLLM."""
    found = {}
    if schema is not None:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        found["json"] = Grammar("json_schema", text)
    if regex is not None:
        found["regex"] = Grammar("regex", regex)
    if choice is not None:
        # A text in JSON is one in Lark too.
        found["choice"] = Grammar("lark", "start: " + " | ".join(map(json.dumps, choice)))
    if grammar is not None:
        found["grammar"] = Grammar("lark", grammar)
    return found


def only_one(found: dict[str, Grammar]) -> tuple[str, Grammar] | None:
    """(field, grammar). Raises RequestError when several were asked for."""
    if len(found) > 1:
        first, second = list(found)[:2]
        raise RequestError(
            f"{first} and {second} both say what the answer must match: send one of them",
            param=second,
        )
    return next(iter(found.items()), None)
