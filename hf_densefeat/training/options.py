"""A field of a dataclass of options; nothing heavy is imported here, so that a command can say what is wrong at once."""

from dataclasses import MISSING, field
from typing import Any


def option(default: Any = MISSING, *, help: str) -> Any:
    """A field with its help; it must be given where there is no default, and of a list each object has its own."""
    value: dict[str, Any] = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**value, metadata={"help": help})
