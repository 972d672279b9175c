"""The engine behind its clients, in a thread and in a process: events reach their submitters,
aborts free memory, failure ends streams."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deltaserve.compress.run import compress
from deltaserve.config import EngineConfig
from deltaserve.engine.frontend import Frontend
from deltaserve.engine.gate import QueueGate
from deltaserve.engine.local import LocalClient
from deltaserve.engine.messages import Submit
from deltaserve.engine.remote import ProcessClient
from deltaserve.engine.types import EngineRequest, FinishReason, SamplingParams
from deltaserve.errors import (
    ArtifactError,
    ConfigError,
    EngineDeadError,
    QueueFullError,
    RequestError,
    UnknownModelError,
)
from tests.engine_helpers import BASE, engine_config, make_engine
from tests.families import make_base, make_fine_tune


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("local")
    base = make_base("llama", root / "base")
    compress(base, make_fine_tune(base, root / "tune", seed=1), root / "delta")
    return base, root / "delta"


@pytest.fixture(scope="module")
def newer(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("newer")
    compress(models[0], make_fine_tune(models[0], root / "tune", seed=2), root / "delta")
    return root / "delta"


@pytest.fixture(scope="module", params=[LocalClient.start, ProcessClient])
def client(request: pytest.FixtureRequest, models: tuple[Path, Path]) -> Iterator[Frontend]:
    base, delta = models
    started = request.param(engine_config(base, {"tune": delta}))
    yield started
    started.close()


def request(name: str, model: str = BASE, *, max_tokens: int = 6, **knobs: object) -> EngineRequest:
    params = SamplingParams(max_tokens=max_tokens, **knobs)  # type: ignore[arg-type]
    return EngineRequest(name, model, (5, 6, 7), params)


async def collect(client: Frontend, name: str) -> tuple[list[int], FinishReason | None]:
    tokens: list[int] = []
    async for event in client.stream(name):
        tokens += event.token_ids
    return tokens, event.finish_reason


async def settle(client: Frontend) -> None:
    """Until the engine holds nothing, within two seconds."""
    for _ in range(200):
        stats = client.stats()
        if stats.running == stats.waiting == stats.kv_blocks_used == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"still busy: {client.stats()}")


def test_requests_of_two_models_run_together(client: Frontend) -> None:
    async def main() -> None:
        before = client.stats()
        for i in range(6):
            client.submit(request(f"r{i}", ("tune", BASE)[i % 2], temperature=0.0))
        results = await asyncio.gather(*(collect(client, f"r{i}") for i in range(6)))
        assert all(len(tokens) == 6 for tokens, _ in results)
        assert {reason for _, reason in results} == {FinishReason.LENGTH}
        assert results[0] == results[2] != results[1] == results[3]
        await settle(client)
        after = client.stats()
        assert after.mixed_steps > before.mixed_steps
        assert after.generation_tokens - before.generation_tokens == 36
        assert after.prompt_tokens - before.prompt_tokens == 18

    asyncio.run(main())


def test_seeds_repeat_whatever_shares_the_batch(client: Frontend) -> None:
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


def test_stop_tokens_end_a_request(client: Frontend) -> None:
    async def main() -> None:
        client.submit(request("free", temperature=0.0))
        tokens, _ = await collect(client, "free")
        stop = tokens[2]
        client.submit(request("stopped", temperature=0.0, stop_token_ids=frozenset({stop})))
        stopped, reason = await collect(client, "stopped")
        assert stopped == tokens[: tokens.index(stop) + 1]
        assert reason is FinishReason.STOP

    asyncio.run(main())


def test_abort_frees_memory_and_may_be_repeated(client: Frontend) -> None:
    async def main() -> None:
        client.submit(request("aborted", max_tokens=200))
        events = client.stream("aborted")
        await anext(events)
        client.abort("aborted")
        client.abort("aborted")
        client.abort("never-heard-of")
        reasons = [event.finish_reason async for event in events]
        assert reasons[-1] is FinishReason.ABORT
        await settle(client)

    asyncio.run(main())


def test_what_is_aborted_unheard_is_forgotten(client: Frontend) -> None:
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


def test_leaving_a_stream_aborts_it(client: Frontend) -> None:
    async def main() -> None:
        client.submit(request("left", max_tokens=200))
        events = client.stream("left")
        await anext(events)
        await events.aclose()
        await settle(client)

    asyncio.run(main())


def test_wrong_requests_are_refused_and_harm_nobody(client: Frontend) -> None:
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


def test_a_thousand_requests_and_their_aborts(client: Frontend) -> None:
    async def main() -> None:
        for i in range(1000):
            client.submit(request(f"r{i}", max_tokens=2 if i % 4 == 0 else 200))
        for i in range(1000):
            if i % 4:
                client.abort(f"r{i}")
        results = await asyncio.gather(*(collect(client, f"r{i}") for i in range(1000)))
        for i, (tokens, reason) in enumerate(results):
            if i % 4 == 0:
                assert (len(tokens), reason) == (2, FinishReason.LENGTH)
            else:
                assert reason is FinishReason.ABORT
        await settle(client)
        assert len(client._mailboxes) == 0

    asyncio.run(main())


def test_an_id_is_free_again_once_its_stream_has_ended(client: Frontend) -> None:
    async def main() -> None:
        client.submit(request("left", max_tokens=200))
        events = client.stream("left")
        await anext(events)
        await events.aclose()
        while True:
            try:
                client.submit(request("left", temperature=0.0))
            except RequestError:  # the engine has not let go of it yet
                await asyncio.sleep(0.01)
            else:
                break
        tokens, reason = await collect(client, "left")
        assert (len(tokens), reason) == (6, FinishReason.LENGTH)

    asyncio.run(main())


def test_a_delta_that_vanishes_under_a_request_fails_only_that(client: Frontend) -> None:
    """The client still believes in the model when the engine has let go of it."""

    async def main() -> None:
        known = dict(client._models)
        client._models["gone"] = client._models["tune"]
        try:
            client.submit(request("orphan", "gone"))
            client.submit(request("fine", "tune"))
            event = await anext(client.stream("orphan"))
            assert event.finish_reason is FinishReason.ERROR
            assert "'gone' does not exist" in (event.error or "")
            assert len((await collect(client, "fine"))[0]) == 6
        finally:
            client._models = known

    asyncio.run(main())


def test_a_full_queue_refuses_at_once(client: Frontend, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(client, "_gate", QueueGate(max_requests=1))
        with monkeypatch.context() as patch:
            patch.setattr(client, "_send", lambda command: None)  # an engine that is slow to admit
            client.submit(request("first"))
            with pytest.raises(QueueFullError, match="1 requests wait"):
                client.submit(request("second"))
        client._send(Submit(request("first")))
        assert len((await collect(client, "first"))[0]) == 6
        client.submit(request("third"))  # there is room again
        assert len((await collect(client, "third"))[0]) == 6

    asyncio.run(main())


def test_dump_shows_what_runs(client: Frontend) -> None:
    async def main() -> None:
        client.submit(request("seen", "tune", max_tokens=200))
        events = client.stream("seen")
        await anext(events)
        (running,) = (await client.dump())["running"]
        assert running["request_id"] == "seen"
        assert running["model"] == "tune"
        assert "5, 6, 7" not in str(running)
        await events.aclose()
        await settle(client)

    asyncio.run(main())


def test_deltas_come_change_and_go_while_it_serves(
    client: Frontend, models: tuple[Path, Path], newer: Path
) -> None:
    async def answer(model: str) -> list[int]:
        client.submit(request("x", model, temperature=0.0))
        return (await collect(client, "x"))[0]

    async def main() -> None:
        base, tuned = await answer(BASE), await answer("tune")
        info = await client.load_delta("more", str(models[1]))
        assert (info.state, info.version, info.pinned) == ("ready", 1, False)
        assert await answer("more") == tuned
        second = await client.load_delta("more", str(newer), pinned=True)
        assert (second.state, second.version, second.pinned) == ("ready", 2, True)
        assert second.digest != info.digest
        assert await answer("more") not in (base, tuned)
        await client.rollback_delta("more")
        assert await answer("more") == tuned
        await client.pin_delta("more", False)
        assert not client._models["more"].pinned
        await client.unload_delta("more")
        assert "more" not in [model.name for model in client.models()]
        with pytest.raises(UnknownModelError, match="'more' does not exist"):
            await answer("more")

    asyncio.run(main())


def test_an_unloaded_delta_serves_those_that_came_before(
    client: Frontend, models: tuple[Path, Path]
) -> None:
    async def main() -> None:
        await client.load_delta("leaving", str(models[1]))
        client.submit(request("early", "leaving", max_tokens=100))
        events = client.stream("early")
        await anext(events)
        unloading = asyncio.create_task(client.unload_delta("leaving"))
        await asyncio.sleep(0.02)
        with pytest.raises(UnknownModelError):
            client.submit(request("late", "leaving"))
        assert [event async for event in events][-1].finish_reason is FinishReason.LENGTH
        await unloading

    asyncio.run(main())


def test_refusals_of_management_are_the_engines_own(
    client: Frontend, models: tuple[Path, Path], tmp_path: Path
) -> None:
    async def main() -> None:
        with pytest.raises(ArtifactError, match="nowhere"):
            await client.load_delta("bad", "/nowhere")
        with pytest.raises(ConfigError, match="both the base and a delta"):
            await client.load_delta(BASE, str(models[1]))
        for refused in (client.unload_delta, client.rollback_delta):
            with pytest.raises(UnknownModelError, match="'nobody' does not exist"):
                await refused("nobody")
        with pytest.raises(ConfigError, match="no earlier version"):
            await client.rollback_delta("tune")
        damaged = shutil.copytree(models[1], tmp_path / "damaged")
        weights = bytearray((damaged / "delta.safetensors").read_bytes())
        weights[-1] ^= 1
        (damaged / "delta.safetensors").write_bytes(weights)
        with pytest.raises(ArtifactError):
            await client.load_delta("tune", str(damaged))
        client.submit(request("x", "tune"))  # as before
        assert len((await collect(client, "x"))[0]) == 6

    asyncio.run(main())


def test_a_failing_engine_ends_its_streams(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("out of luck")

    async def main() -> None:
        client = LocalClient(make_engine(models[0], {}))
        monkeypatch.setattr(client._engine.runner, "forward", explode)
        client.submit(request("doomed"))
        event = await anext(client.stream("doomed"))
        assert event.finish_reason is FinishReason.ERROR
        assert "out of luck" in (event.error or "")
        assert not client.alive()
        assert not client.recovering()
        with pytest.raises(EngineDeadError, match="out of luck"):
            client.submit(request("late"))
        with pytest.raises(EngineDeadError, match="out of luck"):
            await client.dump()

    asyncio.run(main())


@pytest.mark.parametrize("start", [LocalClient.start, ProcessClient])
def test_closing_ends_what_runs(
    models: tuple[Path, Path], start: Callable[[EngineConfig], Frontend]
) -> None:
    async def main() -> None:
        client = start(engine_config(models[0], {}))
        client.submit(request("long", max_tokens=200))
        events = client.stream("long")
        await anext(events)
        await asyncio.to_thread(client.close, "closing time")
        last = [event async for event in events][-1]
        assert (last.finish_reason, last.error) == (FinishReason.ERROR, "closing time")
        with pytest.raises(EngineDeadError, match="closing time"):
            client.submit(request("late"))

    asyncio.run(main())
