"""Single values of a recipe, changed by name: what `brainldm train --set` takes."""

from __future__ import annotations

import json
import typing
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from brainldm.base.errors import UsageError

Config = TypeVar("Config")
_IDENTITY = ("name", "kind", "settings")  # what a recipe or a baseline is, not a value of it


def with_settings(config: Config, settings: Sequence[str]) -> Config:
    """`config` (a recipe or any frozen dataclass) with `settings` made, each "NAME=VALUE": the name as `--dry-run`
    prints it, with dots from outside in, the value as JSON or plain text. UsageError where there is no such name, or
    the value is not of its type."""
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"{setting!r} sets nothing.", remedy="Write NAME=VALUE.")
        config = _changed(config, name, name.split("."), text)
    return config


def _changed(config: Any, name: str, path: list[str], text: str) -> Any:
    known = [field.name for field in fields(config) if field.name not in _IDENTITY] if is_dataclass(config) else []
    if path[0] not in known:
        told = f"Names there: {', '.join(known)}." if known else "It holds no names."
        raise UsageError(f"there is no setting {name!r}.", remedy=f"{told} --dry-run prints them all.")
    inner = getattr(config, path[0])
    if len(path) > 1:
        return replace(config, **{path[0]: _changed(inner, name, path[1:], text)})
    if is_dataclass(inner):
        raise UsageError(f"{name!r} is a group of settings.", remedy=f"Set one of it, such as {name}.NAME=VALUE.")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    try:
        value = TypeAdapter(typing.get_type_hints(type(config), include_extras=True)[path[0]]).validate_python(value)
        return replace(config, **{path[0]: value})
    except ValueError as error:  # of another type (ValidationError), or what the group itself refuses
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise UsageError(f"{name} cannot be {text!r}: {reason}.", remedy=f"It is {inner!r} now.") from error
