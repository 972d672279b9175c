"""Nobody's long work keeps another tenant's waiting."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from deltaserve.server.turns import AT_A_TIME, LARGE_BYTES, Turns


def test_a_flood_of_one_tenant_leaves_threads_to_the_others():
    async def attempt() -> None:
        turns, gate = Turns(), threading.Event()
        begun: list[int] = []

        def held(number: int) -> int:
            begun.append(number)
            gate.wait(10)
            return number

        flood = [
            asyncio.create_task(turns.run(lambda n=n: held(n), "acme", size))
            for n, size in enumerate([10, LARGE_BYTES + 1] * 50)
        ]
        for size in (10, LARGE_BYTES + 1):
            assert await asyncio.wait_for(turns.run(lambda: 7, "globex", size), 5) == 7
            assert await asyncio.wait_for(turns.run(lambda: 7, None, size), 5) == 7
        assert len(begun) == 2 * AT_A_TIME
        for task in flood[2:]:  # those who left still keep their threads until the work is done
            task.cancel()
        late = asyncio.create_task(turns.run(lambda: 8, "acme", 10))
        await asyncio.sleep(0.05)
        assert not late.done()
        gate.set()
        assert await asyncio.wait_for(late, 5) == 8
        assert await asyncio.gather(*flood[:2]) == [0, 1]
        assert len(begun) == 2 * AT_A_TIME

    asyncio.run(attempt())


def test_a_failure_is_the_callers_and_ends_the_turn():
    async def attempt() -> None:
        turns = Turns()
        for _ in range(AT_A_TIME + 1):
            with pytest.raises(ZeroDivisionError):
                await asyncio.wait_for(turns.run(lambda: 1 // 0, "acme", 1), 5)

    asyncio.run(attempt())


def test_long_prompts_of_one_tenant_over_http(house):
    """Over real tokenizers: more long prompts than there are threads, and one short."""
    answered: list[int] = []

    def flood() -> None:
        body = {"model": "base", "prompt": "the quick fox " * 8_000}
        answered.append(house.ask("sk-acme", "POST", "/tokenize", json=body).status_code)

    threads = [threading.Thread(target=flood) for _ in range(40)]
    for thread in threads:
        thread.start()
    while not answered:  # all threads of the server are at work
        time.sleep(0.001)
    assert house.complete("sk-globex").status_code == 200
    before = len(answered)
    for thread in threads:
        thread.join()
    assert set(answered) == {200}
    assert before < len(answered) / 2
