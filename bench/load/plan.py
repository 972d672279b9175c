"""The requests of a workload, in order; the same for the same seed, whatever the server does."""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deltaserve.bench.load.arrivals import Constant, Trace
from deltaserve.bench.load.lengths import ShareGpt
from deltaserve.bench.load.popularity import TraceModels
from deltaserve.bench.load.prompts import Renderer, Segment
from deltaserve.bench.load.traces import Row, read_trace
from deltaserve.bench.load.workload import Prefix, Tenant, Workload, default_lengths
from deltaserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Turn:
    """One question: a text or token ids, and how many tokens to generate."""

    prompt: str | list[int]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Session:
    """One arrival: a question, or several of one conversation.

    time: seconds from the start; meaningless in a closed loop. think: seconds between an answer
    and the next question, or the next session of the same user of a closed loop.
    """

    tenant: str
    model: str
    time: float
    turns: tuple[Turn, ...]
    think: float = 0.0
    cancel_after: float | None = None
    probe: bool = False


@dataclass(frozen=True)
class Served:
    """A model of the server; parent is the base's name, None for a base."""

    name: str
    parent: str | None = None


def sessions(
    tenant: Tenant, workload: Workload, served: Sequence[Served], renderer: Renderer
) -> Iterator[Session]:
    """The tenant's sessions. Raises ConfigError for models that the server lacks."""
    models = resolve_models(tenant, served)
    rngs = {part: _rng(workload, tenant, part) for part in ("arrivals", "models", "cancel")}
    choose = _chooser(tenant, models, rngs["models"])
    questions = _questions(tenant, workload, renderer)
    cancel = tenant.cancel
    rows = itertools.islice(tenant.arrivals.rows(rngs["arrivals"]), tenant.requests)
    for row in rows:
        if tenant.duration is not None and row.time >= tenant.duration:
            return
        given_up = cancel is not None and rngs["cancel"].random() < cancel.fraction
        yield Session(
            tenant=tenant.name,
            model=choose(row),
            time=tenant.start + row.time,
            turns=tuple(questions(row) for _ in range(tenant.turns.count)),
            think=tenant.turns.think,
            cancel_after=cancel.after if cancel is not None and given_up else None,
        )


def probe_sessions(
    workload: Workload, served: Sequence[Served], renderer: Renderer
) -> Iterator[Session]:
    """Probes as long as any tenant sends."""
    probes, first = workload.probes, workload.tenants[0]
    assert probes is not None
    if probes.model and probes.model not in {model.name for model in served}:
        raise ConfigError(f"probes.model: the server has no model {probes.model!r}")
    model = probes.model or resolve_models(first, served)[0]
    for row in Constant(probes.rate).rows(np.random.default_rng(0)):
        prompt = renderer.prompt([(f"probe {row.time}", probes.prompt)])
        yield Session(first.name, model, row.time, (Turn(prompt, probes.output),), probe=True)


def check_inputs(workload: Workload, served: Mapping[str, Sequence[Served]]) -> None:
    """Make the first request of each tenant, and the first probe, so that what is wrong with a
    file or a name is found before anybody is asked. served: of each tenant. Raises ConfigError."""
    renderer = Renderer(token_ids=workload.token_ids)
    for tenant in workload.tenants:
        next(sessions(tenant, workload, served[tenant.name], renderer), None)
    if workload.probes is not None:
        next(probe_sessions(workload, served[workload.tenants[0].name], renderer))


def resolve_models(tenant: Tenant, served: Sequence[Served]) -> tuple[str, ...]:
    """Names of the models that the tenant asks, most popular first; those that it names are
    believed where the server lists none. Raises ConfigError."""
    names = tuple(model.name for model in served)
    deltas = tuple(model.name for model in served if model.parent is not None)
    if isinstance(tenant.models, tuple):
        if names and (missing := [name for name in tenant.models if name not in names]):
            raise ConfigError(f"tenant {tenant.name!r}: the server has no model {missing[0]!r}")
        return tenant.models
    if isinstance(tenant.models, int):
        found = deltas or names
        if len(found) < tenant.models:
            raise ConfigError(
                f"tenant {tenant.name!r} asks for {tenant.models} models, "
                f"the server has {len(found)}"
            )
        return found[: tenant.models]
    found = names if tenant.models == "all" else deltas
    if not names:
        raise ConfigError(f"tenant {tenant.name!r}: the server lists no models, so name them")
    if not found:
        raise ConfigError(f"tenant {tenant.name!r} asks for deltas, the server has none")
    return found


def _chooser(
    tenant: Tenant, models: tuple[str, ...], rng: np.random.Generator
) -> Callable[[Row], str]:
    if isinstance(tenant.popularity, TraceModels):
        assert isinstance(tenant.arrivals, Trace)
        counts = Counter(row.model for row in read_trace(Path(tenant.arrivals.path)))
        names = [name for name, _ in counts.most_common()]
        if None in names:
            raise ConfigError(f"{tenant.arrivals.path}: popularity trace, but it names no models")
        rank = {name: models[i % len(models)] for i, name in enumerate(names)}
        return lambda row: rank[row.model]
    choose = tenant.popularity.chooser(rng, len(models))
    return lambda row: models[choose(row.time)]


def _questions(tenant: Tenant, workload: Workload, renderer: Renderer) -> Callable[[Row], Turn]:
    """Makes the next question of the tenant; each has a text of its own."""
    lengths, outputs = default_lengths(tenant)
    rng = _rng(workload, tenant, "lengths")
    output = outputs.draws(_rng(workload, tenant, "output"))
    prefix = _prefixes(tenant.prefix, workload, tenant)
    number = itertools.count()
    seed = f"{workload.seed} {tenant.name}"
    if isinstance(lengths, ShareGpt):
        pairs = lengths.pairs(rng)

        def quote(row: Row) -> Turn:
            question, length = next(pairs)
            begin = renderer.prompt([group]) if (group := next(prefix)) else ""
            text = f"{begin} {question}" if begin else question
            return Turn(text, next(output) if tenant.output is not None else length)

        return quote
    draws = lengths.draws(rng)

    def ask(row: Row) -> Turn:
        own = f"{seed} {next(number)}"
        recorded = row.prompt_tokens if tenant.prompt is None else 0
        body = _blocks(row, seed, own) if recorded else [(own, next(draws))]
        generated = row.output_tokens if tenant.output is None else 0
        segments = [group, *body] if (group := next(prefix)) else body
        return Turn(renderer.prompt(segments), generated or next(output))

    return ask


def _blocks(row: Row, shared: str, own: str) -> list[Segment]:
    """The recorded prompt: its blocks, cut or filled to its length."""
    blocks = [(f"{shared} block {block}", row.block_tokens) for block in row.blocks]
    whole = blocks[: row.prompt_tokens // row.block_tokens]
    rest = row.prompt_tokens - len(whole) * row.block_tokens
    # The last block is cut; where the recording names fewer blocks than tokens, text of its own.
    last = blocks[len(whole)][0] if len(whole) < len(blocks) else own
    return [*whole, (last, rest)] if rest else whole


def _prefixes(
    prefix: Prefix | None, workload: Workload, tenant: Tenant
) -> Iterator[Segment | None]:
    rng = _rng(workload, tenant, "prefix")
    while True:
        if prefix is None:
            yield None
        else:
            group = int(rng.integers(prefix.groups))
            yield (f"{workload.seed} {tenant.name} prefix {group}", prefix.tokens)


def _rng(workload: Workload, tenant: Tenant, part: str) -> np.random.Generator:
    """Each part draws from its own stream: another rate must not change the lengths."""
    return np.random.default_rng((workload.seed, zlib.crc32(f"{tenant.name}/{part}".encode())))
