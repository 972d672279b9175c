"""Where a configuration comes from: the flags of the command line, and a YAML file.

Both have the names of ``config``, with dashes or underscores. Flags win over the file.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from deltaserve.config import DeltaSource, EngineConfig, ServerConfig, check_unique, hash_key
from deltaserve.errors import ConfigError
from deltaserve.yaml_file import read_yaml

LIST_KNOBS = {"delta_roots": "directories", "delta_urls": "addresses"}
KEY_KNOBS = ("api_key", "admin_key")
"""Only their digests are kept."""
MADE_OF_KNOBS = ("engine", "api_key_sha256", "admin_key_sha256")
"""Fields of ServerConfig that nobody gives as they are."""


def load_config(flags: Mapping[str, Any], file: Path | None = None) -> ServerConfig:
    """The configuration of ``deltaserve serve``.

    Args:
        flags: knobs given on the command line; None means not given. ``deltas`` holds
            DeltaSources, which are added to those of the file (the same name replaces).
        file: YAML file with the same knobs.

    Raises:
        ConfigError: unreadable file, unknown knob, wrong type or value.
    """
    values = _read_file(file) if file else {}
    given = {name: value for name, value in flags.items() if value is not None}
    deltas = {d.name: d for d in (*values.pop("deltas", ()), *given.pop("deltas", ()))}
    values.update(given)
    for name, value in values.items():
        _check_type(name, value)
    server = {name: values.pop(name) for name in _server_knobs() if name in values}
    for name in LIST_KNOBS:
        server[name] = tuple(server.get(name, ()))
    keys = {name: values.pop(name, None) for name in KEY_KNOBS}
    digests = {name: None if key is None else hash_key(key) for name, key in keys.items()}
    if "base" not in values:
        raise ConfigError("no base model was given: name its directory or hub id")
    return ServerConfig(
        engine=EngineConfig(**values, deltas=tuple(deltas.values())),
        api_key_sha256=digests["api_key"],
        admin_key_sha256=digests["admin_key"],
        **server,
    )


def parse_deltas(sources: Iterable[str]) -> tuple[DeltaSource, ...]:
    """``NAME=PATH`` arguments. Raises ConfigError when one is malformed or named twice."""
    deltas = []
    for source in sources:
        name, equals, path = source.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"a delta is given as NAME=PATH, not {source!r}")
        deltas.append(DeltaSource(name, path))
    check_unique([delta.name for delta in deltas])
    return tuple(deltas)


def _knobs() -> dict[str, Any]:
    """Name and type of every knob."""
    return get_type_hints(EngineConfig) | _server_knobs() | dict.fromkeys(KEY_KNOBS, str)


def _server_knobs() -> dict[str, Any]:
    hints = get_type_hints(ServerConfig)
    return {name: kind for name, kind in hints.items() if name not in MADE_OF_KNOBS}


def _check_type(name: str, value: Any) -> None:
    wanted = _knobs()[name]
    if name in LIST_KNOBS:
        if not (isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)):
            raise ConfigError(f"{name} must be a list of {LIST_KNOBS[name]}")
        return
    if get_origin(wanted) is Literal:
        choices = get_args(wanted)
        if value not in choices:
            raise ConfigError(f"{name} is {value!r}, but must be one of {', '.join(choices)}")
        return
    kinds = [kind for kind in get_args(wanted) or (wanted,) if kind is not types.NoneType]
    if float in kinds:  # 60 is as good as 60.0
        kinds.append(int)
    if type(value) not in kinds:  # not isinstance: True is an int to Python, not to people
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        raise ConfigError(f"{name} is {value!r}, but must be {names[kinds[0]]}")


def _read_file(file: Path) -> dict[str, Any]:
    """The knobs of a YAML file; relative paths in it start at the file."""
    content = read_yaml(file)
    known = _knobs().keys() - {"deltas"}
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in values:
            raise ConfigError(f"{file}: {name} is given twice")
        if name == "deltas":
            values[name] = _file_deltas(file, value)
        elif name not in known:
            near = difflib.get_close_matches(name, {*known, "deltas"}, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{file}: unknown key {str(key)!r}{hint}")
        elif value is not None:
            values[name] = value
    base = values.get("base")
    if isinstance(base, str) and (file.parent / base).is_dir():  # otherwise a hub id
        values["base"] = str(file.parent / base)
    for name in ("tenants", "state_dir"):
        if isinstance(path := values.get(name), str):
            values[name] = str(file.parent / path)
    if isinstance(roots := values.get("delta_roots"), list):
        values["delta_roots"] = [
            str(file.parent / root) if isinstance(root, str) else root for root in roots
        ]
    return values


def _file_deltas(file: Path, value: Any) -> tuple[DeltaSource, ...]:
    if isinstance(value, Mapping):
        pairs = [(str(name), path) for name, path in value.items()]
        if wrong := [name for name, path in pairs if not isinstance(path, str) or not path]:
            raise ConfigError(f"{file}: the path of delta {wrong[0]!r} must be text")
        deltas = tuple(DeltaSource(name, path) for name, path in pairs)
    elif isinstance(value, list) and all(isinstance(item, str) for item in value):
        deltas = parse_deltas(value)
    else:
        raise ConfigError(f"{file}: deltas must be a mapping of names to paths, or NAME=PATH texts")
    return tuple(DeltaSource(d.name, str(file.parent / d.path)) for d in deltas)
