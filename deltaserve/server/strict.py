"""How bodies are read: no conversions, one message for each mistake, no field ignored."""

from __future__ import annotations

from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from deltaserve.errors import RequestError


class Strict(BaseModel):
    """No conversions: "1" is not a number. Other fields are kept, for ``refuse_extra`` to judge."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


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


def refuse_extra(model: Strict, neutral: dict[str, tuple[Any, ...]], prefix: str = "") -> None:
    """Raises RequestError for a field that the model does not have, unless its value is one of
    the ``neutral`` ones."""
    for name, value in (model.model_extra or {}).items():
        if name not in neutral:
            shown = name if len(name) <= 100 else f"{name[:100]}…"
            raise RequestError(f"unknown field {prefix}{shown}", param=f"{prefix}{shown}")
        if value is not None and not any(_same(value, other) for other in neutral[name]):
            param = f"{prefix}{name}"
            raise RequestError(
                f"{param} is not supported by this server: leave it out", param=param
            )


def _same(value: Any, other: Any) -> bool:
    """Equality that tells false from 0: ``logprobs: 0`` asks for something, false does not."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)
