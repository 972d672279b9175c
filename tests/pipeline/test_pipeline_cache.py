"""The cache: the same stream, computed once, by whoever is there and whatever happens to them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from deltaserve.errors import PipelineError
from deltaserve.pipeline import Plan, open_pipeline
from deltaserve.pipeline.cache import CacheSettings
from deltaserve.pipeline.room import usage
from tests.pipeline.pipelines import count_words, long_enough, stream, texts, tokenizer

ROWS = 1500  # three shards
Caplog = pytest.LogCaptureFixture


def told(caplog: Caplog, words: str) -> list[str]:
    """The warnings with these words, of which there is one for each thing that is wrong."""
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(set(messages))
    return [message for message in messages if re.search(words, message)]


def plan_of(folder: Path, mark: Path | None = None, seed: int = 1) -> Plan:
    """A plan whose map leaves a line in ``mark`` for every row that it computes."""
    name = str(mark)

    def counted(row: dict[str, Any]) -> dict[str, Any]:
        with open(name, "a") as file:
            file.write(f"{row['id']}\n")
        return count_words(row)

    source = Plan.from_jsonl(texts(folder / "a.jsonl", ROWS, 1)).filter(long_enough)
    return source.map(counted if mark else count_words).cache().shuffle(seed).pack(64, window=8)


def computed(mark: Path) -> int:
    return len(set(mark.read_text().splitlines())) if mark.exists() else 0


def test_rows_are_computed_once_for_all_jobs(tmp_path: Path) -> None:
    mark, cache = tmp_path / "mark", tmp_path / "cache"
    plan = plan_of(tmp_path, mark)
    expected = stream(plan.without(("cache",)))
    once = computed(mark)
    mark.unlink()
    assert stream(plan, cache=cache, threads=3) == expected
    assert computed(mark) == once
    mark.unlink()
    for options in ({}, {"threads": 2}, {"processes": 1}, {"rewrites": False}):
        assert stream(plan, cache=cache, **options) == expected
    assert stream(plan_of(tmp_path, mark, seed=2), cache=cache) != expected
    assert computed(mark) == 0


def test_what_decides_the_rows_decides_the_entry(tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def entries() -> int:
        return len([each for each in cache.iterdir() if each.is_dir()]) - 1

    name = tokenizer(tmp_path / "tokenizer")
    source = Plan.from_jsonl(texts(tmp_path / "a.jsonl", 40, 1))
    plan = source.tokenize(name).cache()
    stream(plan, cache=cache)
    stream(plan.take(7).shuffle(3), cache=cache)
    assert entries() == 1
    stream(source.tokenize(name, max_length=5).cache(), cache=cache)
    assert entries() == 2
    os.rename(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    stream(Plan.from_jsonl(tmp_path / "b.jsonl").tokenize(name).cache(), cache=cache)
    assert entries() == 2  # contents count, names do not
    texts(tmp_path / "b.jsonl", 40, 2)
    stream(Plan.from_jsonl(tmp_path / "b.jsonl").tokenize(name).cache(), cache=cache)
    assert entries() == 3
    tokenizer(tmp_path / "tokenizer", template="{{ messages }}")
    import deltaserve.pipeline.tokenizers as tokenizers

    tokenizers._load.cache_clear()
    stream(Plan.from_jsonl(tmp_path / "b.jsonl").tokenize(name).cache(), cache=cache)
    assert entries() == 4


def test_a_killed_job_leaves_a_cache_that_goes_on(tmp_path: Path) -> None:
    """kill -9 while a shard is made: no lock stays, nothing half-written is read."""
    mark, cache = tmp_path / "mark", tmp_path / "cache"
    program = (
        "import sys, time\nfrom pathlib import Path\n"
        "from deltaserve.pipeline import open_pipeline\n"
        "import tests.pipeline.test_pipeline_cache as t\n"
        "t.count_words = lambda row, f=t.count_words: (time.sleep(0.002), f(row))[1]\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "list(open_pipeline(t.plan_of(folder, folder / 'mark'), cache=folder / 'cache'))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], env=os.environ)
    deadline = time.monotonic() + 60
    while computed(mark) < 600 and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert 600 <= computed(mark) < 1400
    plan = plan_of(tmp_path)
    assert stream(plan, cache=cache) == stream(plan.without(("cache",)))
    left = [p.name for p in cache.rglob("*") if p.name.startswith(".") or p.suffix == ".lock"]
    # The killed job's own entry may hold its lock file and its unfinished shard, no more.
    assert len(left) <= 2


def test_a_damaged_file_is_made_again(tmp_path: Path, caplog: Caplog) -> None:
    plan, cache = plan_of(tmp_path), tmp_path / "cache"
    expected = stream(plan, cache=cache)
    files = sorted(cache.rglob("*.rows"))
    data = bytearray(files[0].read_bytes())
    data[len(data) // 2] ^= 1
    files[0].write_bytes(data)
    files[1].write_bytes(b"DS")
    assert stream(plan, cache=cache) == expected
    assert told(caplog, "made again")
    assert stream(plan, cache=cache) == expected


def test_a_full_disk_is_told_and_rows_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Caplog
) -> None:
    plan = plan_of(tmp_path)
    expected = stream(plan.without(("cache",)))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deltaserve.pipeline.cache.os.fsync", full)
    assert stream(plan, cache=tmp_path / "cache") == expected
    assert told(caplog, r"cannot keep more rows \(No space left")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.name.endswith("rows")]


@pytest.mark.parametrize("options", [{}, {"threads": 2}, {"processes": 2}])
def test_a_folder_that_cannot_be_made_is_told(
    tmp_path: Path, caplog: Caplog, options: dict[str, int]
) -> None:
    (tmp_path / "file").write_text("")
    plan = plan_of(tmp_path)
    assert stream(plan, cache=tmp_path / "file", **options) == stream(plan.without(("cache",)))
    assert len(told(caplog, "cannot keep more rows")) == 1


def test_a_limit_removes_what_was_not_used_for_longest(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    sources = [Plan.from_jsonl(texts(tmp_path / f"{n}.jsonl", 300, n)) for n in range(4)]
    plans = [source.map(count_words).cache() for source in sources]
    stream(plans[0], cache=directory)
    settings = CacheSettings(directory, int(usage(directory) * 2.5))
    for at, plan in enumerate(plans[:2]):
        stream(plan, cache=settings)
        for used in directory.glob("*/used"):  # a clock for the test
            os.utime(used, (at, at)) if used.stat().st_mtime > 1e6 else None
    first, second = sorted(directory.glob("*/used"), key=lambda p: p.stat().st_mtime)
    stream(plans[2], cache=settings)
    assert usage(directory) <= settings.max_bytes
    assert not first.exists()
    assert second.exists()


def test_entries_in_use_stay_and_the_limit_is_told(tmp_path: Path, caplog: Caplog) -> None:
    directory = tmp_path / "cache"
    plan = plan_of(tmp_path)
    with open_pipeline(plan, cache=directory) as elements:
        next(elements)
        small = CacheSettings(directory, usage(directory) + 10)
        other = Plan.from_jsonl(texts(tmp_path / "b.jsonl", 300, 5)).map(count_words).cache()
        assert stream(other, cache=small) == stream(other.without(("cache",)))
        assert told(caplog, "limit")
        assert list(directory.rglob("*.rows"))


def test_hidden_randomness_is_caught(tmp_path: Path) -> None:
    import random

    def helper() -> float:
        return random.random()

    def noisy(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "noise": helper()}

    plan = Plan.from_jsonl(texts(tmp_path / "a.jsonl", 40)).map(noisy).cache()
    with pytest.raises(PipelineError, match=r"come out differently.*random=True"):
        stream(plan, cache=tmp_path / "cache")


def test_what_cannot_be_kept_is_named(tmp_path: Path) -> None:
    plan = Plan.from_jsonl(texts(tmp_path / "a.jsonl", 4)).map(lambda row: {"x": object()}).cache()
    with pytest.raises(PipelineError, match="cannot keep these rows: a object"):
        stream(plan, cache=tmp_path / "cache")
