"""Plans as YAML: a source, and steps named like the builders of Plan.

    source: {jsonl: {paths: [a.jsonl]}}
    steps:
      - tokenize: {tokenizer: ./base}
      - shuffle: {seed: 1}
      - pack: {length: 512}
      - batch: {n: 8}

``mix`` and ``interleave`` take parts that are plans themselves: {source, steps, weight}.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deltaserve.errors import ConfigError, PipelineError
from deltaserve.pipeline.node import Node
from deltaserve.pipeline.operators import OPERATORS, SOURCE
from deltaserve.pipeline.plan import Plan
from deltaserve.yaml_file import read_yaml

SOURCES: Mapping[str, Callable[..., Plan]] = {
    "jsonl": Plan.from_jsonl,
    "parquet": Plan.from_parquet,
    "text": Plan.from_text,
    "tokens": Plan.from_tokens,
    "dataset": Plan.from_dataset,
}
COMPOUND = ("index", "mix", "interleave")
STEPS = (
    "map", "filter", "flat_map", "chat_template", "tokenize", "shuffle", "repeat", "take",
    "cache", "prefetch", "pack", "bucket", "batch",
)  # fmt: skip
# Settings that may be relative to the file.
PATHS = ("paths", "dataset", "selection", "tokenizer")

# Settings that no builder takes.
DERIVED = (("bucket", "n"), ("tokenize", "together"))


def read_plan(file: Path, *, allow_functions: bool = False) -> Plan:
    """The plan in a file. Paths in it are relative to the file's folder if they exist there.

    Raises PipelineError naming what is wrong and where.
    """
    try:
        content = read_yaml(file)
    except ConfigError as cause:
        raise PipelineError(str(cause)) from None
    return _Reader(file, allow_functions).plan(content, str(file))


class _Reader:
    def __init__(self, file: Path, allow_functions: bool) -> None:
        self._folder, self._allow = file.parent, allow_functions

    def plan(self, content: Any, where: str) -> Plan:
        """{source, steps}"""
        self._require_keys(content, ("source",), ("steps",), where)
        plan = self._source(content["source"], where)
        steps = content.get("steps") or []
        if not isinstance(steps, list):
            raise PipelineError(f"{where}: steps must be a list")
        for number, step in enumerate(steps, 1):
            at = f"{where}, step {number}"
            name, settings = self._named(step, STEPS, at)
            plan = self._call(getattr(plan, name), settings, f"{at} ({name})")
        return plan

    def _source(self, content: Any, where: str) -> Plan:
        name, settings = self._named(content, (*SOURCES, *COMPOUND), f"{where}, source")
        at = f"{where}, source ({name})"
        if name in SOURCES:
            return self._call(SOURCES[name], settings, at)
        if name == "index":
            self._require_keys(settings, ("selection", "source"), (), at)
            selection = self._path("selection", settings["selection"])
            return Plan.from_index(selection, self._source(settings["source"], at))
        return self._parts(name, settings, at)

    def _parts(self, name: str, settings: Any, where: str) -> Plan:
        others = ("seed", "stop") if name == "mix" else ("block",)
        self._require_keys(settings, ("parts",), others, where)
        if not isinstance(settings["parts"], list):
            raise PipelineError(f"{where}: parts must be a list")
        parts = []
        for number, part in enumerate(settings["parts"], 1):
            at = f"{where}, part {number}"
            if not isinstance(part, dict):
                raise PipelineError(f"{at}: must be a mapping with source, steps and weight")
            weight = part.get("weight", 1.0)
            if name == "interleave" and "weight" in part:
                raise PipelineError(f"{at}: only a mix has weights")
            if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                raise PipelineError(f"{at}: weight must be a number, not {weight!r}")
            plan = self.plan({k: v for k, v in part.items() if k != "weight"}, at)
            parts.append((plan, float(weight)))
        rest = {key: settings[key] for key in others if key in settings}
        if name == "mix":
            return Plan.mix(parts, **rest)
        return Plan.interleave([plan for plan, _ in parts], **rest)

    def _named(self, content: Any, names: tuple[str, ...], where: str) -> tuple[str, Any]:
        """``{name: settings}``, or just ``name``."""
        if isinstance(content, str):
            content = {content: {}}
        if not isinstance(content, dict) or len(content) != 1:
            raise PipelineError(f"{where}: must be one of {', '.join(names)}, with its settings")
        name, settings = next(iter(content.items()))
        if name not in names:
            raise PipelineError(f"{where}: no {name!r}: choose one of {', '.join(names)}")
        return name, {} if settings is None else settings

    def _call(self, builder: Callable[..., Plan], settings: Any, where: str) -> Plan:
        parameters = inspect.signature(builder).parameters
        if not isinstance(settings, dict):
            # The one setting that must be given may be given alone: {take: 100}.
            first = next(iter(parameters))
            settings = {first: settings}
        for key in settings:
            if key not in parameters:
                raise PipelineError(f"{where}: no {key!r}: it takes {', '.join(parameters)}")
        for key, each in parameters.items():
            if each.default is inspect.Parameter.empty and key not in settings:
                raise PipelineError(f"{where}: {key} is missing")
        self._require_allowed(settings.get("fn"), where)
        given = {k: self._path(k, v) if k in PATHS else v for k, v in settings.items()}
        try:
            return builder(**given)
        except (TypeError, ValueError) as cause:
            raise PipelineError(f"{where}: {cause}") from None
        except PipelineError as cause:
            raise PipelineError(f"{where}: {cause}") from None

    def _require_allowed(self, function: Any, where: str) -> None:
        if isinstance(function, str) and ":" in function and not self._allow:
            raise PipelineError(
                f"{where}: the plan would import and run {function}: allow it with "
                "--allow-functions (allow_functions=True) if you trust the file"
            )

    def _path(self, key: str, value: Any) -> Any:
        """Relative to the plan's folder where it exists there."""
        if isinstance(value, list):
            return [self._path(key, each) for each in value]
        if isinstance(value, str) and (self._folder / value).exists():
            return str(self._folder / value)
        return value

    @staticmethod
    def _require_keys(
        content: Any, needed: tuple[str, ...], others: tuple[str, ...], where: str
    ) -> None:
        if not isinstance(content, dict):
            raise PipelineError(f"{where}: must be a mapping with {', '.join(needed)}")
        if missing := [key for key in needed if key not in content]:
            raise PipelineError(f"{where}: {', '.join(missing)} is missing")
        if unknown := [str(key) for key in content if key not in needed + others]:
            raise PipelineError(
                f"{where}: no {', '.join(unknown)}: it takes {', '.join(needed + others)}"
            )


def plan_yaml(plan: Plan) -> str:
    """The file that ``read_plan`` reads back to an equal plan.

    Raises PipelineError: the plan holds functions or data that have no name.
    """
    import yaml

    return yaml.safe_dump(_content(plan.root), sort_keys=False)


def _content(node: Node) -> dict[str, Any]:
    steps = []
    while OPERATORS[node.op].kind != SOURCE and node.op not in COMPOUND:
        steps.append({node.op: _settings(node)})
        node = node.inputs[0]
    content: dict[str, Any] = {"source": _source_content(node)}
    return content | ({"steps": steps[::-1]} if steps else {})


def _source_content(node: Node) -> dict[str, Any]:
    if node.op == "index":
        inner = _source_content(node.inputs[0])
        selection = node.params["selection"]
        given = list(selection) if isinstance(selection, tuple) else selection
        return {"index": {"selection": given, "source": inner}}
    if node.op not in COMPOUND:
        return {node.op: _settings(node)}
    parts = [_content(below) for below in node.inputs]
    settings = _settings(node)
    if node.op == "mix":
        for part, weight in zip(parts, settings.pop("weights"), strict=True):
            part["weight"] = weight
    return {node.op: {**settings, "parts": parts}}


def _settings(node: Node) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for key, value in node.params.items():
        if value is None or (node.op, key) in DERIVED:
            continue
        if callable(value) or key == "dataset":
            raise PipelineError(
                f"{node.name or node.op}: only a registered name or 'module:function', and a "
                "dataset's directory, can be written to a file"
            )
        settings[key] = list(value) if isinstance(value, tuple) else value
    if node.op == "dataset":
        settings = {"dataset": settings["path"]}
    attributes = node.attributes
    if attributes.random:
        settings["random"] = True
    if not attributes.deterministic:
        settings["deterministic"] = False
    if attributes.cost_hint is not None:
        settings["cost"] = attributes.cost_hint
    return settings
