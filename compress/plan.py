"""Which codec stores which parameter: defaults, command-line options, YAML patterns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import yaml

from deltaserve.artifact.codecs import CODECS
from deltaserve.artifact.codecs.base import FLOATS, dense_bytes
from deltaserve.artifact.codecs.int import IntCodec, IntParams
from deltaserve.artifact.codecs.lowrank import LowRankParams
from deltaserve.artifact.codecs.nf4 import Nf4Params
from deltaserve.artifact.codecs.nm24 import Nm24Params
from deltaserve.artifact.codecs.params import parse_params
from deltaserve.artifact.codecs.raw import RawParams
from deltaserve.artifact.codecs.rows import RowsParams, changed_rows
from deltaserve.artifact.codecs.xor import XorParams
from deltaserve.compress.dare import DropParams
from deltaserve.compress.delta_come import BandParams
from deltaserve.compress.gptq import Solver
from deltaserve.errors import CodecError, ConfigError

# Smaller tensors gain nothing from a codec.
TINY = 256
LOSSLESS = ("raw", "xor")
# What a user may set. The rest of a codec's params are written by its encoder.
SETTINGS: dict[str, tuple[type[Any], tuple[str, ...]]] = {
    "raw": (RawParams, ()),
    "xor": (XorParams, ("level",)),
    "rows": (RowsParams, ("bits", "group_size", "symmetric", "clip")),
    "int": (IntParams, ("bits", "group_size", "scale_axis", "symmetric", "planes", "clip")),
    "nm24": (Nm24Params, ("bits", "group_size", "clip")),
    "lowrank": (LowRankParams, ("rank", "bits")),
    "nf4": (Nf4Params, ()),
    "sparse": (DropParams, ("keep", "random", "seed")),
    "sum": (BandParams, ("terms", "share")),
}


@dataclass(frozen=True)
class CodecChoice:
    """A codec and its settings, checked by ``choice``."""

    codec: str
    params: Mapping[str, Any] = field(default_factory=dict)


# Leaves the base's values: costs nothing, and loses what the fine-tune changed.
SKIP = CodecChoice("skip")


@dataclass(frozen=True)
class Rule:
    """A pattern of parameter names (fnmatch) and what stores them."""

    match: str
    choice: CodecChoice


@dataclass(frozen=True)
class Plan:
    """linear: for matrices; vocabulary: for embedding and head, None = decide by what changed.

    small: for norms, biases and anything tiny. rules come first, the first match wins.
    solver: how codes are fitted to inputs, where there are any.
    """

    linear: CodecChoice
    vocabulary: CodecChoice | None
    small: CodecChoice
    rules: tuple[Rule, ...] = ()
    solver: Solver = field(default_factory=Solver)

    def check_rules(self, names: Iterable[str]) -> None:
        """Raises ConfigError for a pattern that matches no parameter."""
        every = list(names)
        for rule in self.rules:
            if not any(fnmatchcase(name, rule.match) for name in every):
                raise ConfigError(
                    f"the pattern {rule.match!r} matches no parameter of this model, whose first "
                    f"is {every[0] if every else 'missing'}; correct or remove it"
                )

    def choose(
        self, name: str, kind: str, tensor: torch.Tensor, base: torch.Tensor | None
    ) -> CodecChoice:
        """The codec for a changed parameter, given its class and values."""
        for rule in self.rules:
            if fnmatchcase(name, rule.match):
                return rule.choice
        if tensor.dim() < 2 or tensor.numel() < TINY or tensor.dtype not in FLOATS:
            return self.small
        if kind in ("embedding", "head"):
            return self.vocabulary or _for_vocabulary(tensor, base)
        return self._worthwhile(self.linear, tensor)

    def _worthwhile(self, chosen: CodecChoice, tensor: torch.Tensor) -> CodecChoice:
        """Factors larger than the matrix itself are pointless."""
        if chosen.codec == "lowrank":
            rank = min(chosen.params.get("rank", LowRankParams.rank), *tensor.shape[-2:])
            bits = chosen.params.get("bits", 0) or 8 * tensor.element_size()
            columns = tensor.shape[-1]
            stored = rank * (tensor.numel() // columns + columns) * bits
            if stored >= dense_bytes(tuple(tensor.shape), tensor.dtype) * 8:
                return self.small
        return chosen


def choice(codec: str, params: Mapping[str, Any], where: str) -> CodecChoice:
    """Check a codec and its settings; ConfigError says where they came from."""
    if codec == SKIP.codec and not params:
        return SKIP
    if codec not in CODECS:
        raise ConfigError(f"{where}: unknown codec {codec!r} (known: {', '.join(CODECS)})")
    cls, settable = SETTINGS[codec]
    for name in params:
        if name not in settable:
            fits = [c for c, (_, names) in SETTINGS.items() if name in names]
            raise ConfigError(
                f"{where}: {name} does not fit codec {codec} "
                f"(its settings: {', '.join(settable) or 'none'}; "
                f"{name} fits: {', '.join(fits) or 'no codec'})"
            )
    if params.get("scale_axis", "group") != "group" and "group_size" in params:
        raise ConfigError(
            f"{where}: group_size only fits scale_axis group, not {params['scale_axis']}"
        )
    try:
        parse_params(cls, codec, dict(params))
    except CodecError as cause:
        raise ConfigError(f"{where}: {cause}") from None
    for number, term in enumerate(params.get("terms", ()), 1):
        settings = {key: value for key, value in term.items() if key != "codec"}
        choice(term["codec"], settings, f"{where}, term {number}")
    if codec == "rows" and "bits" not in params and params:
        raise ConfigError(f"{where}: {next(iter(params))} needs bits for codec rows")
    return CodecChoice(codec, dict(params))


def make_plan(
    codec: str | None = None,
    params: Mapping[str, Any] | None = None,
    vocabulary_codec: str | None = None,
    vocabulary_params: Mapping[str, Any] | None = None,
    rules: tuple[Rule, ...] = (),
    solver: Solver | None = None,
) -> Plan:
    """A plan from options. ``raw`` and ``xor`` apply to every parameter, the others to linears.

    Raises ConfigError for settings that do not fit the codec they are given with.
    """
    linear = choice(codec or "int", params or {}, "compress")
    small = linear if linear.codec in LOSSLESS else CodecChoice("raw")
    vocabulary: CodecChoice | None = linear if linear.codec in LOSSLESS else None
    if vocabulary_codec is not None or vocabulary_params:
        vocabulary = choice(vocabulary_codec or "int", vocabulary_params or {}, "embeddings")
    return Plan(linear, vocabulary, small, rules, solver or Solver())


def load_rules(path: Path) -> tuple[Rule, ...]:
    """Patterns from YAML: a list of ``{match: "*.mlp.*", codec: int, bits: 4}``."""
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as cause:
        raise ConfigError(f"{path} cannot be read: {cause}") from None
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path} must hold a list of patterns: - match: '*.mlp.*'")
    return tuple(_rule(entry, f"{path}, pattern {n}") for n, entry in enumerate(entries, 1))


def _rule(entry: object, where: str) -> Rule:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: not a mapping with match and codec")
    rest = {str(key): value for key, value in entry.items()}
    match, codec = rest.pop("match", None), rest.pop("codec", None)
    if not isinstance(match, str) or not isinstance(codec, str):
        raise ConfigError(f"{where}: needs match (a pattern) and codec (a name)")
    return Rule(match, choice(codec, rest, where))


def _for_vocabulary(tensor: torch.Tensor, base: torch.Tensor | None) -> CodecChoice:
    """Exact changed rows if they take no more than everything in 4 bits; else 4 bits.

    4 bits, where linears take 2: an embedding row is used on its own, its error does not
    average out over a sum as in a projection.
    """
    coarse = CodecChoice("int", {"bits": 4, "group_size": 64})
    rows = len(changed_rows(tensor, base))
    exact = rows * (dense_bytes(tuple(tensor.shape[1:]), tensor.dtype) + 4)
    layout = IntCodec().layout(dict(coarse.params), tuple(tensor.shape), tensor.dtype)
    quantised = sum(dense_bytes(shape, dtype) for dtype, shape in layout.values())
    return CodecChoice("rows") if exact <= quantised else coarse
