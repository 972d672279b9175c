"""The engine: a base, its deltas, and the step that serves them together."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.artifact.digest import checkpoint_digest
from deltaserve.config import EngineConfig
from deltaserve.engine.deterministic import DeterministicRunner
from deltaserve.engine.families import family_of
from deltaserve.engine.grammar import AllowedTokens, Preparing, Vocabulary
from deltaserve.engine.kv import BlockPool, Key, root_key
from deltaserve.engine.memory import plan_kv
from deltaserve.engine.model import KVCache, load_base, make_delta_aware
from deltaserve.engine.residency import Residency
from deltaserve.engine.routing import BASE_SLOT, StepContext
from deltaserve.engine.runner import Runner
from deltaserve.engine.scheduler import Scheduler, StepPlan
from deltaserve.engine.sequence import Sequence
from deltaserve.engine.types import (
    EngineRequest,
    EngineStats,
    ModelInfo,
    SamplingParams,
    TokenEvent,
)
from deltaserve.errors import ConfigError, RequestError, UnknownModelError


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
            self.generation_tokens += seq.request.sampling.max_tokens > 0
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
        num_blocks, self.max_model_len = plan_kv(config, model_config, dtype, device)
        step = StepContext()
        modules = make_delta_aware(model, base.architecture, step)
        runner = DeterministicRunner if config.deterministic else Runner
        # One slot more than the blocks have: deterministic mode writes its padding there.
        num_slots = num_blocks * config.block_size + config.deterministic
        kv = KVCache(model_config, num_slots, dtype, device)
        self.runner = runner(model, step, kv, block_size=config.block_size, device=device)
        self.scheduler = Scheduler(
            BlockPool(num_blocks, config.block_size),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
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
        self.preparing = Preparing()
        self.counters = Counters()

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
        """Raises RequestError or UnknownModelError for what could never run. Thread-safe."""
        _, vocab_size = self._model_of(request)
        check_request(request, vocab_size, self.max_model_len)

    def add(self, request: EngineRequest) -> None:
        """Queue a request that passes ``check``."""
        slot, vocab_size = self._model_of(request)
        seed = request.sampling.seed
        seed = secrets.randbits(63) if seed is None else seed
        seq = Sequence(request, slot, seed, root=self._root_key(request))
        if request.sampling.allowed_token_ids is not None:
            seq.matcher = AllowedTokens(request.sampling.allowed_token_ids, vocab_size)
        if request.sampling.grammar is not None:
            self.preparing.add(seq, self._vocabulary(request.model, vocab_size))
        else:
            self.scheduler.add(seq)

    def abort(self, request_id: str) -> TokenEvent | None:
        return self.preparing.abort(request_id) or self.scheduler.abort(request_id)

    def has_work(self) -> bool:
        return bool(self.preparing) or self.scheduler.has_work()

    def step(self) -> list[TokenEvent]:
        """Plan, execute, commit one step -> the new tokens.

        One token per drawing row. Prompt-lookup speculation would plan rows that end with guessed
        tokens, keep the logits of each of their positions (as prompt logprobs do), let execute
        return several tokens for a row (a matcher must then be able to go back), and commit move
        ``num_computed`` to the last accepted one; a row that starts where its sequence stands
        and an event of several tokens exist already.
        """
        ready, events = self.preparing.take()
        for seq in ready:
            self.scheduler.add(seq)
        plan = self.scheduler.plan()
        if not plan.rows:
            self.preparing.wait()
            return events
        sampled = self.runner.execute(plan, self._vocab_sizes())
        events += self.scheduler.commit(plan, sampled)
        self.counters.count(plan, sampled)
        return events

    def stats(self) -> EngineStats:
        pool, counters = self.scheduler.pool, self.counters
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting) + len(self.preparing),
            kv_blocks_total=pool.num_blocks,
            kv_blocks_used=pool.num_used,
            steps=counters.steps,
            mixed_steps=counters.mixed_steps,
            max_models_in_step=counters.max_models_in_step,
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            generation_tokens=counters.generation_tokens,
            preemptions=self.scheduler.num_preemptions,
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
        """Whose computed blocks the request may share: same weights, same salt.

        None with prompt logprobs: what would be reused has no logits to take them from.
        """
        if not self.config.enable_prefix_caching or request.sampling.prompt_logprobs is not None:
            return None
        resident = self.residency.residents.get(request.model)
        digest = resident.delta.manifest.digest if resident else self.residency.base_digest
        return root_key(digest, request.cache_salt)

    def _vocabulary(self, model: str, vocab_size: int) -> Vocabulary:
        """Where the tokens are spelled that a model's grammars are written in."""
        base = self.residency.base
        resident = self.residency.residents.get(model)
        if resident is None:
            return Vocabulary(model, self.residency.base_digest, (base.path,), vocab_size)
        delta = resident.delta
        return Vocabulary(model, delta.manifest.digest, (delta.path, base.path), vocab_size)

    def _vocab_sizes(self) -> dict[int, int]:
        sizes = {r.slot: r.vocab_size for r in self.residency.residents.values()}
        return sizes | {BASE_SLOT: self.residency.vocab_size}


def check_request(request: EngineRequest, vocab_size: int, max_model_len: int) -> None:
    """Raises RequestError for what could never run; names the field."""
    prompt, max_tokens = request.prompt_ids, request.sampling.max_tokens
    if not prompt:
        raise RequestError("the prompt is empty", param="prompt")
    least = 1 if request.sampling.prompt_logprobs is None else 0
    if max_tokens < least:
        raise RequestError(
            f"max_tokens must be at least {least}, not {max_tokens}", param="max_tokens"
        )
    if len(prompt) + max_tokens > max_model_len:
        raise RequestError(
            f"this model's maximum context length is {max_model_len} tokens, but the request "
            f"has {len(prompt)} in the prompt and asks for {max_tokens} more",
            param="max_tokens" if len(prompt) < max_model_len else "prompt",
        )
    _check_allowed(request.sampling, vocab_size)
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise RequestError(f"token ids must lie between 0 and {vocab_size - 1}", param="prompt")


def _check_allowed(sampling: SamplingParams, vocab_size: int) -> None:
    allowed = sampling.allowed_token_ids
    if allowed is None:
        return
    problem = None
    if sampling.grammar is not None:
        problem = "allowed_token_ids and a grammar exclude each other: send one of them"
    elif not allowed:
        problem = "allowed_token_ids is empty: nothing could be generated"
    elif min(allowed) < 0 or max(allowed) >= vocab_size:
        problem = f"allowed_token_ids must lie between 0 and {vocab_size - 1}"
    elif sampling.min_tokens and sampling.stop_token_ids.issuperset(allowed):
        problem = "allowed_token_ids holds only stop tokens, which min_tokens forbids"
    if problem is not None:
        raise RequestError(problem, param="allowed_token_ids")


def _device(config: EngineConfig) -> str:
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError("device cuda was asked for, but torch sees no CUDA device here")
    return "cuda" if available and config.device != "cpu" else "cpu"


def _dtype(config: EngineConfig, base: Checkpoint) -> torch.dtype:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)  # type: ignore[no-any-return]
    return base.dtype(base.embedding) if base.embedding else torch.float32
