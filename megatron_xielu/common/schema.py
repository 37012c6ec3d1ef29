"""Checks what a file holds against a data class; says in one line which field is wrong, and how.

What others write, and what of our own a disk or a hand has damaged, holds other types than expected
at any place. A reader names what it needs as a data class, and asks for it here:

    @dataclass(frozen=True)
    class Shard:
        tokens: Count
        sha256: str
        rows: Positive | None = None  # may be absent

    Shard(tokens=3, …) == load(Shard, path)

Known are data classes, ``Literal``, ``X | None``, list, tuple, dict[str, X], bool, int (64 bits),
float (finite; also a whole number), numbers ``Annotated`` with their `Limits`, and str; ``Any`` is
taken as it is. What a data class does not name is passed over. Its ``__post_init__`` may raise a
ValueError about what belongs together.

Python 3.9 can run it, for the plan on a login node; there ``X | None`` is no kind.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from megatron_xielu.common.flags import COUNT, POSITIVE
from megatron_xielu.common.text import is_utf8

_T = TypeVar("_T")

_UNIONS = (Union, getattr(types, "UnionType", Union))
_LARGEST = 2**63 - 1
_SHOWN = 40  # characters of a wrong value


class Malformed(ValueError):
    """What a file holds is not what its reader needs; one line that names file and field."""


Count = Annotated[int, COUNT]
Positive = Annotated[int, POSITIVE]


def load(kind: type[_T], path: Path) -> _T:  # noqa: UP047
    """A JSON file as a data class.

    Raises:
        Malformed: it is no JSON, or not of this kind.
        OSError: it cannot be read.
    """
    return check(kind, read_json(path), path)


def read_json(path: Path) -> Any:
    """A JSON file's content, whatever it is.

    Raises:
        Malformed: it is none.
        OSError: it cannot be read.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise Malformed(f"{path}: it is a pipe or a device")  # and would be read for ever
    return parse(path.read_bytes(), path)


def parse(content: bytes, file: Path | str) -> Any:
    """JSON text, whatever it says; ``file`` is what messages name.

    Raises:
        Malformed: it is none.
    """
    try:
        return json.loads(content)
    except UnicodeDecodeError:
        raise Malformed(f"{file}: it is no JSON: not UTF-8") from None
    except RecursionError:
        raise Malformed(f"{file}: it is no JSON of ours: nested too deeply") from None
    except ValueError as error:
        raise Malformed(f"{file}: it is no JSON: {error}") from None


def check(kind: type[_T], value: Any, file: Path | str) -> _T:  # noqa: UP047
    """A value as the kind; ``file`` is what messages name.

    Raises:
        Malformed: it is not of this kind.
    """
    return _check(kind, value, str(file), "")


def _check(kind: Any, value: Any, file: str, field: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        number = _check(inner[0], value, file, field)
        if number is not None and (fault := inner[1].fault(number)):
            raise Malformed(f"{file}: {field or 'it'} {fault}, not {_short(value)}")
        return number
    if origin in _UNIONS:
        return _check_union(inner, value, file, field)
    if origin is Literal:
        if any(type(value) is type(one) and value == one for one in inner):
            return value
        raise _wrong(value, file, field, " or ".join(map(repr, inner)))
    if is_dataclass(kind):
        return _check_dataclass(kind, value, file, field)
    if (origin or kind) in (list, tuple):
        return _check_sequence(origin or kind, inner, value, file, field)
    if (origin or kind) is dict:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise _wrong(value, file, field, "an object")
        of = inner[1] if inner else Any
        return {name: _check(of, x, file, _below(field, name)) for name, x in value.items()}
    return _check_plain(kind, value, file, field)


def _check_union(kinds: tuple[Any, ...], value: Any, file: str, field: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    others = [kind for kind in kinds if kind is not type(None)]
    for kind in others[:-1]:
        try:
            return _check(kind, value, file, field)
        except Malformed:
            continue
    return _check(others[-1], value, file, field)


def _check_dataclass(kind: Any, value: Any, file: str, field: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(value, file, field, "an object")
    found = {}
    for one in fields(kind):
        if one.name in value:
            place = _below(field, one.name)
            found[one.name] = _check(_hints(kind)[one.name], value[one.name], file, place)
        elif one.default is MISSING and one.default_factory is MISSING:
            raise Malformed(f"{file}: it has no {_below(field, one.name)}")
    try:
        return kind(**found)
    except ValueError as error:
        raise Malformed(f"{file}: {error}") from None


def _check_sequence(
    kind: type, inner: tuple[Any, ...], value: Any, file: str, field: str
) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _wrong(value, file, field, "a list")
    if kind is tuple and inner and inner[-1] is not ...:
        if len(value) != len(inner):
            raise _wrong(value, file, field, f"{len(inner)} values")
        kinds = inner
    else:
        kinds = (inner[0] if inner else Any,) * len(value)
    places = [f"{field}[{i}]" for i in range(len(value))]
    return kind(map(_check, kinds, value, [file] * len(value), places))


def _check_plain(kind: type, value: Any, file: str, field: str) -> Any:
    """A bool, int, float or str; a bool is no number."""
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST
    if kind is float and (whole or (isinstance(value, float) and math.isfinite(value))):
        return float(value)
    if kind is int and whole:
        return int(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str) and is_utf8(value) and "\0" not in value:
        return value
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
    }
    raise _wrong(value, file, field, words[kind])


def _wrong(value: Any, file: str, field: str, wanted: object) -> Malformed:
    return Malformed(f"{file}: {field or 'it'} is {_short(value)}, not {wanted}")


def _short(value: Any) -> str:
    shown = ascii(value)
    return shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "…"


def _below(field: str, name: str) -> str:
    return f"{field}.{name}" if field else name


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)
