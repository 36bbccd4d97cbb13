"""What every part of a configuration is: a frozen pydantic model without room for unknown keys."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, WithJsonSchema

__all__ = ["Count", "Name", "Names", "Rate", "Settings", "Share", "SomeNames"]

Count = Annotated[int, Strict(), Field(gt=0)]
Rate = Annotated[float, Strict(), Field(ge=0)]
Share = Annotated[float, Strict(), Field(ge=0, lt=1)]
Name = Annotated[str, Field(min_length=1)]


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Names = Annotated[
    tuple[Name, ...],
    BeforeValidator(_as_tuple),
    WithJsonSchema({"type": ["string", "array"], "items": {"type": "string"}}),
]
"""One name or several."""
SomeNames = Annotated[Names, Field(min_length=1)]


class Settings(BaseModel):
    """Base of every part of a configuration: frozen, and an unknown key is a mistake."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # An own __init__ adds positional arguments for Python. Without this mark pydantic would also call it when it
        # validates data, and a missing key would be a TypeError instead of one problem among the others.
        if "__init__" in vars(cls):
            vars(cls)["__init__"].__pydantic_base_init__ = True
