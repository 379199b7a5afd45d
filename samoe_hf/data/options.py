"""Checks of options that come from YAML or the command line, against the signature of what takes them."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Collection, Mapping
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from samoe_hf.errors import InputError, did_you_mean


def check_options(function: Callable, options: Mapping[str, Any], owner: str) -> None:
    """Checks options before a function, a class or a `functools.partial`, which is typed, is called with them.

    An unknown option (the nearest known one is named), a missing one, and a value of another type are an `InputError`.
    `owner` is what the options belong to, for messages.
    """
    parameters = inspect.signature(function).parameters
    for name in options:
        if name not in parameters:
            raise InputError(f"{owner} have no option {name!r}{did_you_mean(name, parameters)}")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in options:
            raise InputError(f"{owner} need the option {name!r}")
    check_types(function, options, owner)


def check_types(function: Callable, options: Mapping[str, Any], owner: str) -> None:
    """Raises `ValueError` for an option whose value is of another type than the function's signature says."""
    function = function.func if isinstance(function, partial) else function
    hints = get_type_hints(function.__init__ if isinstance(function, type) else function)
    for name, value in options.items():
        if name in hints and not _fits(value, hints[name]):
            raise InputError(f"{owner}: `{name}` must be {_describe(hints[name])}, not {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; lists, as YAML has them, are also tuples. Other kinds of hints are not checked."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if hint in (bool, str, Path, type(None)):
        return isinstance(value, hint)
    if origin is None or not issubclass(origin, Collection) or issubclass(origin, Mapping):
        return True
    if not isinstance(value, Collection) or isinstance(value, (str, bytes, Mapping)):
        return False
    kinds = arguments if origin is tuple and Ellipsis not in arguments else arguments[:1] * len(value)
    return len(value) == len(kinds) and all(map(_fits, value, kinds))


def _describe(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_describe, arguments))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple:
        return f"({', '.join(map(_describe, arguments))})"
    if origin is not None:
        return f"a list of {_describe(arguments[0])}"
    return {type(None): "None", int: "an integer", float: "a finite number"}.get(hint) or str(hint.__name__)
