"""The engine: a base, its deltas, and the step that serves them together."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.artifact.digest import checkpoint_digest
from deltaserve.config import EngineConfig, check_names
from deltaserve.engine.families import family_of
from deltaserve.engine.info import base_version, model_infos, residency_stats
from deltaserve.engine.kv import BlockPool, Key, root_key
from deltaserve.engine.loader import Loader, Reader
from deltaserve.engine.memory import free_memory, plan_deltas, plan_kv
from deltaserve.engine.model import KVCache, load_base, make_delta_aware
from deltaserve.engine.operands import OperandMaker
from deltaserve.engine.parts import Parts
from deltaserve.engine.probe import Prober
from deltaserve.engine.residency import Residency
from deltaserve.engine.routing import BASE_SLOT, StepContext
from deltaserve.engine.runner import Runner
from deltaserve.engine.scheduler import Scheduler, StepPlan
from deltaserve.engine.sequence import Sequence
from deltaserve.engine.types import (
    EngineRequest,
    EngineStats,
    FinishReason,
    ModelInfo,
    TokenEvent,
)
from deltaserve.engine.versions import DeltaVersion
from deltaserve.errors import ArtifactError, ConfigError, RequestError

# How long a step without rows waits for a load, so that it neither spins nor oversleeps.
LOAD_WAIT_S = 0.005


@dataclass
class Counters:
    """What happened since the start."""

    steps: int = 0
    mixed_steps: int = 0
    max_models_in_step: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0

    def count(self, plan: StepPlan, drawing: Iterable[Sequence]) -> None:
        """Add a committed step; ``drawing``: the sequences that got a token."""
        self.steps += 1
        self.mixed_steps += plan.num_models > 1
        self.max_models_in_step = max(self.max_models_in_step, plan.num_models)
        for seq in drawing:
            self.generation_tokens += 1
            if seq.num_generated == 1:
                self.prompt_tokens += seq.num_prompt
                self.cached_tokens += seq.num_cached or 0


class Engine:
    """Synchronous and single-threaded: ``add``, then ``step`` until done."""

    def __init__(self, config: EngineConfig) -> None:
        """Load base and deltas. Raises DeltaServeError for whatever the user must mend."""
        self.config = config
        base = Checkpoint.open(config.base)
        family_of(base.architecture)
        model_config: Any = base.hf_config
        device, dtype = _device(config), _dtype(config, base)
        digest = checkpoint_digest(base)
        model = load_base(base, dtype, device)
        free = free_memory(device)
        num_blocks, self.max_model_len = plan_kv(config, model_config, dtype, device)
        step = StepContext()
        modules = make_delta_aware(model, base.architecture, step)
        kv = KVCache(model_config, num_blocks * config.block_size, dtype, device)
        self.base = base
        vocab_size = model_config.vocab_size
        self.residency = Residency(
            Parts(
                Reader(digest),
                OperandMaker(base, modules, vocab_size=vocab_size, dtype=dtype, device=device),
                Prober(),
                Loader(),
                base_version(config.served_model_name, base, digest, vocab_size),
            ),
            plan_deltas(config, device, free),
        )
        self.runner = Runner(model, step, kv, block_size=config.block_size, device=device)
        self.scheduler = Scheduler(
            BlockPool(num_blocks, config.block_size),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            deltas=self.residency,
        )
        self.counters = Counters()
        self._refused: list[TokenEvent] = []
        self._load_deltas()

    def models(self) -> list[ModelInfo]:
        """The base first, then its deltas."""
        return model_infos(self.base, self.residency.base, self.residency.catalogue)

    @property
    def models_revision(self) -> int:
        """Grows whenever ``models`` would answer something else."""
        return self.residency.catalogue.revision

    def register(self, name: str, path: str, pinned: bool = False) -> int:
        """Serve a delta, or a new version of a served one -> the version's number.

        Looks at the manifest only; the weights are loaded in the background. Until a new version
        is READY, requests get the old one; if it fails, ``ModelInfo.error`` says why.
        Raises ArtifactError, BaseMismatchError, ConfigError.
        """
        check_names(self.config.served_model_name, [name])
        return self.residency.register(name, path, pinned=pinned)

    def unregister(self, name: str) -> None:
        """Refuse new requests; free the memory when those that came before have ended."""
        self.residency.unregister(name)

    def pin(self, name: str, pinned: bool) -> None:
        """Keep a delta on the device, or do not. Raises UnknownModelError, ConfigError."""
        self.residency.pin(name, pinned)

    def rollback(self, name: str) -> None:
        """Back to the version before. Raises UnknownModelError; ConfigError: there is none."""
        self.residency.rollback(name)

    def check(self, request: EngineRequest) -> None:
        """Raises RequestError or UnknownModelError for what could never run. Thread-safe."""
        version = self.residency.current(request.model)
        check_request(request, version.needs.vocab_size, self.max_model_len)

    def add(self, request: EngineRequest) -> None:
        """Queue a request that passed ``check``, for the present version of its delta.

        It ends with an error if that cannot be loaded, or if the delta was unregistered or got a
        version that does not accept the prompt since.
        """
        try:
            self.check(request)
        except RequestError as error:
            self._refuse(request, str(error))
            return
        version = self.residency.current(request.model)
        if version.error is not None:
            self._refuse(request, version.error)
            return
        seed = request.sampling.seed
        seed = secrets.randbits(63) if seed is None else seed
        root = self._root_key(request, version)
        self.scheduler.add(Sequence(request, BASE_SLOT, seed, root=root, version=version))
        self.residency.bind(request.request_id, version)

    def abort(self, request_id: str) -> TokenEvent | None:
        event = self.scheduler.abort(request_id)
        self.residency.ended(request_id)
        return event

    def has_work(self) -> bool:
        """A step would do something: compute, load, or say that a request was refused."""
        return self.scheduler.has_work() or bool(self._refused) or not self.residency.idle

    def step(self) -> list[TokenEvent]:
        """Load, plan, execute, commit one step -> the new tokens."""
        events = self._advance_loads()
        plan = self.scheduler.plan()
        if plan.rows:
            sampled = self.runner.execute(plan, self.residency.device.vocab_sizes)
            events += self.scheduler.commit(plan, sampled)
            self.counters.count(plan, sampled)
            self.residency.count_rows(plan.rows_of_slot)
        elif not events:
            self.residency.wait(LOAD_WAIT_S)
        self._end(events)
        return events

    def dump(self) -> dict[str, Any]:
        """Who is where and waits for what, for people who debug."""
        return {"residency": self.residency.dump()}

    def close(self) -> None:
        """Stop the threads that load deltas; what they read at the moment is dropped."""
        self.residency.loader.close()

    def stats(self) -> EngineStats:
        pool, counters = self.scheduler.pool, self.counters
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            kv_blocks_total=pool.num_blocks,
            kv_blocks_used=pool.num_used,
            steps=counters.steps,
            mixed_steps=counters.mixed_steps,
            max_models_in_step=counters.max_models_in_step,
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            generation_tokens=counters.generation_tokens,
            preemptions=self.scheduler.num_preemptions,
            residency=residency_stats(self.residency),
        )

    def _load_deltas(self) -> None:
        """Those of the configuration that fit; raises ArtifactError for the first that is bad."""
        for source in self.config.deltas:
            self.residency.register(source.name, source.path, load=False)
        for version in self.residency.load_all():
            self.close()
            raise ArtifactError(version.error)

    def _advance_loads(self) -> list[TokenEvent]:
        """Let deltas move -> the ends of requests whose delta cannot be loaded."""
        events, self._refused = self._refused, []
        for version in self.residency.advance():
            for request_id in self.residency.requests_of(version):
                event = self.scheduler.abort(request_id, FinishReason.ERROR, version.error)
                events += [event] if event else []
        return events

    def _refuse(self, request: EngineRequest, reason: str) -> None:
        event = TokenEvent(request.request_id, (), FinishReason.ERROR, reason)
        self._refused.append(event)

    def _end(self, events: list[TokenEvent]) -> None:
        for event in events:
            if event.finish_reason is not None:
                self.residency.ended(event.request_id)

    def _root_key(self, request: EngineRequest, version: DeltaVersion) -> Key | None:
        """Whose computed blocks the request may share: same weights, same salt."""
        if not self.config.enable_prefix_caching:
            return None
        return root_key(version.digest, request.cache_salt)


def check_request(request: EngineRequest, vocab_size: int, max_model_len: int) -> None:
    """Raises RequestError for what could never run; names the field."""
    prompt, max_tokens = request.prompt_ids, request.sampling.max_tokens
    if not prompt:
        raise RequestError("the prompt is empty", param="prompt")
    if max_tokens < 1:
        raise RequestError(f"max_tokens must be at least 1, not {max_tokens}", param="max_tokens")
    if len(prompt) + max_tokens > max_model_len:
        raise RequestError(
            f"this model's maximum context length is {max_model_len} tokens, but the request "
            f"has {len(prompt)} in the prompt and asks for {max_tokens} more",
            param="max_tokens" if len(prompt) < max_model_len else "prompt",
        )
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise RequestError(f"token ids must lie between 0 and {vocab_size - 1}", param="prompt")


def _device(config: EngineConfig) -> str:
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError("device cuda was asked for, but torch sees no CUDA device here")
    return "cuda" if available and config.device != "cpu" else "cpu"


def _dtype(config: EngineConfig, base: Checkpoint) -> torch.dtype:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)  # type: ignore[no-any-return]
    return base.dtype(base.embedding) if base.embedding else torch.float32
