"""How bodies are read: no conversions, one message for each mistake, no field ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from deltaserve.errors import RequestError

T = TypeVar("T")

Items = Annotated[list[T], Field(fail_fast=True)]
"""A list, read up to its first mistake: of millions each would cost more than the list."""
Neutral = Mapping[str, tuple[Any, ...]]


def _as_it_is_judged(schema: dict[str, Any], model: type[Any]) -> None:
    """Complete a JSON schema by what ``refuse_extra`` does with other fields."""
    schema["additionalProperties"] = False
    for name, values in model.neutral.items():
        schema["properties"].setdefault(name, {"enum": [None, *values]})


class Strict(BaseModel):
    """No conversions: "1" is not a number. Other fields are kept, for ``refuse_extra`` to judge."""

    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, json_schema_extra=_as_it_is_judged
    )

    neutral: ClassVar[Neutral] = {}
    """Fields that are not supported, and the values, besides null, with which they are accepted."""
    instead: ClassVar[Mapping[str, str]] = {}
    """What to send in place of such a field, where there is something."""

    def refuse_extra(self, prefix: str = "") -> None:
        """Raises RequestError for a field that is neither known nor neutral, here or deeper."""
        for name, value in (self.model_extra or {}).items():
            shown = prefix + (name if len(name) <= 100 else f"{name[:100]}…")
            if name not in self.neutral:
                raise RequestError(f"unknown field {shown}", param=shown)
            if value is not None and not any(_same(value, other) for other in self.neutral[name]):
                remedy = self.instead.get(name, "leave it out")
                raise RequestError(
                    f"{shown} is not supported by this server: {remedy}", param=shown
                )
        for field in self.model_fields_set & type(self).model_fields.keys():
            name, value = type(self).model_fields[field].alias or field, getattr(self, field)
            if isinstance(value, Strict):
                value.refuse_extra(f"{prefix}{name}.")
            # Items of a list are of one kind, and there may be millions of numbers.
            if isinstance(value, list) and value and isinstance(value[0], Strict):
                for index, item in enumerate(value):
                    item.refuse_extra(f"{prefix}{name}.{index}.")


def one_of(expected: str) -> WrapValidator:
    """For unions: one message about what is expected, instead of one for each member."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler, _: ValidationInfo) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError(
                "one_of", "must be {expected}", {"expected": expected}
            ) from None

    return WrapValidator(validate)


def _same(value: Any, other: Any) -> bool:
    """Equality that tells false from 0: ``logprobs: 0`` asks for something, false does not."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)
