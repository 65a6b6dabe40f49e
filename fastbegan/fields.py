"""Fields of a config dataclass: what each may hold stands beside it, and one check reads it there.

`gamma: Annotated[float, Range(0, 1)] = 0.5` is a field of numbers from 0 to 1. `FREE` beside it marks a field that may
change when a run goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from dataclasses import dataclass
from typing import Any, Literal

from .errors import UserError


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, all finite; `above` excludes `low`. `words` replaces the range in messages."""

    low: float
    high: float = math.inf
    above: bool = False
    words: str = ""

    def holds(self, value: float) -> bool:
        """Whether `value` lies in the range."""
        return self.low <= value <= self.high and math.isfinite(value) and not (self.above and value == self.low)

    def accepted(self, kind: type) -> str:
        """The range in words, for numbers of `kind`, int or float."""
        if self.words or self.high < math.inf:
            return self.words or f"{self.low:g} to {self.high:g}"
        return f"{'whole numbers' if kind is int else 'numbers'} {'above' if self.above else 'from'} {self.low:g}"


class Free:
    """The mark of a field that may differ between a run and its continuation."""


FREE = Free()
SEED = Range(0, 2**63 - 1, words="whole numbers from 0 to 2^63 - 1")  # what torch takes


def require(ok: bool, field: str, value: object, accepted: str) -> None:
    """Raise UserError, with the field, its value and what is accepted, unless `ok`."""
    if not ok:
        raise UserError(f"{field} is {value!r}; accepted: {accepted}")


def require_seed(seed: int) -> None:
    """Raise UserError for a seed that torch does not take."""
    value = plain_number(seed, int)
    require(fits(value, int) and SEED.holds(value), "seed", value, SEED.accepted(int))


def check_fields(config: Any) -> None:
    """Raise UserError for the first field whose value is not of its type or out of its range.

    NumPy's numbers, and whole ones written as 1e5, become Python's: `config`, a frozen dataclass, is changed.
    """
    for name, hint in _hints(type(config)).items():
        kind, ranges = _parts(hint)
        value = plain_number(getattr(config, name), kind)
        in_range = value is None or all(limits.holds(value) for limits in ranges) if fits(value, kind) else False
        require(in_range, name, getattr(config, name), _accepted(kind, ranges))
        object.__setattr__(config, name, value)


def marked_free(config: type) -> frozenset[str]:
    """Names of the fields that `FREE` stands beside."""
    return frozenset(name for name, hint in _hints(config).items() if FREE in typing.get_args(hint))


def from_dict(config: type[Any], values: dict[str, Any]) -> Any:
    """Make a config from parsed JSON. Raises UserError for unknown and ill-typed fields."""
    if not isinstance(values, dict):
        raise UserError(f"{config.__name__} is {values!r}; accepted: an object with its fields")
    fields = {field.name: field for field in dataclasses.fields(config)}
    if unknown := sorted(set(values) - set(fields)):
        raise UserError(f"{config.__name__} has no field {unknown[0]!r}; accepted: {', '.join(fields)}")
    checked = {}
    for name, value in values.items():
        value = tuple(value) if isinstance(value, list) else value
        kind, ranges = _parts(_hints(config)[name])
        if not fits(value, kind):
            raise UserError(f"{config.__name__}.{name} is {value!r}; accepted: {_accepted(kind, ranges)}")
        checked[name] = value
    return config(**checked)


def plain_number(value: Any, kind: Any) -> Any:
    """`value` with NumPy scalars as Python's numbers, and 1e5-style floats as ints where the field is an int."""
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()
    whole = kind is int or int in typing.get_args(kind)
    return int(value) if whole and isinstance(value, float) and value.is_integer() else value


def fits(value: object, kind: Any) -> bool:
    """Whether `value` is of the type `kind`; a bool is no number."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(item, arguments[0]) for item in value)
    if arguments:
        return any(fits(value, argument) for argument in arguments)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


@functools.cache
def _hints(config: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(config)}


def _parts(hint: Any) -> tuple[Any, list[Range]]:
    """A field's type, and the ranges beside it."""
    if typing.get_origin(hint) is not typing.Annotated:
        return hint, []
    kind, *marks = typing.get_args(hint)
    return kind, [mark for mark in marks if isinstance(mark, Range)]


def _accepted(kind: Any, ranges: list[Range]) -> str:
    """The values of a field, in words."""
    if typing.get_origin(kind) is Literal:
        return ", ".join(map(str, typing.get_args(kind)))
    kinds = [choice for choice in typing.get_args(kind) if choice is not type(None)]
    kind = kinds[0] if kinds else kind
    if ranges:
        return ranges[0].accepted(kind)
    return {bool: "True, False", str: "text", int: "whole numbers", float: "numbers"}.get(kind, str(kind))
