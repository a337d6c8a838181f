"""Converts sampling parameters to and from plain values: those that JSON bodies, options of a command and protobuf
messages can hold.

The form of a parameter there follows from its type in `SamplingParams`, so that a new row of the table needs nothing
here. Standard library only.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from jaxserve.config.checks import did_you_mean
from jaxserve.config.keywords import UnknownFieldError
from jaxserve.config.sampling_fields import Ids, SamplingField, Texts, fields_of, word_of
from jaxserve.config.shown import shown
from jaxserve.sampling_params import SamplingParams

GENERATION_CONFIG: Mapping[str, str] = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Parameters of which a checkpoint may have defaults of its own, by their names in its generation_config.json."""


class Form(enum.Enum):
    """Enumerates the forms of plain values.

    VALUE: a number, a text or a flag. WORD: a member of an enumeration, by its name in lower case. LIST: of values.
    MAPPING: of token ids (in JSON: texts of digits) to numbers, in Python stored as sorted pairs. OBJECT: a dataclass,
    by the names of its fields.
    """

    VALUE = "value"
    WORD = "word"
    LIST = "list"
    MAPPING = "mapping"
    OBJECT = "object"


@dataclasses.dataclass(frozen=True)
class PlainField:
    """Describes a parameter and its plain form. type: as annotated, without None."""

    row: SamplingField
    form: Form
    type: Any

    def read(self, value: Any) -> Any:
        """Returns what `SamplingParams` takes for a plain value, which must not be None. Raises ValueError."""
        name = self.row.name
        match self.form:
            case Form.LIST:
                if not isinstance(value, list | tuple) and not (isinstance(value, str) and self._takes_text):
                    items = "text or a list of texts" if self._takes_text else "a list"
                    items += " of token ids" if isinstance(self.row.kind, Ids) else ""
                    raise ValueError(f"{name} is {shown(value)}; it must be {items}")
                if value == "":
                    raise ValueError(f"{name} has ''; each {name} must be a string of at least one character")
                return value
            case Form.MAPPING:
                return _read_mapping(name, value)
            case Form.OBJECT:
                return _read_object(name, self.type, value)
            case _:
                return value

    def written(self, value: Any) -> Any:
        """Returns the plain form of a checked value; None stays None."""
        return dict(value) if self.form is Form.MAPPING and value is not None else _written(value)

    @property
    def _takes_text(self) -> bool:
        """Whether one text is a list of it."""
        return isinstance(self.row.kind, Texts)


def plain_fields(table: type | None = None) -> Mapping[str, PlainField]:
    """Returns the parameters of a table, by name, in its order. table: None is `SamplingParams`."""
    return _fields_of(table or SamplingParams)


@functools.cache
def _fields_of(table: type) -> Mapping[str, PlainField]:
    hints = typing.get_type_hints(table)
    return {name: PlainField(row, *_form_of(hints[name])) for name, row in fields_of(table).items()}


def params_of(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> SamplingParams:
    """Returns the parameters for plain values by name, of which none is None. Raises ValueError.

    defaults: of those that are not among them; max_tokens there does not count, as it gives way to the prompt
    (`ModelLimits.default_max_tokens`). A beam search, which draws nothing, has the default temperature alone.
    """
    used = {"temperature"} if values.get("use_beam_search") is True else defaults.keys() - {"max_tokens"}
    unset = {name: value for name, value in defaults.items() if name not in values and name in used}
    rows = plain_fields()
    for name in values:
        if name not in rows:
            raise UnknownFieldError(f"sampling parameter {shown(name)} is unknown; {did_you_mean(name, rows)}")
    return SamplingParams(**unset, **{name: rows[name].read(value) for name, value in values.items()})


def written(params: SamplingParams | Mapping[str, Any]) -> dict[str, Any]:
    """Returns the plain values that a message must say, so that they are read as these parameters.

    Of all parameters these are those that a checkpoint may have defaults of, and what is not our default; of a mapping
    all that it has. Raises ValueError.
    """
    rows = plain_fields()
    if isinstance(params, SamplingParams):
        values = {name: getattr(params, name) for name in rows}
        own = set(GENERATION_CONFIG.values())
        names = [name for name, value in values.items() if name in own or value != rows[name].row.default]
    else:
        checked = params_of(params, {})
        values, names = {name: getattr(checked, name) for name in params}, list(params)
    return {name: rows[name].written(values[name]) for name in names if values[name] is not None}


def _form_of(hint: Any) -> tuple[Form, Any]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is None:
        if isinstance(hint, type) and issubclass(hint, enum.Enum):
            return Form.WORD, hint
        return (Form.OBJECT, hint) if dataclasses.is_dataclass(hint) else (Form.VALUE, hint)
    if issubclass(origin, Mapping) or (origin is tuple and typing.get_origin(arguments[0]) is tuple):
        return Form.MAPPING, hint
    return Form.LIST, hint


def _read_mapping(name: str, value: Any) -> dict[int, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {shown(value)}; it must be an object of token ids and numbers")
    found: dict[int, Any] = {}
    for key, number in value.items():
        if isinstance(key, str) and re.fullmatch(r"-?[0-9]{1,20}", key):
            key = int(key)
        if isinstance(key, bool) or not isinstance(key, int):
            raise ValueError(f"{name} has the key {shown(key)}; its keys must be token ids")
        if key in found:
            raise ValueError(f"{name} has the token id {key} twice; give it once")
        found[key] = number
    return found


def _read_object(name: str, kind: type, value: Any) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {shown(value)}; it must be an object")
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    for key in value:
        if key not in known:
            raise ValueError(f"{name} has the unknown field {shown(key)}; {did_you_mean(str(key), known)}")
    return kind(**{key: part for key, part in value.items() if part is not None})


def _written(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return word_of(value)
    if isinstance(value, list | tuple):
        return [_written(part) for part in value]
    if isinstance(value, Mapping):
        return {key: _written(part) for key, part in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((field, getattr(value, field.name)) for field in dataclasses.fields(value) if field.init)
        return {field.name: _written(part) for field, part in fields if part is not None and part != field.default}
    return value
