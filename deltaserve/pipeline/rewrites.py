"""Rewrites of a plan that leave its stream as it is (tf.data's static optimisations, for text).

Each rule looks at one operator whose inputs are rewritten already, and gives another or None.
What a rule relies on is declared by operators (one_to_one, order_free) or by users (reads,
writes); nothing is guessed from code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from deltaserve.pipeline.node import Node
from deltaserve.pipeline.operators import ELEMENT, OPERATORS, STREAM
from deltaserve.pipeline.plan import Plan
from deltaserve.pipeline.segments import CHUNK, in_segment

# Elements that an injected prefetch holds ready.
READY = 2
ROUNDS = 100


@dataclass(frozen=True)
class Rewritten:
    """What a rule did; names are those of the operators."""

    rule: str
    what: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.what}"


def rewrite(plan: Plan) -> tuple[Plan, list[Rewritten]]:
    """The plan after all rules, and what they did."""
    notes: list[Rewritten] = []
    for rule in (remove_noops, filters_first, rows_first, remove_noops, fuse, tokenize_together):
        plan = apply(plan, rule, notes)
    return _prefetched(plan, notes), notes


Rule = Callable[[Node], tuple[Node, str] | None]


def apply(plan: Plan, rule: Rule, notes: list[Rewritten]) -> Plan:
    """One rule, from the sources up, again and again until it finds nothing."""
    for _ in range(ROUNDS):
        done: dict[int, Node] = {}
        before = len(notes)
        for node in plan.nodes():
            inputs = tuple(done[id(below)] for below in node.inputs)
            current = node if inputs == node.inputs else replace(node, inputs=inputs)
            changed = rule(current)
            if changed:
                current = changed[0]
                notes.append(Rewritten(rule.__name__, changed[1]))
            done[id(node)] = current
        plan = Plan(done[id(plan.root)])
        if len(notes) == before:
            return plan
    raise AssertionError(f"{rule.__name__} does not come to an end")


def remove_noops(node: Node) -> tuple[Node, str] | None:
    """Operators that do nothing, and pairs of which one does nothing."""
    below = node.inputs[0] if node.inputs else None
    if below is None:
        return None
    params = node.params
    nothing = (
        (node.op == "repeat" and params["epochs"] == 1)
        or (node.op == "prefetch" and params["n"] == 0)
        or (node.op == "shuffle" and params["window"] == 1)
        or (node.op in ("mix", "interleave") and len(node.inputs) == 1)
        or (node.op == "cache" and below.op == "cache")
    )
    if nothing:
        return below, f"{node.name} does nothing"
    if node.op == below.op == "take":
        least = min(params["n"], below.params["n"])
        return replace(below, params={"n": least}), f"{node.name} and {below.name} are one"
    if node.op == below.op == "prefetch":
        most = max(params["n"], below.params["n"])
        return replace(below, params={"n": most}), f"{node.name} and {below.name} are one"
    return None


def filters_first(node: Node) -> tuple[Node, str] | None:
    """A filter below an operator that does not touch what it reads: fewer rows to treat."""
    if node.op != "filter" or node.params["reads"] is None:
        return None
    passed: list[Node] = []
    below = node.inputs[0]
    while below.op in ("shuffle", "repeat") and in_segment(node):
        passed.append(below)
        below = below.inputs[0]
    written = writes(below)
    if written is None or set(node.params["reads"]) & written:
        return None
    moved = replace(node, inputs=below.inputs)
    top = replace(below, inputs=(moved,))
    for each in reversed(passed):
        top = replace(each, inputs=(top,))
    return top, f"{node.name} before {below.name}"


def rows_first(node: Node) -> tuple[Node, str] | None:
    """Operators on single rows below mixes and repeats of streams, where workers share them."""
    if OPERATORS[node.op].kind != ELEMENT or not OPERATORS[node.op].one_to_one:
        return None
    below = node.inputs[0]
    # Under "first" and take, rows that never come out would be treated too, and might fail.
    whole = (below.op == "mix" and below.params["stop"] == "all") or below.op in (
        "interleave",
        "repeat",
    )
    if node.op == "cache" or not whole or in_segment(below):
        return None
    inputs = tuple(replace(node, inputs=(each,)) for each in below.inputs)
    return replace(below, inputs=inputs), f"{node.name} before {below.name}"


def fuse(node: Node) -> tuple[Node, str] | None:
    """Neighbouring maps and filters as one operator: one pass over the rows."""
    below = node.inputs[0] if node.inputs else None
    fusible = ("map", "filter")
    if below is None or node.op not in fusible or below.op not in (*fusible, "fused"):
        return None
    if in_segment(node) != in_segment(below):
        return None
    parts = below.params["parts"] if below.op == "fused" else (replace(below, inputs=()),)
    name = f"{below.name}+{node.name}"
    fused = Node(
        "fused",
        {"parts": (*parts, replace(node, inputs=()))},
        below.inputs,
        name,
        replace(
            node.attributes,
            deterministic=node.attributes.deterministic and below.attributes.deterministic,
            random=node.attributes.random or below.attributes.random,
        ),
    )
    return fused, f"{below.name} and {node.name} are one pass"


def tokenize_together(node: Node) -> tuple[Node, str] | None:
    """Many texts in one call of the tokenizer."""
    if node.op != "tokenize" or node.params["together"] != 1 or not in_segment(node):
        return None
    return (
        replace(node, params={**node.params, "together": CHUNK}),
        f"{node.name} takes {CHUNK} texts at a time",
    )


def _prefetched(plan: Plan, notes: list[Rewritten]) -> Plan:
    """Packed rows and batches are made while the consumer works on the last ones."""
    if OPERATORS[plan.root.op].kind != STREAM or in_segment(plan.root):
        return plan
    if plan.root.op == "prefetch":
        return plan
    notes.append(Rewritten("prefetch", f"{READY} elements of {plan.root.name} are held ready"))
    return plan.prefetch(READY)


def writes(node: Node) -> set[str] | None:
    """The fields that an operator may change, or None if that is not known, or if it is not one
    that a filter may pass."""
    if node.op == "map":
        declared = node.params["writes"]
        return None if declared is None else set(declared)
    if node.op == "chat_template":
        return {"text", "spans"}
    if node.op == "tokenize":
        return {node.params["text"], "spans", "input_ids", "loss_mask"}
    return None
