"""A plan: what a pipeline does, as an immutable graph of operators.

A plan runs nothing. It can be printed, compared by fingerprint, checked, rewritten, stored as
YAML and compiled by the adapter; every builder returns a new plan.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaserve.errors import PipelineError
from deltaserve.pipeline.node import Node, node_of
from deltaserve.pipeline.operators import Attributes
from deltaserve.pipeline.printing import tree

if TYPE_CHECKING:
    from deltaserve.pipeline.specs import Spec

Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True, eq=False)
class Plan:
    """A graph of operators, by its last one."""

    root: Node

    # ---- sources

    @classmethod
    def from_jsonl(cls, paths: Paths, *, on_error: str = "raise") -> Plan:
        """One JSON object a line. on_error: what happens at a broken line, "raise" or "skip"
        (skipped rows are counted by the iterator)."""
        return cls(node_of("jsonl", {"paths": _paths(paths), "on_error": on_error}))

    @classmethod
    def from_parquet(cls, paths: Paths, *, columns: Sequence[str] | None = None) -> Plan:
        return cls(node_of("parquet", {"paths": _paths(paths), "columns": _tuple(columns)}))

    @classmethod
    def from_dataset(cls, dataset: Any) -> Plan:
        """A ``datasets.Dataset``, or the directory that its save_to_disk wrote."""
        path = str(dataset) if isinstance(dataset, (str, Path)) else None
        return cls(node_of("dataset", {"path": path} if path else {"dataset": dataset}))

    @classmethod
    def from_text(cls, paths: Paths, *, by: str = "line") -> Plan:
        """Text files; a row {"text"} is a line, or a whole file with by="file"."""
        return cls(node_of("text", {"paths": _paths(paths), "by": by}))

    @classmethod
    def from_tokens(cls, paths: Paths, *, length: int, dtype: str = "uint16") -> Plan:
        """Shards of token ids (.npy, or raw numbers of ``dtype``), memory-mapped; a row
        {"input_ids"} is ``length`` tokens of one shard, its last may be shorter."""
        return cls(
            node_of("tokens", {"paths": _paths(paths), "length": int(length), "dtype": dtype})
        )

    @classmethod
    def from_index(cls, selection: str | Path | Sequence[Any], source: Plan) -> Plan:
        """The rows of ``source`` that a selection chose, in its order.

        selection: row numbers; ids; or a directory that ``deltaserve select`` wrote, whose ids
        are looked up in the source's "id" field.
        """
        if source.root.inputs:
            raise PipelineError(f"an index selects from a source, not from {source.root.op}")
        given: Any = (
            str(selection) if isinstance(selection, (str, Path)) else tuple(map(_plain, selection))
        )
        return cls(node_of("index", {"selection": given}, (source.root,)))

    @classmethod
    def mix(
        cls,
        parts: Mapping[Plan, float] | Sequence[tuple[Plan, float]],
        seed: int = 0,
        *,
        stop: str = "all",
    ) -> Plan:
        """Rows of several plans in proportion to their weights, in a seeded order.

        stop: "all" goes on with what is left when a part ends (no row is lost); "first" ends
        with the first part that ends.
        """
        pairs = list(parts.items() if isinstance(parts, Mapping) else parts)
        nodes = tuple(plan.root for plan, _ in pairs)
        weights = tuple(float(weight) for _, weight in pairs)
        return cls(node_of("mix", {"weights": weights, "seed": seed, "stop": stop}, nodes))

    @classmethod
    def interleave(cls, parts: Sequence[Plan], *, block: int = 1) -> Plan:
        """``block`` rows of each plan in turn, until all have ended."""
        return cls(node_of("interleave", {"block": block}, tuple(plan.root for plan in parts)))

    # ---- rows

    def map(
        self,
        fn: Callable[..., Any] | str,
        *,
        random: bool = False,
        seed: int = 0,
        deterministic: bool = True,
        reads: Sequence[str] | None = None,
        writes: Sequence[str] | None = None,
        cost: float | None = None,
        name: str | None = None,
    ) -> Plan:
        """``fn(row) -> row``; with random=True ``fn(row, rng)``, rng a numpy Generator of the
        seed, the epoch and the row. reads, writes: the fields it looks at and changes, if
        declared; they decide what may be moved across it. cost: CPU seconds a row, a hint."""
        attributes = Attributes(deterministic, random, True, cost)
        params = {"fn": fn, "reads": _tuple(reads), "writes": _tuple(writes)}
        return self._then("map", params | ({"seed": seed} if random else {}), attributes, name)

    def filter(
        self,
        fn: Callable[..., bool] | str,
        *,
        reads: Sequence[str] | None = None,
        deterministic: bool = True,
        cost: float | None = None,
        name: str | None = None,
    ) -> Plan:
        """Keep the rows where ``fn(row)`` is true."""
        params = {"fn": fn, "reads": _tuple(reads)}
        return self._then("filter", params, Attributes(deterministic, False, True, cost), name)

    def flat_map(
        self,
        fn: Callable[..., Any] | str,
        *,
        random: bool = False,
        seed: int = 0,
        deterministic: bool = True,
        cost: float | None = None,
        name: str | None = None,
    ) -> Plan:
        """``fn(row)`` (or ``fn(row, rng)``) gives any number of rows."""
        attributes = Attributes(deterministic, random, True, cost)
        params = {"fn": fn} | ({"seed": seed} if random else {})
        return self._then("flat_map", params, attributes, name)

    def chat_template(
        self,
        tokenizer: str | Path,
        *,
        messages: str = "messages",
        tools: str | None = None,
        name: str | None = None,
    ) -> Plan:
        """Conversations become "text", and "spans": where in it the assistant speaks."""
        params = {"tokenizer": str(tokenizer), "messages": messages, "tools": tools}
        return self._then("chat_template", params, None, name)

    def tokenize(
        self,
        tokenizer: str | Path,
        *,
        text: str = "text",
        max_length: int | None = None,
        special_tokens: bool | None = None,
        name: str | None = None,
    ) -> Plan:
        """ "input_ids" (int32 [T]), and "loss_mask" (uint8 [T]) where "spans" are known.

        max_length: longer rows are cut. special_tokens: whether the tokenizer adds its own;
        by default only to text that no chat template made.
        """
        params = {
            "tokenizer": str(tokenizer),
            "text": text,
            "max_length": max_length,
            "special_tokens": special_tokens,
            "together": 1,  # raised by a rewrite
        }
        return self._then("tokenize", params, None, name)

    # ---- order and extent

    def shuffle(self, seed: int, window: int | None = None) -> Plan:
        """All rows in a new order each epoch; with a window, only within that many rows."""
        return self._then("shuffle", {"seed": int(seed), "window": window})

    def repeat(self, epochs: int | None = None) -> Plan:
        """So many times, or for ever."""
        return self._then("repeat", {"epochs": epochs})

    def take(self, n: int) -> Plan:
        return self._then("take", {"n": int(n)})

    def cache(self) -> Plan:
        """Keep the rows up to here on the disk, for every job that computes the same; see
        cache.py."""
        return self._then("cache", {})

    def prefetch(self, n: int) -> Plan:
        """Hold ``n`` elements ready."""
        return self._then("prefetch", {"n": int(n)})

    # ---- groups

    def pack(
        self,
        length: int,
        algorithm: str = "best_fit",
        *,
        overflow: str = "split",
        window: int = 128,
        pad_id: int = 0,
        name: str | None = None,
    ) -> Plan:
        """Several rows of tokens in one of ``length``; see packing.py for the fields.

        overflow: of a row longer than that: "split" (no token is lost), "truncate" or "error".
        window: packed rows that are arranged together.
        """
        params = {
            "length": int(length),
            "algorithm": algorithm,
            "overflow": overflow,
            "window": int(window),
            "pad_id": int(pad_id),
        }
        return self._then("pack", params, None, name)

    def bucket(self, boundaries: Sequence[int], *, window: int = 64) -> Plan:
        """Rows of similar length together, for the ``batch`` that must follow; ``window`` batches
        are arranged together."""
        params = {"boundaries": tuple(map(int, boundaries)), "window": int(window), "n": None}
        return self._then("bucket", params)

    def batch(
        self,
        n: int,
        *,
        pad: int | None = None,
        drop_remainder: bool = False,
        pad_to: int | None = None,
        name: str | None = None,
    ) -> Plan:
        """``n`` rows stacked. pad: the id that fills shorter rows of tokens, up to the longest
        or to ``pad_to``."""
        params = {"n": int(n), "pad": pad, "pad_to": pad_to, "drop_remainder": drop_remainder}
        below = self
        if self.root.op == "bucket":  # its groups have the batch's size
            below = Plan(replace(self.root, params={**self.root.params, "n": int(n)}))
        return below._then("batch", params, None, name)

    # ---- what a plan can be asked

    def nodes(self) -> list[Node]:
        """Every operator once, inputs before those who read them."""
        seen: dict[int, Node] = {}

        def visit(node: Node) -> None:
            if id(node) not in seen:
                for below in node.inputs:
                    visit(below)
                seen[id(node)] = node

        visit(self.root)
        return list(seen.values())

    def fingerprint(self) -> str:
        """A hash of what the plan computes: operators, parameters, file names, code of
        functions; seeds and operator names are left out."""
        return self.root.fingerprint()

    def named(self) -> Plan:
        """The same plan, every operator with a name of its own."""
        taken: set[str] = set()
        done: dict[int, Node] = {}
        for node in self.nodes():
            name = node.name or node.op
            unique = next(n for n in _candidates(name) if n not in taken)
            taken.add(unique)
            inputs = tuple(done[id(below)] for below in node.inputs)
            done[id(node)] = replace(node, name=unique, inputs=inputs)
        return Plan(done[id(self.root)])

    def without(self, operators: Sequence[str]) -> Plan:
        """The same plan with operators of these kinds taken out."""
        done: dict[int, Node] = {}
        for node in self.nodes():
            inputs = tuple(done[id(below)] for below in node.inputs)
            done[id(node)] = inputs[0] if node.op in operators else replace(node, inputs=inputs)
        return Plan(done[id(self.root)])

    def check(self) -> Spec:
        """The spec of the elements. Raises PipelineError naming the operator that cannot work
        on what it would get."""
        from deltaserve.pipeline.specs import check

        return check(self)

    def __str__(self) -> str:
        return "\n".join(tree(self.root, ""))

    @classmethod
    def from_yaml(cls, file: str | Path, *, allow_functions: bool = False) -> Plan:
        """The plan in a file. allow_functions: whether it may name functions to import and
        run (``module:function``)."""
        from deltaserve.pipeline.plan_yaml import read_plan

        return read_plan(Path(file), allow_functions=allow_functions)

    def to_yaml(self) -> str:
        from deltaserve.pipeline.plan_yaml import plan_yaml

        return plan_yaml(self)

    def _then(
        self,
        op: str,
        params: Mapping[str, Any],
        attributes: Attributes | None = None,
        name: str | None = None,
    ) -> Plan:
        return Plan(node_of(op, params, (self.root,), attributes, name))


def _paths(paths: Paths) -> tuple[str, ...]:
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not given:
        raise PipelineError("a source needs at least one path")
    return tuple(os.fspath(path) for path in given)


def _tuple(values: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if values is None else tuple(values)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _candidates(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        yield f"{name}-{number}"
        number += 1
