"""Traces made by hand, with known service times."""

from __future__ import annotations

from deltaserve.pipeline.trace import OperatorFigures, Trace

MS = 1e6


def chain(*operators, wall_ms=1000.0, cores=4, processes=0, elements=100):
    """A chain from the source; each operator is a dict of figures per element of the root:
    name, cpu and wait in ms, ratio (elements made per root element)."""
    found, before = {}, ()
    for each in operators:
        made = round(elements * each.get("ratio", 1))
        cpu, wait = each.get("cpu", 0.0), each.get("wait", 0.0)
        found[each["name"]] = OperatorFigures(
            each["name"],
            each.get("op", "map"),
            before,
            stage=each.get("stage", each["name"]),
            serial=each.get("serial", False),
            parallelism=each.get("threads", 1),
            made=made,
            taken=found[before[0]].made if before else 0,
            timed=made,
            cpu_ns=cpu * MS * elements,
            wall_ns=(cpu + wait + each.get("queued", 0.0)) * MS * elements,
            queued_ns=each.get("queued", 0.0) * MS * elements,
            bytes=each.get("bytes", 0.0) * made,
            read_bytes=each.get("read", 0.0) * elements,
        )
        before = (each["name"],)
    root = operators[-1]["name"]
    return Trace(found, root, wall_ms * MS, 0.0, 0.0, elements, cores=cores, processes=processes)
