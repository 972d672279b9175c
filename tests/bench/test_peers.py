"""The comparison with other servers: what is counted, what is no number, and README's table."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from deltaserve.bench.peer_servers import LATE, NOTHING, Load, Peer, StartError, running_peer
from deltaserve.bench.peer_table import README, RESULTS, told, with_table
from deltaserve.bench.peers import Sizes, measure
from tests.bench.fake_server import Behaviour, fake_server

SIZES = Sizes(requests=4, tokens=10, limit=5.0)


class Fake:
    """Answers in ``seconds``; the loads (not warm-ups) that ``broken`` names fail."""

    def __init__(self, seconds: Sequence[float], broken: Sequence[int] = ()) -> None:
        self.seconds, self.broken, self.loads = seconds, broken, 0
        self.prompts: list[int] = []

    def load(
        self, models: Sequence[str], requests: int, tokens: int, first: int, limit: float
    ) -> Load:
        if first >= 10_000:
            return Load([tokens] * requests, 0.1)
        number, self.loads = self.loads, self.loads + 1
        self.prompts.append(first)
        if number in self.broken:
            return Load([tokens, "APIConnectionError"] * (requests // 2), 1.0)
        return Load([tokens] * requests, self.seconds[number])

    def peer(self, name: str, models: int = 1) -> Peer:
        names = tuple(f"m{i}" for i in range(models))
        return Peer(name, names, "ours", lambda log: contextlib.nullcontext(self))


def test_rounds_are_interleaved_and_ratios_are_of_the_same_round(tmp_path):
    ours, theirs = Fake([1.0, 2.0, 1.0]), Fake([2.0, 6.0, 4.0])
    mine, other = measure([ours.peer("ours"), theirs.peer("other")], SIZES, 3, tmp_path)
    assert other.ratio == pytest.approx([2, 3, 4])
    assert (mine.ratio, other.against) == ([], "ours")
    assert other.tokens_per_second == pytest.approx(10)  # the median round: 40 tokens in 4 s
    assert (other.fastest, other.slowest) == (2.0, 6.0)
    assert ours.prompts == theirs.prompts == [0, 4, 8]  # fresh ones for each round, equal for all


def test_a_failure_is_told_by_kind_has_no_ratio_and_is_not_repeated(tmp_path):
    ours, theirs = Fake([1.0] * 3), Fake([1.0] * 3, broken=[1])
    _, other = measure([ours.peer("ours"), theirs.peer("other")], SIZES, 3, tmp_path)
    assert (ours.loads, theirs.loads) == (3, 2)
    assert other.failures == {"APIConnectionError": 2}
    assert (other.succeeded, other.requests, other.ratio) == (2, 4, [])


def test_a_server_that_does_not_start_is_a_failure_of_its_own(tmp_path):
    @contextlib.contextmanager
    def start(log: Path) -> Iterator[Fake]:
        raise StartError("ended at its start")
        yield

    ours = Fake([1.0])
    servers = [ours.peer("ours"), Peer("other", ("m",), "ours", start)]
    mine, other = measure(servers, SIZES, 1, tmp_path)
    assert other.failures == {"ended at its start": 4}
    assert mine.succeeded == 4


@pytest.mark.parametrize(
    ("behaviour", "kinds"),
    [
        (Behaviour(), {10}),
        (Behaviour(failure=lambda n, body, key: "500"), {"InternalServerError"}),
        (Behaviour(failure=lambda n, body, key: "empty"), {NOTHING}),
        (Behaviour(first=lambda body, key: 30.0), {LATE}),
    ],
    ids=["good", "error", "empty", "late"],
)
def test_a_running_server_is_asked_by_its_url(tmp_path, behaviour, kinds):
    with fake_server(behaviour) as server:
        peer = running_peer(f"other={server.url}/v1/", 2)
        assert peer.models == ("alpha", "beta")
        with peer.start(tmp_path) as running:
            found = running.load(peer.models, 4, 10, 0, 1.0)
    assert set(found.answers) == kinds
    assert sorted(body["model"] for body in behaviour.seen) == ["alpha"] * 2 + ["beta"] * 2


def test_a_url_without_enough_models_is_refused():
    with pytest.raises(SystemExit, match="write NAME=URL"):
        running_peer("http://127.0.0.1:9", 1)
    with pytest.raises(SystemExit, match="no list of models"):
        running_peer("other=http://127.0.0.1:9", 1)
    with fake_server(Behaviour()) as server, pytest.raises(SystemExit, match="serves 3 models, 8"):
        running_peer(f"other={server.url}", 8)


def test_the_table_of_the_readme_is_that_of_the_record():
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    text = README.read_text(encoding="utf-8")
    assert with_table(text, content) == text


def test_the_table_tells_failures_and_what_was_not_measured():
    def result(server: str, models: int, **changes: object) -> dict[str, object]:
        found = {"server": server, "num_models": models, "requests": 4, "succeeded": 4}
        found |= {"failures": {}, "tokens_per_second": 123.4, "ratio": [], "against": "ours"}
        return found | changes

    environment = {"date": "2026-01-01", "cores": 2, "cpu": "X", "torch": "1", "transformers": "2"}
    results = [
        result("ours", 1),
        result("ours", 8),
        result("other", 1, ratio=[2.0, 4.0, 3.0]),
        result("third", 8, failures={"APIConnectionError": 3}, succeeded=1),
    ]
    content = {"command": "run", "environment": environment, "results": results}
    lines = told(content).splitlines()
    assert lines[-3] == "| ours | 123 |  | 123 |  |"
    assert lines[-2] == "| other | 123 | ours is 3.00x (2.00 - 4.00) | not measured |  |"
    assert "none: 1 of 4 answered (3 x APIConnectionError)" in lines[-1]
