"""What a function computes, as a hash: its bytecode, its constants, and the helpers it calls.

A cache must not survive a change of the code that filled it, also not one in a helper.
"""

from __future__ import annotations

import functools
import hashlib
import json
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def describe(value: Any) -> str:
    """A text that is equal for equal parameters, in every process."""
    return json.dumps(_plain(value), sort_keys=True)


def code_digest(function: Callable[..., Any]) -> str:
    """ "sha256:..." of a function, with the Python functions of its own package that it calls
    and the values that it captured."""
    hashed = hashlib.sha256()
    _feed(hashed, function, set())
    return f"sha256:{hashed.hexdigest()}"


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        return value.item()
    if hasattr(value, "_fingerprint"):  # datasets.Dataset
        return f"dataset {value._fingerprint}"
    if hasattr(value, "fingerprint"):
        return value.fingerprint()
    if callable(value):
        return code_digest(value)
    raise TypeError(f"a plan cannot hold a {type(value).__name__}")


def _feed(hashed: Any, value: Any, seen: set[int]) -> None:
    if id(value) in seen:
        return
    if isinstance(value, functools.partial):
        seen.add(id(value))
        for part in (value.func, value.args, sorted(value.keywords.items())):
            _feed(hashed, part, seen)
    elif isinstance(value, types.MethodType):
        _feed(hashed, value.__func__, seen)
        _feed(hashed, vars(value.__self__) if hasattr(value.__self__, "__dict__") else None, seen)
    elif isinstance(value, types.FunctionType):
        seen.add(id(value))
        _feed_function(hashed, value, seen)
    elif isinstance(value, types.CodeType):
        hashed.update(value.co_code)
        hashed.update(repr((value.co_names, value.co_varnames)).encode())
        _feed(hashed, value.co_consts, seen)
    elif isinstance(value, (list, tuple)):
        for each in value:
            _feed(hashed, each, seen)
    elif isinstance(value, dict):
        for key in sorted(value, key=repr):
            _feed(hashed, (key, value[key]), seen)
    elif isinstance(value, (set, frozenset)):
        hashed.update(repr(sorted(value, key=repr)).encode())
    elif isinstance(value, np.ndarray):
        hashed.update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
    elif isinstance(value, (type, types.BuiltinFunctionType, types.ModuleType)):
        hashed.update(f"{getattr(value, '__module__', '')}.{value.__name__}".encode())
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        hashed.update(repr(value).encode())
    elif callable(value) and hasattr(value, "__dict__"):
        seen.add(id(value))
        hashed.update(type(value).__qualname__.encode())
        _feed(hashed, type(value).__call__, seen)
        _feed(hashed, vars(value), seen)
    else:
        hashed.update(f"{type(value).__module__}.{type(value).__qualname__}".encode())


def _feed_function(hashed: Any, function: types.FunctionType, seen: set[int]) -> None:
    _feed(hashed, function.__code__, seen)
    _feed(hashed, function.__defaults__, seen)
    for cell in function.__closure__ or ():
        _feed(hashed, cell.cell_contents, seen)
    package = (function.__module__ or "").partition(".")[0]
    for name in _names(function.__code__):
        used = function.__globals__.get(name)
        own = (getattr(used, "__module__", "") or "").partition(".")[0] == package
        plain = isinstance(used, (bool, int, float, str, tuple, dict, list))
        if plain or (isinstance(used, types.FunctionType) and own):
            _feed(hashed, used, seen)


def _names(code: types.CodeType) -> list[str]:
    inner = [
        name for each in code.co_consts if isinstance(each, types.CodeType) for name in _names(each)
    ]
    return [*code.co_names, *inner]
