"""Files and bodies of others, read so that what is wrong with them is an error of one line."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deltaserve.errors import ConfigError


def parse_json(text: str | bytes) -> Any:
    """Raises ValueError, also for what nests deeper than Python does."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_text(path: Path) -> str:
    """Raises ConfigError: unreadable, or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text, from byte {error.start} on") from error


def read_json(path: Path) -> Any:
    """Raises ConfigError: unreadable, or not JSON, with the line."""
    text = read_text(path)
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error


def csv_lines(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line numbers and rows, by the columns of the first line. Raises ConfigError."""
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    while True:
        try:
            line = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # That line is not counted yet.
            raise ConfigError(f"{path}, line {reader.line_num + 1}: {error}") from error
        yield reader.line_num, line


def json_lines(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line numbers and objects. Raises ConfigError."""
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            content = parse_json(line)
        except ValueError as error:
            reason = getattr(error, "msg", None) or error
            raise ConfigError(f"{path}, line {number}: not JSON: {reason}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{path}, line {number}: not a JSON object")
        yield number, content


def number_of(line: Mapping[str, Any], column: str) -> float:
    """Raises KeyError, or ValueError that names the column and what it should hold."""
    number = _number(line[column])
    if not math.isfinite(number):
        raise ValueError(f"{_named(line, column)}, but must be a number: mend or remove the line")
    return number


def count_of(line: Mapping[str, Any], column: str, least: int = 0) -> int:
    """Tokens, at least ``least``. Raises KeyError, or ValueError as ``number_of``."""
    number = _number(line[column])
    if not (math.isfinite(number) and number >= least and number == int(number)):
        raise ValueError(
            f"{_named(line, column)}, but must be a whole number of tokens, {least} or more: "
            "mend or remove the line"
        )
    return int(number)


def _number(value: Any) -> float:
    """NaN where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _named(line: Mapping[str, Any], column: str) -> str:
    value = repr(line[column])
    return f"{column} is {value if len(value) < 60 else value[:60] + ' ...'}"
