"""One request as the scheduler sees it: its tokens, how many are computed, its blocks."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from deltaserve.engine.kv import Key, next_key
from deltaserve.engine.observe import Stopwatch
from deltaserve.engine.types import (
    EngineRequest,
    FinishReason,
    TokenEvent,
    TokenLogprobs,
    Usage,
)
from deltaserve.engine.versions import DeltaVersion

if TYPE_CHECKING:
    from deltaserve.engine.grammar import Matcher
    from deltaserve.engine.pooling import Pooled


@dataclass(eq=False, slots=True)
class Sequence:
    """``num_computed`` chases ``num_tokens``: prefill, decode and recomputation are one thing.

    version: the delta that it was bound to when it came. slot: where that lies while the
    sequence runs (0 is the base). blocks: KV blocks, in order of position.
    root: start of the chain of keys of its full blocks; None keeps them to itself. keys: as
    many of them as were needed so far. num_cached: prompt tokens that were found computed
    when the sequence was first admitted. logprobs: of the token drawn last; prompt_logprobs: of
    the prompt from its second token on, as far as computed. Both only where they were asked for.
    pooled: of the prompt's states, where its embedding was asked for.
    matcher: which tokens may come next, where not all may; it has seen all generated ones, and
    computing the sequence again does not touch it. failure: why no token can follow.

    Of the scheduler: number: order of arrival. first_since: when it became the oldest of its
    lane. aged: it was that for too long. holds_delta: acquired and not released. family: itself
    and its siblings, oldest first, where there are any.
    """

    request: EngineRequest
    slot: int
    seed: int
    token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    root: Key | None = None
    keys: list[Key] = field(default_factory=list)
    num_cached: int | None = None
    version: DeltaVersion | None = None
    number: int = 0
    first_since: float | None = None
    aged: bool = False
    holds_delta: bool = False
    family: dict[Sequence, None] | None = None
    watch: Stopwatch = field(default_factory=Stopwatch)
    usages: tuple[Usage, ...] = ()
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    pooled: Pooled | None = None
    matcher: Matcher | None = None
    failure: str | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_generated(self) -> int:
        return self.num_tokens - self.num_prompt

    @property
    def delta_key(self) -> Hashable:
        """Equal for requests that run on the same weights."""
        return self.request.model if self.version is None else self.version

    def keys_of(self, count: int, block_size: int) -> list[Key]:
        """Keys of the first ``count`` blocks, which are full of known tokens."""
        if self.root is None:
            return []
        while len(self.keys) < count:
            start = len(self.keys) * block_size
            parent = self.keys[-1] if self.keys else self.root
            self.keys.append(next_key(parent, self.token_ids[start : start + block_size]))
        return self.keys[:count]

    def is_sibling(self, other: Sequence) -> bool:
        """Same prompt, weights, tenant and salt: may their blocks be the same?"""
        mine, others = self.request, other.request
        return (
            self.delta_key == other.delta_key
            and (mine.tenant, mine.cache_salt) == (others.tenant, others.cache_salt)
            and mine.prompt_ids == others.prompt_ids
        )

    def waits_for_sibling(self, block_size: int) -> bool:
        """Is an older sibling still to compute the blocks of the prompt that both need?"""
        if self.family is None:
            return False
        eldest = next(iter(self.family))
        shared = (self.num_prompt - 1) // block_size * block_size
        return eldest is not self and eldest.num_computed < shared

    def append(self, token_id: int) -> FinishReason | None:
        """Add a generated token; the reason why the sequence ends with it, if it does."""
        self.token_ids.append(token_id)
        if self.failure is not None:
            return FinishReason.REFUSED
        if self.matcher is not None and self.matcher.is_finished:
            return FinishReason.STOP
        if token_id in self.request.sampling.stop_token_ids:
            return FinishReason.STOP
        if self.num_generated >= self.request.sampling.max_tokens:
            return FinishReason.LENGTH
        return None

    def event(self, token_id: int, reason: FinishReason | None) -> TokenEvent:
        """What the submitter is told of a token that was just appended."""
        params = self.request.sampling
        # With max_tokens 0 the token only marks the end of the prompt.
        wanted = params.max_tokens > 0 and self.failure is None
        first = self.num_generated == 1 and params.prompt_logprobs is not None
        return TokenEvent(
            self.request.request_id,
            (token_id,) if wanted else (),
            reason,
            self.failure,
            num_cached=self.num_cached or 0,
            logprobs=(self.logprobs,) if self.logprobs is not None and wanted else None,
            prompt_logprobs=tuple(self.prompt_logprobs) if first else None,
            embedding=self.pooled.mean() if self.pooled and self.num_generated == 1 else None,
        )

    def describe(self, now: float) -> dict[str, Any]:
        """Its state as plain JSON; no word of its prompt."""
        return {
            "request_id": self.request.request_id,
            "model": self.request.model,
            "tenant": self.request.tenant,
            "priority": self.request.priority,
            "phase": self.watch.phase.name.lower(),
            "aged": self.aged,
            "slot": self.slot,
            "prompt_tokens": self.num_prompt,
            "generated_tokens": self.num_generated,
            "computed_tokens": self.num_computed,
            "blocks": len(self.blocks),
            "seconds": asdict(self.watch.read(now)),
        }
