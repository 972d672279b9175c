"""The process at the other end of ``processes.Worker``."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

from deltaserve.select.backends.processes import load_instance
from deltaserve.select.graph import Graph
from deltaserve.select.state import State


def work(task: tuple[Any, ...], graph: Graph, state: State) -> Any:
    if task[0] == "step":
        _, step, number, arguments = task
        return step(graph.shards[number], state, *arguments)
    _, rows, solve, part, arguments = task
    return solve([rows(shard, state, part) for shard in graph.shards], *arguments)


def main(directory: Path, path: Path) -> None:
    """Answer tasks from standard input until it ends, which it does with the coordinator."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # What a library prints must not get between the answers.
    graph = Graph.open(path)
    state = State.map(load_instance(directory), directory)
    while True:
        try:
            task = pickle.load(sys.stdin.buffer)
        except (EOFError, KeyboardInterrupt):
            return
        try:
            answer = True, work(task, graph, state)
        except Exception as error:
            answer = False, error
        pickle.dump(answer, output, pickle.HIGHEST_PROTOCOL)
        output.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
