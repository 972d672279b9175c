"""Usage: durable before the answer ends, whatever happens then; and exact sums."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections import defaultdict
from contextlib import closing
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.errors import AccountingError, RequestError
from deltaserve.tenancy.limits import period_of
from deltaserve.tenancy.usage import GROUPS, SUMS, UsageLog, UsageRecord, usage_sums, used_now

NOON = 1_900_022_400.0
DAY = 86400.0
RECORD = UsageRecord(
    "r0", NOON, NOON + 2, "acme", "key_1", None, "sql", "sha256:1", "/v1/completions", "ok", 7, 3, 5
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "accounts.sqlite"


@pytest.fixture
def log(path):
    log = UsageLog(path)
    yield log
    log.close()


def rows(path):
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT * FROM usage ORDER BY request_id").fetchall()


def test_a_record_is_there_once_the_writer_says_so(log, path):
    log.write(RECORD).result(10)
    ((request_id, day, *rest),) = rows(path)
    assert (request_id, day) == ("r0", period_of("day", NOON))
    assert rest == [
        NOON, NOON + 2, "acme", "key_1", None, "sql", "sha256:1", "/v1/completions", "ok", 7, 3, 5,
    ]  # fmt: skip


records = st.lists(
    st.builds(
        replace,
        st.just(RECORD),
        tenant=st.sampled_from(["acme", "globex"]),
        key=st.sampled_from(["key_1", "key_2"]),
        model=st.sampled_from(["sql", "legal/v2"]),
        created=st.sampled_from([NOON - 40 * DAY, NOON - DAY, NOON - 1, NOON]),
        prompt_tokens=st.integers(0, 10**6),
        cached_tokens=st.integers(0, 10),
        completion_tokens=st.integers(0, 10**6),
    ),
    max_size=12,
)


@settings(max_examples=25, deadline=None)
@given(
    records=records,
    group_by=st.lists(st.sampled_from(GROUPS), unique=True),
    tenant=st.sampled_from([None, "acme", "nobody"]),
)
def test_sums_are_those_of_the_records(tmp_path_factory, records, group_by, tenant):
    path = tmp_path_factory.mktemp("usage") / "accounts.sqlite"
    log = UsageLog(path)
    for index, record in enumerate(records):
        log.write(replace(record, request_id=str(index)))
    log.close()
    assert len(rows(path)) == len(records)

    wanted: dict[tuple[str, ...], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    if not group_by:
        wanted[()] = [0, 0, 0, 0]
    yesterday = period_of("day", NOON - DAY)
    for r in records:
        day = period_of("day", r.created)
        if day >= yesterday and tenant in (None, r.tenant):
            values = {"day": day, "tenant": r.tenant, "key": r.key, "model": r.model}
            total = wanted[tuple(values[name] for name in group_by)]
            counts = (1, r.prompt_tokens, r.cached_tokens, r.completion_tokens)
            for position, amount in enumerate(counts):
                total[position] += amount
    where = {} if tenant is None else {"tenant": tenant}
    found = usage_sums(path, group_by, first_day=yesterday, where=where)
    assert [list(row) for row in found] == [[*group_by, *SUMS]] * len(wanted)
    assert {
        tuple(r[g] for g in group_by): [r[s] for s in SUMS] for r in found
    } == wanted  # fmt: skip


def test_budgets_begin_with_what_was_used_before(log, path):
    for index, created in enumerate((NOON, NOON, NOON - 3 * DAY, NOON - 40 * DAY)):
        log.write(replace(RECORD, request_id=str(index), created=created)).result(10)
    assert used_now(path, NOON + 60) == {"tenant acme": (24, 36), "key key_1": (24, 36)}
    assert used_now(path, NOON + 300 * DAY) == {}


def test_an_unknown_group_is_refused(path):
    with pytest.raises(RequestError, match="group_by"):
        usage_sums(path, ["day; DROP TABLE usage"])


def test_a_record_that_cannot_be_written_is_told_and_the_next_one_is_written(log, path):
    log.write(RECORD).result(10)
    with pytest.raises(AccountingError, match="could not be recorded"):
        log.write(RECORD).result(10)  # the same request again
    log.write(replace(RECORD, request_id="r1")).result(10)
    assert len(rows(path)) == 2
    assert usage_sums(path, [])[0]["requests"] == 2


def test_a_full_disk_is_told_and_does_not_last(log, path):
    log.write(RECORD).result(10)
    (pages,) = log._connection.execute("PRAGMA page_count").fetchone()
    log._connection.execute(f"PRAGMA max_page_count = {pages}")
    large = replace(RECORD, request_id="r1", end_user="x" * 100_000)
    with pytest.raises(AccountingError, match="full"):
        log.write(large).result(10)
    log._connection.execute("PRAGMA max_page_count = 1000000")
    log.write(large).result(10)
    assert len(rows(path)) == 2


def test_many_at_once_share_commits(log):
    statements: list[str] = []
    log._connection.set_trace_callback(statements.append)
    waiting = [log.write(replace(RECORD, request_id=str(index))) for index in range(500)]
    for written in waiting:
        written.result(10)
    assert statements.count("COMMIT") < 250


VICTIM = """
    import asyncio, itertools, sys
    from dataclasses import replace
    from pathlib import Path
    from deltaserve.tenancy.usage import UsageLog, UsageRecord

    log = UsageLog(Path(sys.argv[1]))
    record = UsageRecord("", 0, 1, "acme", "key_1", None, "sql", None, "/v1/x", "ok", 7, 3, 5)

    async def client(name):
        for number in itertools.count():
            request_id = f"{name}/{number}"
            await asyncio.wrap_future(log.write(replace(record, request_id=request_id)))
            print(request_id, flush=True)  # the answer ends

    async def main():
        await asyncio.gather(*(client(name) for name in range(20)))

    asyncio.run(main())
"""


@pytest.mark.parametrize("seed", range(3))
def test_no_answered_request_is_lost_on_kill_9(path, tmp_path, seed):
    answered = tmp_path / "answered"
    with answered.open("w") as out:
        victim = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(VICTIM), str(path)],
            stdout=out,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    deadline = time.monotonic() + 60
    while answered.stat().st_size < 2000 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.Random(seed).random() * 0.2)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    told = answered.read_text().rpartition("\n")[0].split("\n")
    assert len(told) > 100
    kept = {row[0] for row in rows(path)}
    assert set(told) <= kept
    # The sums are those of the records, also of those whose answer did not get out any more.
    assert usage_sums(path, [])[0]["requests"] == len(kept)


def test_a_program_that_reads_the_records_takes_none_away(log, path):
    count = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); " + (
        "print(c.execute('SELECT count(*) FROM usage').fetchone()[0]); c.close()"
    )

    def counted_elsewhere() -> int:
        return int(subprocess.check_output([sys.executable, "-c", count, str(path)]))

    for number in range(3):
        log.write(replace(RECORD, request_id=f"r{number}")).result(10)
        assert usage_sums(path, [])[0]["requests"] == number + 1  # opens it once more, and closes
        assert counted_elsewhere() == number + 1
