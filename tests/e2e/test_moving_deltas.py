"""More deltas than memory, versions that change under load, disks that fail: on a real model."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from deltaserve.compress.run import compress
from deltaserve.engine.core import Engine
from deltaserve.engine.loader import THREADS
from deltaserve.engine.projections import part_of
from deltaserve.engine.types import EngineRequest, FinishReason, TokenEvent
from deltaserve.errors import BaseMismatchError, ConfigError, UnknownModelError
from tests.engine_helpers import BASE, greedy, make_engine, run
from tests.families import VOCAB, make_base, make_fine_tune

PROMPT = [7, 9, 11, 40, 41]
TOKENS = 6
COUNT = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    root = tmp_path_factory.mktemp("residency")
    base = make_base("llama", root / "base")
    deltas = [root / f"delta{i}" for i in range(COUNT)]
    for i, delta in enumerate(deltas):
        compress(base, make_fine_tune(base, root / f"tune{i}", seed=i + 1), delta)
    return base, deltas


@pytest.fixture(scope="module")
def answers(models: tuple[Path, list[Path]]) -> list[list[int]]:
    """What each delta answers when all are in memory."""
    base, deltas = models
    engine = make_engine(base, {f"m{i}": delta for i, delta in enumerate(deltas)})
    tokens = run(engine, [ask(f"m{i}") for i in range(COUNT)]).tokens
    found = [tokens[f"m{i}"] for i in range(COUNT)]
    assert len({tuple(answer) for answer in found}) == COUNT
    return found


@pytest.fixture
def engine(models: tuple[Path, list[Path]]) -> Iterator[Engine]:
    """Serves the first delta as ``m0``."""
    engine = make_engine(models[0], {"m0": models[1][0]})
    yield engine
    engine.close()


def ask(model: str, request_id: str = "", max_tokens: int = TOKENS) -> EngineRequest:
    return greedy(request_id or model, model, PROMPT, max_tokens)


def drive(engine: Engine, until: Callable[[], bool] | None = None) -> dict[str, list[TokenEvent]]:
    """Step until nothing is left to do, or until the condition holds."""
    events: dict[str, list[TokenEvent]] = {}
    deadline = time.monotonic() + 60
    while not until() if until else engine.has_work():
        assert time.monotonic() < deadline, "the engine does not get on"
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
    return events


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def info(engine: Engine, name: str):
    return next(model for model in engine.models() if model.name == name)


def one_delta_bytes(engine: Engine) -> int:
    return engine.residency.current("m0").needs.device_bytes


def test_predicted_bytes_are_those_of_the_operands(engine: Engine) -> None:
    version = engine.residency.current("m0")
    assert version.operands is not None
    assert version.operands.num_bytes == version.needs.device_bytes == version.reserved
    assert version.image is not None
    assert sum(t.nbytes for t in version.image.tensors) == version.needs.image_bytes


def test_twelve_deltas_with_room_for_three_answer_as_if_all_were_resident(
    models: tuple[Path, list[Path]], answers: list[list[int]], engine: Engine
) -> None:
    base, deltas = models
    room = 3 * one_delta_bytes(engine)
    sources = {f"m{i}": delta for i, delta in enumerate(deltas)}
    crowded = make_engine(base, sources, delta_memory_bytes=room, host_memory_bytes=room // 2)
    trace = run(crowded, [ask(f"m{i}") for i in range(COUNT)])
    assert [trace.tokens[f"m{i}"] for i in range(COUNT)] == answers
    stats = crowded.stats().residency
    assert stats.evictions >= COUNT - 3
    assert stats.loads >= COUNT
    assert 0 < stats.device_bytes <= room
    assert stats.host_bytes <= room // 2
    crowded.close()


def test_a_hot_swap_keeps_old_requests_on_the_old_version(
    models: tuple[Path, list[Path]], answers: list[list[int]], engine: Engine
) -> None:
    engine.add(ask("m0", "old", 100))
    first = engine.step()
    revision = engine.models_revision
    assert engine.register("m0", str(models[1][1])) == 2
    engine.register("first", str(models[1][0]))
    assert info(engine, "m0").version == 1
    events = drive(engine, until=lambda: info(engine, "m0").version == 2)
    assert info(engine, "m0").state == "ready"
    assert engine.models_revision > revision
    engine.add(ask("m0", "new"))
    for name, more in drive(engine).items():
        events.setdefault(name, []).extend(more)
    old = tokens_of(first + events["old"])
    assert old == run(engine, [ask("first", "alone", 100)]).tokens["alone"]
    assert old[:TOKENS] == answers[0]
    assert tokens_of(events["new"]) == answers[1]
    engine.rollback("m0")
    engine.add(ask("m0", "back"))
    assert tokens_of(drive(engine)["back"]) == answers[0]
    assert info(engine, "m0").version == 1
    with pytest.raises(ConfigError, match="no earlier version"):
        engine.rollback("m0")


def copy_with(source: Path, target: Path, change: Callable[[bytearray], object]) -> Path:
    shutil.copytree(source, target)
    data = bytearray((target / "delta.safetensors").read_bytes())
    change(data)
    (target / "delta.safetensors").write_bytes(data)
    return target


def flip_last_byte(data: bytearray) -> None:
    data[-1] ^= 1


def test_a_corrupt_delta_fails_its_own_requests_only(
    models: tuple[Path, list[Path]], answers: list[list[int]], engine: Engine, tmp_path: Path
) -> None:
    broken = copy_with(models[1][1], tmp_path / "broken", flip_last_byte)
    engine.register("broken", str(broken))
    engine.add(ask("broken"))
    engine.add(ask("m0"))
    events = drive(engine)
    assert events["broken"][-1].finish_reason is FinishReason.ERROR
    assert "digest" in (events["broken"][-1].error or "")
    assert tokens_of(events["m0"]) == answers[0]
    assert info(engine, "broken").state == "error"
    engine.add(ask("broken", "later"))
    assert "digest" in (drive(engine)["later"][-1].error or "")
    assert engine.stats().kv_blocks_used == 0
    engine.register("broken", str(models[1][1]))
    engine.add(ask("broken", "mended"))
    assert tokens_of(drive(engine)["mended"]) == answers[1]


def test_a_failed_new_version_leaves_the_old_one_serving(
    models: tuple[Path, list[Path]], answers: list[list[int]], engine: Engine, tmp_path: Path
) -> None:
    broken = copy_with(models[1][1], tmp_path / "broken", flip_last_byte)
    engine.register("m0", str(broken))
    drive(engine)
    shown = info(engine, "m0")
    assert (shown.version, shown.state) == (1, "ready")
    assert "digest" in (shown.error or "")
    engine.add(ask("m0"))
    assert tokens_of(drive(engine)["m0"]) == answers[0]


@pytest.mark.parametrize("damage", ["missing", "truncated", "replaced"])
def test_files_that_change_after_registration_are_noticed(
    models: tuple[Path, list[Path]], engine: Engine, tmp_path: Path, damage: str
) -> None:
    delta = tmp_path / "delta"
    shutil.copytree(models[1][1], delta)
    engine.residency.register("late", str(delta), load=False)
    weights = delta / "delta.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "truncated":
        with weights.open("r+b") as file:
            file.truncate(weights.stat().st_size // 2)
    else:
        shutil.copytree(models[1][2], delta, dirs_exist_ok=True)
    engine.add(ask("late"))
    event = drive(engine)["late"][-1]
    assert event.finish_reason is FinishReason.ERROR
    words = {"missing": "is missing", "truncated": "outside the file", "replaced": "another delta"}
    assert words[damage] in (event.error or "")


def test_a_delta_in_memory_does_not_need_its_files(
    models: tuple[Path, list[Path]], answers: list[list[int]], engine: Engine, tmp_path: Path
) -> None:
    delta = tmp_path / "delta"
    shutil.copytree(models[1][1], delta)
    engine.register("kept", str(delta))
    drive(engine)
    with (delta / "delta.safetensors").open("r+b") as file:
        file.truncate(100)
    engine.add(ask("kept"))
    assert tokens_of(drive(engine)["kept"]) == answers[1]


def test_a_slow_disk_holds_nobody_up(
    models: tuple[Path, list[Path]], answers: list[list[int]], engine: Engine
) -> None:
    opened, go_on = threading.Event(), threading.Event()

    def opener(path: Path) -> BinaryIO:
        opened.set()
        assert go_on.wait(60)
        return path.open("rb")

    engine.residency.source.opener = opener  # type: ignore[attr-defined]
    engine.register("slow", str(models[1][1]))
    engine.add(ask("slow"))
    engine.add(ask("m0", max_tokens=60))
    events = drive(engine, until=lambda: engine.stats().generation_tokens == 60)
    assert opened.is_set()
    assert len(tokens_of(events["m0"])) == 60
    assert tokens_of(events["m0"])[:TOKENS] == answers[0]
    assert "slow" not in events
    assert info(engine, "slow").state == "loading"
    go_on.set()
    assert tokens_of(drive(engine)["slow"]) == answers[1]


def test_disks_that_never_answer_do_not_keep_other_deltas_from_loading(
    models: tuple[Path, list[Path]], answers: list[list[int]], tmp_path: Path
) -> None:
    base, deltas = models
    engine = make_engine(base, {"m0": deltas[0]}, load_timeout_s=0.5)
    go_on = threading.Event()
    stuck = [shutil.copytree(deltas[1], tmp_path / f"stuck{i}") for i in range(THREADS)]

    def opener(path: Path) -> BinaryIO:
        if path.parent in stuck:
            go_on.wait(60)
        return path.open("rb")

    engine.residency.source.opener = opener  # type: ignore[attr-defined]
    for path in stuck:
        engine.register(path.name, str(path))
        engine.add(ask(path.name))
    engine.register("good", str(deltas[2]))
    engine.add(ask("good"))
    events = drive(engine)
    go_on.set()
    assert tokens_of(events["good"]) == answers[2]
    for path in stuck:
        assert "load_timeout_s" in (events[path.name][-1].error or "")
        assert info(engine, path.name).state == "error"
    engine.register("stuck0", str(stuck[0]))  # the disk is back
    engine.add(ask("stuck0", "again"))
    assert tokens_of(drive(engine)["again"]) == answers[1]
    engine.close()


def test_what_is_unregistered_ends_its_requests_and_is_gone(
    models: tuple[Path, list[Path]], answers: list[list[int]], engine: Engine
) -> None:
    engine.add(ask("m0", "running"))
    engine.step()
    engine.unregister("m0")
    with pytest.raises(UnknownModelError):
        engine.check(ask("m0"))
    engine.add(ask("m0", "submitted before"))
    assert info(engine, "m0").state == "draining"
    events = drive(engine)
    assert events["submitted before"][-1].finish_reason is FinishReason.ERROR
    assert "does not exist" in (events["submitted before"][-1].error or "")
    stats = engine.stats().residency
    assert (stats.device_deltas, stats.device_bytes, stats.host_bytes) == (0, 0, 0)
    assert [model.name for model in engine.models()] == [BASE]
    modules = engine.residency.maker.modules.values()  # type: ignore[attr-defined]
    assert not any(part_of(module)[0].weights for module in modules)
    with pytest.raises(UnknownModelError):
        engine.unregister("m0")


def test_a_pinned_delta_stays(
    models: tuple[Path, list[Path]], answers: list[list[int]], engine: Engine
) -> None:
    base, deltas = models
    room = 2 * one_delta_bytes(engine)
    sources = {f"m{i}": delta for i, delta in enumerate(deltas[:6])}
    crowded = make_engine(base, sources, delta_memory_bytes=room)
    crowded.pin("m0", True)
    with pytest.raises(ConfigError, match="pinned deltas take"):
        crowded.pin("m1", True)
    trace = run(crowded, [ask(f"m{i}") for i in range(1, 6)])
    assert [trace.tokens[f"m{i}"] for i in range(1, 6)] == answers[1:6]
    shown = info(crowded, "m0")
    assert (shown.pinned, shown.tier, shown.state) == (True, "device", "ready")
    crowded.close()


def test_registering_refuses_what_can_never_be_served(
    models: tuple[Path, list[Path]], engine: Engine, tmp_path: Path
) -> None:
    size = one_delta_bytes(engine)
    with pytest.raises(ConfigError, match=rf"{size} bytes.*delta_memory_bytes is {size - 1}"):
        make_engine(models[0], {"m0": models[1][0]}, delta_memory_bytes=size - 1)
    other = make_base("llama", tmp_path / "other", seed=9)
    compress(other, make_fine_tune(other, tmp_path / "tune", seed=1), tmp_path / "foreign")
    with pytest.raises(BaseMismatchError):
        engine.register("foreign", str(tmp_path / "foreign"))
    with pytest.raises(ConfigError, match="names both the base and a delta"):
        engine.register(BASE, str(models[1][0]))
    with pytest.raises(ConfigError, match="cannot be a model's name"):
        engine.register("no name", str(models[1][0]))


def test_added_tokens_of_a_new_version_are_accepted_once_it_serves(
    models: tuple[Path, list[Path]], engine: Engine, tmp_path: Path
) -> None:
    grown = make_fine_tune(models[0], tmp_path / "grown", seed=40, added_tokens=4)
    compress(models[0], grown, tmp_path / "delta")
    engine.register("m0", str(tmp_path / "delta"))
    drive(engine)
    assert info(engine, "m0").vocab_size == VOCAB + 4
    request = greedy("added", "m0", [VOCAB + 3, 5], TOKENS)
    engine.check(request)
    engine.add(request)
    assert len(tokens_of(drive(engine)["added"])) == TOKENS
    engine.rollback("m0")
    drive(engine)
    engine.add(greedy("checked before", "m0", [VOCAB + 3, 5], TOKENS))
    assert "between 0 and 95" in (drive(engine)["checked before"][-1].error or "")


def test_a_hot_delta_is_merged_while_it_serves(
    models: tuple[Path, list[Path]], answers: list[list[int]], engine: Engine
) -> None:
    """Same tokens: in float32 the rounding of merged weights changes no greedy choice here."""
    base, deltas = models
    dense = engine.residency.current("m0").needs.merged_bytes
    sources = {f"m{i}": delta for i, delta in enumerate(deltas[:3])}
    hot = make_engine(base, sources, merge_memory_bytes=dense)
    assert [model.merged for model in hot.models()[1:]] == [True, False, False]
    hot.residency.merger.merge_seconds = 0.0  # the machine may be busy; merging is worth it
    deadline = time.monotonic() + 60
    for n in itertools.count():
        if info(hot, "m2").merged:
            break
        assert time.monotonic() < deadline, "the hot delta was not merged"
        # Many rows at once are what merged weights are for; each prompt is new to the cache.
        hot.add(greedy("hot", "m2", [3 + (n * 7 + i * i) % (VOCAB - 3) for i in range(24)], 2))
        drive(hot)
    assert not info(hot, "m0").merged
    assert hot.stats().residency.merged_bytes == dense
    trace = run(hot, [ask(f"m{i}") for i in range(3)])
    assert [trace.tokens[f"m{i}"] for i in range(3)] == answers[:3]
    hot.close()
