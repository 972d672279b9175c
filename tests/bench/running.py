"""A load test of a fake server, as one call."""

from __future__ import annotations

import json
from typing import Any

from deltaserve.bench.load.execute import Target, measure
from deltaserve.bench.load.result import document
from deltaserve.bench.load.text import render
from deltaserve.bench.load.workload import make_workload
from tests.bench.fake_server import Behaviour, fake_server


def run(behaviour: Behaviour, *, key: str = "", **content: Any) -> dict[str, Any]:
    with fake_server(behaviour) as server:
        workload = make_workload(content)
        measured = measure(Target(server.url, key), workload, lambda name, run: None)
    result = document(measured, detailed=True)
    json.dumps(result, allow_nan=False)
    render(result)
    return result


def steady(rate: float, requests: int) -> dict[str, Any]:
    return {"arrivals": {"kind": "constant", "rate": rate}, "requests": requests}
