"""Running a plan: an iterator whose state can be saved at any element."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from deltaserve.errors import PipelineError
from deltaserve.pipeline.adapter import Executor, LocalExecutor, Segment
from deltaserve.pipeline.cache import settings_of
from deltaserve.pipeline.compiling import Compiler
from deltaserve.pipeline.node import Node
from deltaserve.pipeline.plan import Plan
from deltaserve.pipeline.rewrites import rewrite
from deltaserve.pipeline.rows import Row
from deltaserve.pipeline.segments import Probe, in_segment

FORMAT = 1
# Operators that change when rows are made, not which.
TRANSPARENT = ("prefetch", "cache")


def prepare(plan: Plan, *, rewrites: bool = True) -> Plan:
    """The plan as it will run: checked, rewritten, every operator with a name of its own.

    Raises PipelineError: an operator cannot work on what it would get.
    """
    named = plan.named()
    named.check()
    return rewrite(named)[0].named() if rewrites else named


def open_pipeline(
    plan: Plan,
    *,
    threads: int = 0,
    processes: int = 0,
    executor: Executor | None = None,
    probe: Probe | None = None,
    cache: Any = None,
    rewrites: bool = True,
) -> Pipeline:
    """Begin to iterate over a plan.

    threads, processes: that work on rows, per segment; the stream is the same for every number,
    none included. executor: who does it instead, for example workers elsewhere. probe: measures
    every operator. cache: where the plan's caches are, a directory or a CacheSettings; by
    default the user's cache folder.

    Raises PipelineError: the plan, a source, a tokenizer or a function is wrong.
    """
    prepared = prepare(plan, rewrites=rewrites)
    executor = executor or LocalExecutor(threads, processes)
    settings = settings_of(cache)
    return Pipeline(prepared, stream_fingerprint(plan), executor, probe, settings)


class Pipeline:
    """An iterator over the elements of a prepared plan: mappings from field to value.

    fingerprint: of the plan before it was prepared, for states.

    An element that could not be made (a broken row, Ctrl-C) is tried again by the next call, and
    states are those before it: nothing is passed over.

    A context manager; close it, or its threads and processes stay until it is collected.
    """

    def __init__(
        self, plan: Plan, fingerprint: str, executor: Executor, probe: Probe | None, cache: Any
    ) -> None:
        self.plan, self.executor, self.probe = plan, executor, probe
        self._fingerprint, self._shape = fingerprint, stream_shape(plan.root)
        self._compiler = Compiler(executor, probe, cache)
        self._stream = self._compiler.build(plan)
        self._closed = False
        # Of the stream, before the element that could not be made.
        self._before: Any = None
        # Elements given out since the very beginning, over all interruptions.
        self.position = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        return self.next_row().value

    def next_row(self) -> Row:
        """The next element with its key: (source, epoch, row, ...), of its first row if it is
        made of several. Raises StopIteration, PipelineError."""
        if self._closed:
            raise PipelineError("this pipeline is closed")
        if self._before is not None:
            self._stream.set_state(self._before)
            self._before = None
        before = self._stream.get_state()
        try:
            row = self._stream.next()
        except StopIteration:
            raise
        except BaseException:
            # Operators may have taken rows for it, which nobody would get.
            self._before = before
            raise
        self.position += 1
        return row

    @property
    def skipped(self) -> int:
        """Broken rows that sources passed over (on_error="skip")."""
        return sum(stream.skipped for stream in self._compiler.streams.values())

    @property
    def segments(self) -> list[Segment]:
        return [stream.segment for _, stream in sorted(self._compiler.streams.items())]

    def get_state(self) -> dict[str, Any]:
        """Where the iterator stands: after the last element that it gave. Plain values (JSON),
        a few hundred bytes."""
        return {
            "format": FORMAT,
            "plan": self._fingerprint,
            "shape": self._shape,
            "rows": self._rows(),
            "position": self.position,
            "stream": self._stream.get_state() if self._before is None else self._before,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on where ``get_state`` was called, bit for bit, with any number of workers.

        Raises PipelineError: the state is of another plan, or its sources have changed.
        """
        require_state(state, self._fingerprint, self._shape, self._rows())
        try:
            self._stream.set_state(state["stream"])
        except (KeyError, TypeError, ValueError, AttributeError) as cause:
            raise PipelineError(f"the saved state is damaged: {cause!r}") from cause
        self.position, self._before = state["position"], None

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._stream.close()
            self.executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _rows(self) -> list[int]:
        return [len(each) for part in self.segments for each in part.work.sources()]


def stream_fingerprint(plan: Plan) -> str:
    """A hash of all that decides the stream, seeds included."""
    return plan.without(TRANSPARENT).root.fingerprint(seeds=True)


def stream_shape(node: Node) -> str:
    """The operators whose states nest in a pipeline's state; rewrites may change it."""
    if in_segment(node):
        return "rows"
    below = " ".join(stream_shape(each) for each in node.inputs)
    return below if node.op in ("prefetch", "batch") else f"{node.op}({below})"


def require_state(state: Mapping[str, Any], plan: str, shape: str, rows: list[int]) -> None:
    """Raises PipelineError unless a state was saved by this plan over these sources."""
    if not isinstance(state, Mapping) or "format" not in state:
        raise PipelineError("this is not a saved state of a pipeline")
    if state["format"] != FORMAT:
        raise PipelineError(
            f"the state has format {state['format']}, and this version reads {FORMAT}: "
            "resume with the version that saved it"
        )
    if missing := {"plan", "shape", "rows", "position", "stream"} - set(state):
        raise PipelineError(f"the saved state is damaged: it lacks {', '.join(sorted(missing))}")
    if state["plan"] != plan:
        raise PipelineError(
            f"the state was saved by another plan ({state['plan'][:12]}, and this one is "
            f"{plan[:12]}): operators, parameters, seeds or code differ"
        )
    if state["shape"] != shape:
        raise PipelineError(
            f"the state was saved of {state['shape']}, and the plan runs as {shape}: open it "
            "with the setting of rewrites that it was saved with"
        )
    if list(state["rows"]) != rows:
        raise PipelineError(
            f"the sources have changed since the state was saved: they had {state['rows']} rows "
            f"and have {rows}"
        )
