"""Recorded loads in their published formats, and synthetic ones with their statistics.

Formats, told apart by their first line:

- Azure LLM 2023 and 2024 (CSV): TIMESTAMP, ContextTokens, GeneratedTokens
- BurstGPT (CSV): Timestamp, Model, Request tokens, Response tokens, and others
- Mooncake (JSONL): timestamp in ms, input_length, output_length, hash_ids
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deltaserve.bench.load.reading import count_of, csv_lines, json_lines, number_of, read_text
from deltaserve.errors import ConfigError

MOONCAKE_BLOCK = 512
"""Tokens that one of Mooncake's hash ids stands for."""


@dataclass(frozen=True, slots=True)
class Row:
    """One recorded request. time: seconds since the first."""

    time: float
    prompt_tokens: int
    output_tokens: int
    model: str | None = None
    blocks: tuple[int, ...] = ()
    """Ids of the prompt's blocks: equal ids, equal text."""
    block_tokens: int = MOONCAKE_BLOCK


@dataclass(frozen=True)
class Published:
    """What is known of a trace: its rate, how bursty it is, and quantiles of the lengths.

    gaps_cv: standard deviation of the gaps between arrivals over their mean; 1 is Poisson.
    Means are of the trace itself, for tests to compare with.
    """

    rate: float
    gaps_cv: float
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    prompt_mean: float
    output_mean: float


QUANTILES = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100)
"""In percent, of the lengths in ``PUBLISHED``."""

# Computed from the published files: AzureLLMInferenceTrace_{code,conv}.csv (2023, CC-BY,
# Splitwise, ISCA 2024) and conversation_trace.jsonl (Mooncake, FAST 2025; its timestamps are
# rounded to 3 s, so its gaps tell nothing and Poisson is assumed). Azure 2024 (DynamoLLM, HPCA
# 2025) is read from the figures of AzureLLMInferenceDataset2024.ipynb: requests over seven days and
# the distribution functions of the lengths, where a pixel is 18 prompt or 11 output tokens, so its
# shortest outputs are uncertain and code's few over 900 are left out; gaps are not shown, and
# Poisson is assumed. BurstGPT (arXiv 2401.17644v3) is coarser: 5.29 million requests in 121 days,
# 621 prompt and 126 output tokens in the mean and half of the prompts below 353, as users of its
# first file report; log-normal lengths (of outputs with a deviation as large as the mean) and
# Poisson gaps are assumed.
PUBLISHED = {
    "azure-code": Published(
        rate=2.567,
        gaps_cv=13.15,
        prompt=(3, 17, 75, 147, 578, 1469, 2744, 5188, 7303, 7436, 7437),
        output=(6, 6, 6, 7, 9, 13, 24, 55, 90, 251, 1899),
        prompt_mean=2047.8,
        output_mean=27.9,
    ),
    "azure-conv": Published(
        rate=5.530,
        gaps_cv=1.094,
        prompt=(2, 29, 181, 207, 396, 1020, 1189, 2734, 4083, 4142, 14050),
        output=(7, 16, 41, 54, 85, 129, 395, 424, 451, 601, 1000),
        prompt_mean=1154.7,
        output_mean=211.1,
    ),
    "azure-code-2024": Published(
        rate=27.78,
        gaps_cv=1.0,
        prompt=(1, 12, 124, 323, 924, 1916, 3326, 6175, 7666, 7679, 7740),
        output=(1, 1, 1, 2, 3, 4, 13, 38, 73, 256, 900),
        prompt_mean=2484.8,
        output_mean=17.0,
    ),
    "azure-conv-2024": Published(
        rate=45.15,
        gaps_cv=1.0,
        prompt=(1, 84, 201, 291, 539, 910, 2342, 3788, 4883, 6567, 8000),
        output=(1, 1, 1, 2, 11, 36, 102, 334, 446, 674, 1500),
        prompt_mean=1601.7,
        output_mean=98.3,
    ),
    "burstgpt": Published(
        rate=0.506,
        gaps_cv=1.0,
        prompt=(7, 30, 61, 90, 172, 353, 723, 1378, 2028, 4184, 8192),
        output=(4, 13, 23, 31, 51, 89, 156, 259, 350, 618, 1970),
        prompt_mean=621.0,
        output_mean=126.0,
    ),
    "mooncake-conversation": Published(
        rate=3.401,
        gaps_cv=1.0,
        prompt=(891, 894, 901, 964, 2306, 6909, 15367, 27367, 39550, 85400, 126195),
        output=(1, 3, 10, 24, 156, 350, 472, 597, 698, 1119, 2000),
        prompt_mean=12035.1,
        output_mean=342.6,
    ),
}


def read_trace(path: Path) -> list[Row]:
    """The requests of a file, in order of time, the first at 0.

    Raises:
        ConfigError: unreadable, of an unknown format, or malformed; the line is named.
    """
    text = read_text(path)
    if text.lstrip().startswith("{"):
        rows = list(_parse_all(path, json_lines(path, text), _mooncake))
    else:
        first = text.partition("\n")[0]
        parse = _csv_parser(path, {name.strip() for name in first.split(",")})
        rows = list(_parse_all(path, csv_lines(path, text), parse))
    if not rows:
        raise ConfigError(f"{path}: holds no requests")
    rows.sort(key=lambda row: row.time)
    return [replace(row, time=row.time - rows[0].time) for row in rows]


def shrunk(row: Row, factor: float) -> Row:
    """The same request with all its lengths divided, for models of a short context."""
    return replace(
        row,
        prompt_tokens=max(1, round(row.prompt_tokens / factor)),
        output_tokens=max(1, round(row.output_tokens / factor)),
        block_tokens=max(1, round(row.block_tokens / factor)),
    )


def synthetic(like: Published, rng: np.random.Generator) -> Iterator[Row]:
    """Requests without end whose rate, burstiness and lengths are those of a published trace."""
    shape = like.gaps_cv**-2
    time = 0.0
    while True:
        time += rng.gamma(shape, 1 / (like.rate * shape))
        yield Row(time, from_quantiles(like.prompt, rng), from_quantiles(like.output, rng))


def from_quantiles(lengths: tuple[int, ...], rng: np.random.Generator) -> int:
    """Inverse of the distribution function, interpolated between logarithms."""
    return round(math.exp(np.interp(100 * rng.random(), QUANTILES, np.log(lengths))))


def _csv_parser(path: Path, columns: set[str]) -> Callable[[Mapping[str, Any]], Row]:
    if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= columns:
        return _azure
    if {"Timestamp", "Request tokens", "Response tokens"} <= columns:
        return _burstgpt
    raise ConfigError(
        f"{path}, line 1: no known trace. Known: Azure's (TIMESTAMP, ContextTokens, "
        "GeneratedTokens), BurstGPT's (Timestamp, Request tokens, Response tokens), "
        "Mooncake's JSONL"
    )


def _parse_all(
    path: Path,
    lines: Iterator[tuple[int, Mapping[str, Any]]],
    parse: Callable[[Mapping[str, Any]], Row],
) -> Iterator[Row]:
    for number, line in lines:
        try:
            row = parse(line)
        except (KeyError, TypeError, ValueError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ConfigError(f"{path}, line {number}: {what}") from error
        if row.output_tokens:  # those without an answer had failed when they were recorded
            yield row


def _stamp(line: Mapping[str, Any], column: str) -> float:
    """Seconds of a date and time with seven decimals, one more than Python reads."""
    value = line[column]
    try:
        whole, _, fraction = value.partition(".")
        moment = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.UTC)
        return moment.timestamp() + float(f"0.{fraction.partition('+')[0] or '0'}")
    except (AttributeError, ValueError):
        raise ValueError(
            f"{column} is {value!r}, but must be like 2023-11-16 18:17:03.9799600: "
            "mend or remove the line"
        ) from None


def _azure(line: Mapping[str, Any]) -> Row:
    return Row(
        _stamp(line, "TIMESTAMP"),
        count_of(line, "ContextTokens"),
        count_of(line, "GeneratedTokens"),
    )


def _burstgpt(line: Mapping[str, Any]) -> Row:
    return Row(
        number_of(line, "Timestamp"),
        count_of(line, "Request tokens"),
        count_of(line, "Response tokens"),
        line.get("Model"),
    )


def _mooncake(line: Mapping[str, Any]) -> Row:
    return Row(
        number_of(line, "timestamp") / 1e3,
        count_of(line, "input_length"),
        count_of(line, "output_length"),
        line.get("model"),
        _blocks(line.get("hash_ids", [])),
    )


def _blocks(ids: object) -> tuple[int, ...]:
    if not isinstance(ids, list) or not all(type(block) is int for block in ids):
        raise ValueError(f"hash_ids is {ids!r}, but must be a list of whole numbers")
    return tuple(ids)
