"""The engine's client: events reach their submitters, aborts free memory, failure ends streams."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltaserve.compress.run import compress
from deltaserve.engine.local import LocalClient
from deltaserve.engine.types import EngineRequest, FinishReason, SamplingParams
from deltaserve.errors import EngineDeadError, RequestError, UnknownModelError
from tests.engine_helpers import BASE, make_engine
from tests.families import make_base, make_fine_tune


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("local")
    base = make_base("llama", root / "base")
    compress(base, make_fine_tune(base, root / "tune", seed=1), root / "delta")
    return base, root / "delta"


@pytest.fixture
def client(models: tuple[Path, Path]) -> Iterator[LocalClient]:
    base, delta = models
    local = LocalClient(make_engine(base, {"tune": delta}))
    yield local
    local.close()


def request(name: str, model: str = BASE, *, max_tokens: int = 6, **knobs: object) -> EngineRequest:
    params = SamplingParams(max_tokens=max_tokens, **knobs)  # type: ignore[arg-type]
    return EngineRequest(name, model, (5, 6, 7), params)


async def collect(client: LocalClient, name: str) -> tuple[list[int], FinishReason | None]:
    tokens: list[int] = []
    async for event in client.stream(name):
        tokens += event.token_ids
    return tokens, event.finish_reason


async def settle(client: LocalClient) -> None:
    """Until the engine holds nothing, within two seconds."""
    for _ in range(200):
        stats = client.stats()
        if stats.running == stats.waiting == stats.kv_blocks_used == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"still busy: {client.stats()}")


def test_requests_of_two_models_run_together(client: LocalClient) -> None:
    async def main() -> None:
        for i in range(6):
            client.submit(request(f"r{i}", ("tune", BASE)[i % 2], temperature=0.0))
        results = await asyncio.gather(*(collect(client, f"r{i}") for i in range(6)))
        assert all(len(tokens) == 6 for tokens, _ in results)
        assert {reason for _, reason in results} == {FinishReason.LENGTH}
        assert results[0] == results[2] != results[1] == results[3]
        await settle(client)
        assert client.stats().mixed_steps > 0
        assert client.stats().generation_tokens == 36
        assert client.stats().prompt_tokens == 18

    asyncio.run(main())


def test_seeds_repeat_whatever_shares_the_batch(client: LocalClient) -> None:
    async def main() -> None:
        client.submit(request("alone", seed=11, max_tokens=12))
        alone = await collect(client, "alone")
        for i in range(5):
            client.submit(request(f"crowd{i}", "tune"))
        client.submit(request("again", seed=11, max_tokens=12))
        client.submit(request("other", seed=12, max_tokens=12))
        names = ["again", "other", *(f"crowd{i}" for i in range(5))]
        results = await asyncio.gather(*(collect(client, name) for name in names))
        assert results[0] == alone
        assert results[1] != alone

    asyncio.run(main())


def test_stop_tokens_end_a_request(client: LocalClient) -> None:
    async def main() -> None:
        client.submit(request("free", temperature=0.0))
        tokens, _ = await collect(client, "free")
        stop = tokens[2]
        client.submit(request("stopped", temperature=0.0, stop_token_ids=frozenset({stop})))
        stopped, reason = await collect(client, "stopped")
        assert stopped == tokens[: tokens.index(stop) + 1]
        assert reason is FinishReason.STOP

    asyncio.run(main())


def test_abort_frees_memory_and_may_be_repeated(client: LocalClient) -> None:
    async def main() -> None:
        client.submit(request("long", max_tokens=200))
        events = client.stream("long")
        await anext(events)
        client.abort("long")
        client.abort("long")
        client.abort("never-heard-of")
        reasons = [event.finish_reason async for event in events]
        assert reasons[-1] is FinishReason.ABORT
        await settle(client)

    asyncio.run(main())


def test_what_is_aborted_unheard_is_forgotten(client: LocalClient) -> None:
    async def main() -> None:
        client.submit(request("unheard", max_tokens=200))
        client.abort("unheard")
        for _ in range(200):
            if not client._mailboxes:
                break
            await asyncio.sleep(0.01)
        assert not client._mailboxes
        assert (await collect(client, "unheard")) == ([], FinishReason.ABORT)

    asyncio.run(main())


def test_leaving_a_stream_aborts_it(client: LocalClient) -> None:
    async def main() -> None:
        client.submit(request("left", max_tokens=200))
        events = client.stream("left")
        await anext(events)
        await events.aclose()
        await settle(client)

    asyncio.run(main())


def test_wrong_requests_are_refused_and_harm_nobody(client: LocalClient) -> None:
    async def main() -> None:
        with pytest.raises(UnknownModelError, match="nobody"):
            client.submit(request("a", "nobody"))
        with pytest.raises(RequestError, match="maximum context length is 256"):
            client.submit(request("b", max_tokens=254))
        with pytest.raises(RequestError, match="empty"):
            client.submit(EngineRequest("c", BASE, (), SamplingParams(max_tokens=1)))
        with pytest.raises(RequestError, match="between 0 and 95"):
            client.submit(EngineRequest("d", BASE, (1, 96), SamplingParams(max_tokens=1)))
        client.submit(request("e"))
        with pytest.raises(RequestError, match="in use"):
            client.submit(request("e"))
        assert len((await collect(client, "e"))[0]) == 6

    asyncio.run(main())


def test_a_failing_engine_ends_its_streams(
    client: LocalClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("out of luck")

    async def main() -> None:
        monkeypatch.setattr(client._engine.runner, "forward", explode)
        client.submit(request("doomed"))
        event = await anext(client.stream("doomed"))
        assert event.finish_reason is FinishReason.ERROR
        assert "out of luck" in (event.error or "")
        assert not client.alive()
        with pytest.raises(EngineDeadError, match="out of luck"):
            client.submit(request("late"))

    asyncio.run(main())


def test_closing_ends_what_runs(models: tuple[Path, Path]) -> None:
    async def main() -> None:
        client = LocalClient(make_engine(models[0], {}))
        client.submit(request("long", max_tokens=200))
        events = client.stream("long")
        await anext(events)
        await asyncio.to_thread(client.close)
        reasons = [event.finish_reason async for event in events]
        assert reasons[-1] is FinishReason.ERROR

    asyncio.run(main())
