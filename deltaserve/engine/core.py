"""The engine: a base, its deltas, and the step that serves them together."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltaserve.config import EngineConfig, check_names
from deltaserve.engine.admission import ByteBudget
from deltaserve.engine.arena import reserve
from deltaserve.engine.base import Base
from deltaserve.engine.checks import check_request
from deltaserve.engine.deterministic import DeterministicRunner
from deltaserve.engine.fairness import make_policy
from deltaserve.engine.gate import QueueGate
from deltaserve.engine.grammar import AllowedTokens, Preparing, Vocabulary
from deltaserve.engine.info import base_version, model_infos, residency_stats
from deltaserve.engine.kv import BlockPool, Key, root_key
from deltaserve.engine.loader import Loader, Reader, delta_sizes
from deltaserve.engine.memory import out_of_memory, plan_memory, relieve
from deltaserve.engine.model import KVCache, make_delta_aware, widest_projection
from deltaserve.engine.observe import StepCounters, copy_table
from deltaserve.engine.operands import OperandMaker
from deltaserve.engine.pace import Pace
from deltaserve.engine.parts import Parts
from deltaserve.engine.probe import Prober
from deltaserve.engine.residency import Residency
from deltaserve.engine.routing import BASE_SLOT, StepContext
from deltaserve.engine.runner import Runner, capture_decoding
from deltaserve.engine.scheduler import Scheduler, StepPlan
from deltaserve.engine.sequence import Sequence
from deltaserve.engine.types import EngineRequest, EngineStats, FinishReason, ModelInfo, TokenEvent
from deltaserve.engine.versions import DeltaVersion
from deltaserve.errors import ArtifactError, DeltaServeError, QueueFullError, RequestError
from deltaserve.kernels.attention.batch import span_of
from deltaserve.kernels.delta_matmul.crossover import dense_rows

logger = logging.getLogger(__name__)

# How long a step without rows waits for a load, so that it neither spins nor oversleeps.
LOAD_WAIT_S = 0.005


class Engine:
    """Synchronous and single-threaded: ``add``, then ``step`` until done."""

    clock: Callable[[], float] = staticmethod(time.monotonic)
    """Seconds; a simulation has its own."""

    def __init__(self, config: EngineConfig) -> None:
        """Load base and deltas. Raises DeltaServeError for whatever the user must mend."""
        self.config = config
        self.base = base = Base.load(config)
        model_config, dtype, device = base.config, base.dtype, base.device
        memory = plan_memory(config, model_config, dtype, device, delta_sizes(config))
        self.max_model_len = memory.max_model_len
        step = StepContext()
        modules = make_delta_aware(base.model, base.checkpoint.architecture, step)
        # One block more: steps of a fixed shape write their padding there.
        num_slots = (memory.num_blocks + 1) * config.block_size
        kv = KVCache(model_config, num_slots, dtype, device)
        vocab_size = model_config.vocab_size
        arena = reserve(memory.limits.device_bytes, device)
        self.pace = Pace()
        self.residency = Residency(
            Parts(
                Reader(base.digest),
                OperandMaker(base.checkpoint, modules, vocab_size, dtype, device, arena, self.pace),
                Prober(),
                Loader(config.load_timeout_s),
                base_version(config.served_model_name, base, vocab_size),
            ),
            memory.limits,
        )
        runner = DeterministicRunner if config.deterministic else Runner
        self.runner = runner(
            base.model,
            step,
            kv,
            block_size=config.block_size,
            device=device,
            span=span_of(self.max_model_len),
        )
        budget = ByteBudget(
            config.slo_tpot_ms,
            base_bytes=base.num_bytes,
            kv_bytes_per_token=KVCache.bytes_per_token(model_config, dtype),
        )
        self.scheduler = self._make_scheduler(memory.num_blocks, budget)
        self.preparing = Preparing()
        self.counters = StepCounters()
        self._refused: list[TokenEvent] = []
        self._load_deltas()
        if device == "cuda":
            step.dense_rows = dense_rows(widest_projection(modules))
            if not (config.enforce_eager or config.deterministic):
                capture_decoding(self.runner, model_config, config.max_num_seqs, self.max_model_len)

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
        """Raises RequestError for what could never run, an id in use, or a full queue.

        Thread-safe.
        """
        version = self.residency.current(request.model)
        check_request(request, version.needs.vocab_size, self.max_model_len)
        self._check_queue(request)

    def add(self, request: EngineRequest) -> None:
        """Queue a request that passed ``check``, for the present version of its delta.

        Raises what ``scheduler.check`` raises. It ends with an error if its delta cannot be loaded,
        was unregistered since, or got a version that does not accept the prompt.
        """
        self._check_queue(request)
        try:
            version = self.residency.current(request.model)
            check_request(request, version.needs.vocab_size, self.max_model_len)
        except RequestError as error:
            self._refuse(request, str(error))
            return
        if version.error is not None:
            self._refuse(request, version.error)
            return
        sampling = request.sampling
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        root = self._root_key(request, version)
        seq = Sequence(request, BASE_SLOT, seed, root=root, version=version)
        if sampling.grammar is not None:
            self.preparing.add(seq, self._vocabulary(version))
        else:
            if sampling.allowed_token_ids is not None:
                vocab_size = version.needs.vocab_size
                seq.matcher = AllowedTokens(sampling.allowed_token_ids, vocab_size)
            self.scheduler.add(seq)
        self.residency.bind(request.request_id, version)

    def abort(self, request_id: str) -> TokenEvent | None:
        event = self._drop(request_id, FinishReason.ABORT)
        self.residency.ended(request_id)
        return event

    def has_work(self) -> bool:
        """A step would do something: compute, load, or say that a request was refused."""
        waiting = bool(self._refused) or bool(self.preparing)
        return self.scheduler.has_work() or waiting or not self.residency.idle

    def step(self) -> list[TokenEvent]:
        """Load, plan, execute, commit one step -> the new tokens.

        One token per drawing row. Prompt-lookup speculation would plan rows that end with guessed
        tokens, keep the logits of each of their positions (as prompt logprobs do), let execute
        return several tokens for a row (a matcher must then be able to go back), and commit move
        ``num_computed`` to the last accepted one; a row that starts where its sequence stands
        and an event of several tokens exist already.
        """
        events = self._advance_loads() + self._take_prepared()
        started = self.clock()
        plan = self.scheduler.plan()
        merging = self.residency.merger.merging
        gaining = sum(row.seq.version is merging for row in plan.rows) if merging else 0
        self.pace.divide(len(plan.rows), self.residency.demand.num_requests, gaining)
        if plan.rows:
            events += self._compute(plan, started)
        elif not events:
            self.preparing.wait()
            self.residency.wait(LOAD_WAIT_S)
        self._end(events)
        return events

    def _compute(self, plan: StepPlan, started: float) -> list[TokenEvent]:
        """Execute and commit what was planned."""
        planned = self.clock()
        try:
            sampled = self.runner.execute(plan, self.residency.device.vocab_sizes)
        except Exception as error:
            if not out_of_memory(error):
                raise
            return self._shed(plan, error)
        executed = self.clock()
        self.scheduler.observe(plan, executed - planned)
        events = self.scheduler.commit(plan, sampled)
        committed = self.clock()
        self.counters.count(plan, planned - started, executed - planned, committed - executed)
        self.residency.count_rows(plan.rows_of_slot)
        return events

    def _shed(self, plan: StepPlan, error: Exception) -> list[TokenEvent]:
        """The step found no memory: end the request that asked most of it, the youngest of equals.
        Nothing was committed, so the others are computed again without it."""
        row = max(plan.rows, key=lambda row: (row.num_new, row.seq.number))
        logger.error(
            "a step of %d tokens ran out of memory, %s is ended: %s",
            plan.num_tokens,
            row.seq.request.request_id,
            error,
        )
        relieve(self.runner.device)
        event = self.scheduler.abort(
            row.seq.request.request_id,
            FinishReason.ERROR,
            f"out of memory: of the step's {plan.num_tokens} tokens {row.num_new} were this "
            "request's, the most of all; send less at once, or have max_num_batched_tokens, "
            "kv_cache_memory_bytes or delta_memory_bytes lowered",
        )
        return [] if event is None else [event]

    def close(self) -> None:
        """Stop the threads that load deltas; what they read at the moment is dropped."""
        self.residency.loader.close()

    def stats(self) -> EngineStats:
        """May be called by any thread."""
        scheduler, counters = self.scheduler, self.counters
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self.preparing),
            kv_blocks_total=scheduler.pool.num_blocks,
            kv_blocks_used=scheduler.pool.num_used,
            steps=counters.steps,
            mixed_steps=counters.mixed_steps,
            max_models_in_step=counters.max_models_in_step,
            delta_segments=counters.delta_segments,
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
            residency=residency_stats(self.residency),
        )

    def dump(self) -> dict[str, Any]:
        """The present state as plain JSON, for people who look for a fault."""
        return {**self.scheduler.dump(), "residency": self.residency.dump()}

    def _make_scheduler(self, num_blocks: int, byte_budget: ByteBudget) -> Scheduler:
        config = self.config
        return Scheduler(
            BlockPool(num_blocks, config.block_size),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            policy=make_policy(config.scheduling_policy),
            deltas=self.residency,
            byte_budget=byte_budget,
            gate=QueueGate(config.max_queued_requests, config.max_queued_tokens),
            max_wait_s=config.max_wait_s,
            clock=self.clock,
        )

    def _load_deltas(self) -> None:
        """Those of the configuration that fit; raises for the first required one that is bad."""
        optional = {source.name for source in self.config.deltas if not source.required}
        for source in self.config.deltas:
            try:
                self.residency.register(source.name, source.path, pinned=source.pinned, load=False)
            except DeltaServeError as error:
                if source.required:
                    raise
                logger.error("the delta %s is not served: %s", source.name, error)
        for version in self.residency.load_all():
            if version.name not in optional:
                self.close()
                raise ArtifactError(version.error)

    def _advance_loads(self) -> list[TokenEvent]:
        """Let deltas move -> the ends of requests whose delta cannot be loaded."""
        events, self._refused = self._refused, []
        for version in self.residency.advance():
            for request_id in self.residency.requests_of(version):
                event = self._drop(request_id, FinishReason.ERROR, version.error)
                events += [event] if event else []
        return events

    def _take_prepared(self) -> list[TokenEvent]:
        """Queue the requests whose grammar is ready -> the ends of those that cannot be."""
        ready, events = self.preparing.take()
        for seq in ready:
            try:
                self.scheduler.add(seq)
            except RequestError as error:  # the queue filled up meanwhile
                name = seq.request.request_id
                events.append(TokenEvent(name, (), FinishReason.ERROR, str(error)))
        return events

    def _drop(
        self, request_id: str, reason: FinishReason, error: str | None = None
    ) -> TokenEvent | None:
        """End a request, whatever it waits for; None when it is not here (any more)."""
        if self.preparing.drop(request_id):
            return TokenEvent(request_id, (), reason, error)
        return self.scheduler.abort(request_id, reason, error)

    def _check_queue(self, request: EngineRequest) -> None:
        """Also against what waits for its grammar: the scheduler does not know that yet."""
        self.scheduler.check(request)
        if request.request_id in self.preparing:
            raise RequestError(f"request id {request.request_id!r} is in use")
        waits = request.sampling.grammar is not None
        if waits and len(self.preparing) >= self.config.max_queued_requests:
            raise QueueFullError("too many grammars wait to be compiled", retry_after_s=1)

    def _refuse(self, request: EngineRequest, reason: str) -> None:
        event = TokenEvent(request.request_id, (), FinishReason.ERROR, reason)
        self._refused.append(event)

    def _end(self, events: list[TokenEvent]) -> None:
        for event in events:
            if event.finish_reason is not None:
                self.residency.ended(event.request_id)

    def _root_key(self, request: EngineRequest, version: DeltaVersion) -> Key | None:
        """Whose computed blocks the request may share: same weights, salt and tenant.

        None with what is taken from all of the prompt: what would be reused has no states.
        """
        sampling = request.sampling
        whole = sampling.prompt_logprobs is not None or sampling.pooling == "mean"
        if not self.config.enable_prefix_caching or whole:
            return None
        tenant = "" if self.config.share_prefixes_between_tenants else request.tenant
        return root_key(version.digest, request.cache_salt, tenant)

    def _vocabulary(self, version: DeltaVersion) -> Vocabulary:
        """Where the tokens are spelled that a model's grammars are written in."""
        own, base = Path(version.path), self.base.checkpoint.path
        directories = (base,) if own == base else (own, base)
        return Vocabulary(version.name, version.digest, directories, version.needs.vocab_size)
