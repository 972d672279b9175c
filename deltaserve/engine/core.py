"""The engine: a base, its deltas, and the step that serves them together."""

from __future__ import annotations

import math
import secrets
import time
from typing import Any

import torch

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.artifact.digest import checkpoint_digest
from deltaserve.config import EngineConfig
from deltaserve.engine.admission import ByteBudget
from deltaserve.engine.deltas import ResidentDeltas
from deltaserve.engine.fairness import make_policy
from deltaserve.engine.families import family_of
from deltaserve.engine.gate import QueueGate
from deltaserve.engine.kv import BlockPool, Key, root_key
from deltaserve.engine.memory import plan_kv
from deltaserve.engine.model import KVCache, load_base, make_delta_aware
from deltaserve.engine.observe import StepCounters, copy_table
from deltaserve.engine.residency import Residency
from deltaserve.engine.routing import BASE_SLOT, StepContext
from deltaserve.engine.runner import Runner
from deltaserve.engine.scheduler import Scheduler
from deltaserve.engine.sequence import Sequence
from deltaserve.engine.types import EngineRequest, EngineStats, ModelInfo, TokenEvent
from deltaserve.errors import ConfigError, RequestError, UnknownModelError


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
        num_blocks, self.max_model_len = plan_kv(config, model_config, dtype, device)
        step = StepContext()
        modules = make_delta_aware(model, base.architecture, step)
        kv = KVCache(model_config, num_blocks * config.block_size, dtype, device)
        self.runner = Runner(model, step, kv, block_size=config.block_size, device=device)
        self.residency = Residency(
            base,
            digest,
            modules,
            vocab_size=model_config.vocab_size,
            dtype=dtype,
            device=device,
            merge_memory=config.merge_memory_bytes,
        )
        for source in config.deltas:
            self.residency.load(source.name, source.path)
        budget = ByteBudget(
            config.slo_tpot_ms,
            base_bytes=base.num_bytes,
            kv_bytes_per_token=KVCache.bytes_per_token(model_config, dtype),
        )
        self.scheduler = self._make_scheduler(num_blocks, budget)
        self.counters = StepCounters()

    def models(self) -> list[ModelInfo]:
        """The base first, then its deltas."""
        base = self.residency.base
        base_name = self.config.served_model_name
        base_info = ModelInfo(
            name=base_name,
            path=str(base.path),
            parent=None,
            digest=self.residency.base_digest,
            full_bytes=base.num_bytes,
            resident_bytes=base.num_bytes,
            disk_bytes=base.num_bytes,
            vocab_size=self.residency.vocab_size,
        )
        deltas = [self.residency.info(name, base_name) for name in self.residency.residents]
        return [base_info, *deltas]

    def check(self, request: EngineRequest) -> None:
        """Raises RequestError for what could never run, an id in use, or a full queue.

        Thread-safe.
        """
        _, vocab_size = self._model_of(request)
        check_request(request, vocab_size, self.max_model_len)
        self.scheduler.check(request)

    def add(self, request: EngineRequest) -> None:
        """Queue a request that passes ``check``; raises what that raises if it no longer does."""
        slot, _ = self._model_of(request)
        seed = request.sampling.seed
        seed = secrets.randbits(63) if seed is None else seed
        self.scheduler.add(Sequence(request, slot, seed, root=self._root_key(request)))

    def abort(self, request_id: str) -> TokenEvent | None:
        return self.scheduler.abort(request_id)

    def has_work(self) -> bool:
        return self.scheduler.has_work()

    def step(self) -> list[TokenEvent]:
        """Plan, execute, commit one step -> the new tokens."""
        started = time.perf_counter()
        plan = self.scheduler.plan()
        if not plan.rows:
            return []
        planned = time.perf_counter()
        sampled = self.runner.execute(plan, self._vocab_sizes())
        executed = time.perf_counter()
        self.scheduler.observe(plan, executed - planned)
        events = self.scheduler.commit(plan, sampled)
        committed = time.perf_counter()
        self.counters.count(plan, planned - started, executed - planned, committed - executed)
        return events

    def stats(self) -> EngineStats:
        """May be called by any thread."""
        scheduler, counters = self.scheduler, self.counters
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_blocks_total=scheduler.pool.num_blocks,
            kv_blocks_used=scheduler.pool.num_used,
            steps=counters.steps,
            mixed_steps=counters.mixed_steps,
            max_models_in_step=counters.max_models_in_step,
            prompt_tokens=scheduler.usage.total.prompt_tokens,
            cached_tokens=scheduler.usage.total.cached_tokens,
            generation_tokens=scheduler.usage.total.generation_tokens,
            preemptions=scheduler.num_preemptions,
            queued_requests=scheduler.gate.num_requests,
            queued_tokens=scheduler.gate.num_tokens,
            max_queued_requests=self.config.max_queued_requests,
            max_queued_tokens=self.config.max_queued_tokens,
            plan_s=counters.plan_s,
            execute_s=counters.execute_s,
            commit_s=counters.commit_s,
            bytes_per_s=scheduler.byte_budget.bytes_per_s,
            tenants=copy_table(scheduler.usage.tenants),
            models=copy_table(scheduler.usage.models),
        )

    def dump(self) -> dict[str, Any]:
        """The scheduler's state as plain JSON, for people who look for a fault."""
        return self.scheduler.dump()

    def _make_scheduler(self, num_blocks: int, byte_budget: ByteBudget) -> Scheduler:
        config = self.config
        residents = self.residency.residents.values()
        return Scheduler(
            BlockPool(num_blocks, config.block_size),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            policy=make_policy(config.scheduling_policy),
            deltas=ResidentDeltas(
                {r.slot: r.delta.manifest.sizes.resident.total for r in residents}
            ),
            byte_budget=byte_budget,
            gate=QueueGate(config.max_queued_requests, config.max_queued_tokens),
            max_wait_s=config.max_wait_s,
        )

    def _model_of(self, request: EngineRequest) -> tuple[int, int]:
        """(slot, vocabulary size) of the model that a request names."""
        if request.model == self.config.served_model_name:
            return BASE_SLOT, self.residency.vocab_size
        resident = self.residency.residents.get(request.model)
        if resident is None:
            raise UnknownModelError(
                f"the model {request.model!r} does not exist; GET /v1/models lists those that do",
                param="model",
            )
        return resident.slot, resident.vocab_size

    def _root_key(self, request: EngineRequest) -> Key | None:
        """Whose computed blocks the request may share: same weights, salt and tenant."""
        if not self.config.enable_prefix_caching:
            return None
        resident = self.residency.residents.get(request.model)
        digest = resident.delta.manifest.digest if resident else self.residency.base_digest
        tenant = "" if self.config.share_prefixes_between_tenants else request.tenant
        return root_key(digest, request.cache_salt, tenant)

    def _vocab_sizes(self) -> dict[int, int]:
        sizes = {r.slot: r.vocab_size for r in self.residency.residents.values()}
        return sizes | {BASE_SLOT: self.residency.vocab_size}


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
    if not 0 < request.weight < math.inf:
        raise RequestError(
            f"a tenant's weight is {request.weight}, but must be positive and finite"
        )


def _device(config: EngineConfig) -> str:
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError("device cuda was asked for, but torch sees no CUDA device here")
    return "cuda" if available and config.device != "cpu" else "cpu"


def _dtype(config: EngineConfig, base: Checkpoint) -> torch.dtype:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)  # type: ignore[no-any-return]
    return base.dtype(base.embedding) if base.embedding else torch.float32
