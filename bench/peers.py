"""The same load on this server and on others: ``python -m deltaserve.bench.peers``.

One machine, one run: the same 30 M-parameter models, prompts and official ``openai`` client. In
each round every server in turn is started, warmed up with one request per model and a whole load,
loaded again with prompts that it has not seen, and stopped, so that what the machine does meanwhile
meets all of them. 32 requests of 64 generated tokens at once, greedy, over one model and over eight
fine-tunes. The median round counts; ratios are those of the same round.

DeltaServe gets deltas; the others get the full checkpoints. "Whole models swapped" is DeltaServe
with room for one uncompressed fine-tune at a time, the others in host memory: the baseline of the
DeltaZip paper. LoRA adapters of the same base are compared with PEFT's ``generate``, which mixes
them in a batch; it runs without any server and is favoured by that. ``--url NAME=URL`` adds any
server with OpenAI's API that runs already.

What fails, or is not answered within ``--limit`` seconds, is shown as failed by its kind, not as
slow: it has no ratio, and is not tried in later rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from deltaserve.bench.peer_models import build
from deltaserve.bench.peer_servers import Load, Peer, StartError, peers, running_peer
from deltaserve.bench.peer_table import README, RESULTS, update_readme
from deltaserve.bench.record import record

WARM_SECONDS = 240.0
"""For the warm-up of all models together."""


@dataclass(frozen=True)
class Measured:
    """The median of the loads on one server. Times in seconds; tokens are those of requests that
    succeeded."""

    server: str
    num_models: int
    requests: int
    succeeded: int
    failures: dict[str, int]
    seconds: float
    tokens: int
    fastest: float
    slowest: float
    rounds: list[float]
    """Tokens/s of each."""
    against: str
    ratio: list[float]
    """Tokens/s of ``against`` to its own, round by round; empty where something failed."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def summary(
    server: str, num_models: int, loads: Sequence[Load], against: str, others: Sequence[Load]
) -> Measured:
    """loads, others: of this server and of the one that it is compared with, round by round."""
    times = sorted(each.seconds for each in loads)
    median = min(loads, key=lambda each: abs(each.seconds - statistics.median(times)))
    # A failure ends the rounds of a server: it is the last of its loads, and what is told of it.
    shown = median if loads[-1].complete else loads[-1]
    pairs = list(zip(others, loads, strict=False))
    comparable = all(one.complete and other.complete for one, other in pairs)
    return Measured(
        server,
        num_models,
        requests=len(shown.answers),
        succeeded=sum(isinstance(answer, int) for answer in shown.answers),
        failures=dict(Counter(answer for answer in shown.answers if isinstance(answer, str))),
        seconds=shown.seconds,
        tokens=shown.tokens,
        fastest=times[0],
        slowest=times[-1],
        rounds=[each.tokens / each.seconds for each in loads],
        against=against,
        ratio=[_ratio_of(*pair) for pair in pairs] if comparable and server != against else [],
    )


def _ratio_of(one: Load, other: Load) -> float:
    return (one.tokens / one.seconds) / (other.tokens / other.seconds)


@dataclass(frozen=True)
class Sizes:
    """Of the loads. limit: seconds that one may take."""

    requests: int
    tokens: int
    limit: float


def measure(servers: Sequence[Peer], sizes: Sizes, rounds: int, logs: Path) -> list[Measured]:
    """Every server over one model and over all, in ``rounds`` rounds."""
    loads: dict[tuple[str, int], list[Load]] = {}
    for number in range(rounds):
        for peer in servers:
            for count in dict.fromkeys((1, len(peer.models))):
                found = loads.setdefault((peer.name, count), [])
                if found and not found[-1].complete:
                    continue
                what = f"round {number + 1}, {peer.name}, {count} model(s) ..."
                print(what, file=sys.stderr, flush=True)
                found.append(_one(peer, count, sizes, number, logs))
    against = {peer.name: peer.against for peer in servers}
    return [
        summary(name, count, found, against[name], loads[against[name], count])
        for (name, count), found in loads.items()
    ]


def _one(peer: Peer, count: int, sizes: Sizes, number: int, logs: Path) -> Load:
    """A fresh process for each load: a server that broke must not spoil the next one."""
    log = logs / f"{peer.name.replace(' ', '_')}-{count}.log"
    models = peer.models[:count]
    try:
        with peer.start(log) as server:
            deadline = time.monotonic() + WARM_SECONDS
            for i, model in enumerate(models):
                left = max(1.0, deadline - time.monotonic())
                warm = server.load([model], 1, 4, 10_000 + i, left)
                if not warm.complete:
                    return _failed(f"warm-up: {warm.answers[0]}", sizes)
            server.load(models, sizes.requests, sizes.tokens, 20_000, WARM_SECONDS)
            first = number * sizes.requests
            return server.load(models, sizes.requests, sizes.tokens, first, sizes.limit)
    except StartError as error:
        return _failed(str(error), sizes)


def _failed(kind: str, sizes: Sizes) -> Load:
    return Load([kind] * sizes.requests, sizes.limit)


def show(results: Sequence[Measured]) -> None:
    print(
        f"{'server':<42}{'models':>7}{'answered':>10}"
        f"{'seconds':>9}{'from - to':>14}{'tokens/s':>10}  compared"
    )
    for r in results:
        share = f"{r.succeeded}/{r.requests}"
        numbers = f"{'-':>9}{'-':>14}{'-':>10}"  # of what failed there is no time
        if not r.failures:
            spread = f"{r.fastest:.1f} - {r.slowest:.1f}"
            numbers = f"{r.seconds:>9.1f}{spread:>14}{r.tokens_per_second:>10.1f}"
        print(f"{r.server:<42}{r.num_models:>7}{share:>10}{numbers}  {_ratio(r)}")
        for kind, count in r.failures.items():
            print(f"    {count} x {kind}")


def _ratio(r: Measured) -> str:
    if not r.ratio:
        return ""
    middle = statistics.median(r.ratio)
    return f"{r.against} is {middle:.2f}x ({min(r.ratio):.2f} - {max(r.ratio):.2f})"


def main() -> int:
    """Exit code: 1 when DeltaServe itself failed a request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, help="keep models and logs here (default: temporary)")
    parser.add_argument("--models", type=int, default=8, help="fine-tunes (default 8)")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument(
        "--limit", type=float, default=120.0, help="seconds that a load may take (default 120)"
    )
    parser.add_argument("--url", action="append", default=[], help="NAME=URL; repeat it")
    parser.add_argument("--out", type=Path, help="write a JSON file as well")
    parser.add_argument(
        "--record", action="store_true", help=f"write {RESULTS} and the table of {README} from it"
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # servers end with it, as by Ctrl-C
    with contextlib.ExitStack() as stack:
        root = args.dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root.mkdir(parents=True, exist_ok=True)
        added = [running_peer(text, args.models) for text in args.url]
        servers = peers(build(root, args.models)) + added
        sizes = Sizes(args.requests, args.tokens, args.limit)
        results = measure(servers, sizes, args.rounds, root)
    show(results)
    if out := RESULTS if args.record else args.out:
        command = (
            f"python -m deltaserve.bench.peers --models {args.models} "
            f"--requests {args.requests} --tokens {args.tokens} --rounds {args.rounds}"
        )
        rows = [asdict(r) | {"tokens_per_second": r.tokens_per_second} for r in results]
        record(out, command, rows)
    if args.record:
        update_readme()
    return int(any(r.failures for r in results if r.server.startswith("deltaserve")))


if __name__ == "__main__":
    sys.exit(main())
