"""Which tokens may come next: grammars (by llguidance), and lists of allowed tokens.

A grammar is compiled beside the steps, by threads of its own: its request waits for it, and
nobody else does. From then on its matcher follows the answer token by token.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Items
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from deltaserve.engine.sequence import Sequence
from deltaserve.engine.tokenizer import Spelling, has_own_tokenizer, load_tokenizer
from deltaserve.engine.types import FinishReason, Grammar, TokenEvent
from deltaserve.errors import DeltaServeError, RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

logger = logging.getLogger(__name__)

WHITESPACE = r"[ \n\r\t]{0,16}"
"""Between the parts of JSON. Bounded, because some models would write nothing else."""
MAX_COMPILED = 16
"""Grammars that stay compiled for the next request. A hostile one holds up to 50 MB."""
FIRST_FUEL, STEP_FUEL, LEXER_STATES = 600_000, 50_000, 50_000
"""What a grammar may cost, in llguidance's units: the first mask about 0.1 s, each further one some
milliseconds, all of them 50 MB. Ordinary grammars need a hundredth; 1000 long choices a half."""
MAX_FORCED = 256
"""Bytes that a grammar leaves no choice about and that are encoded at once. There may be
millions, which would be encoded anew for each token while all other requests wait."""
WAIT_SECONDS = 0.005
THREADS = 4


class Matcher(Protocol):
    """Follows one answer."""

    def mask(self) -> np.ndarray:
        """[V] bool: the tokens that may come next. All False is a dead end."""
        ...

    def accept(self, token_id: int) -> None:
        """Go on behind a token that the mask allowed."""
        ...

    @property
    def is_finished(self) -> bool:
        """The answer is complete and nothing can follow."""
        ...


class AllowedTokens:
    """Always the same tokens."""

    is_finished = False

    def __init__(self, token_ids: Items[int], vocab_size: int) -> None:
        self._mask_V = np.zeros(vocab_size, dtype=bool)
        self._mask_V[list(token_ids)] = True

    def mask(self) -> np.ndarray:
        return self._mask_V

    def accept(self, token_id: int) -> None:
        pass


class GrammarMatcher:
    """A grammar's state behind the answer so far. The request's stop tokens are allowed exactly
    where the grammar may end."""

    def __init__(self, inner: LLMatcher, vocab_size: int, stop_token_ids: frozenset[int]) -> None:
        self._inner = inner
        self._vocab_size = vocab_size
        self._stops = [token for token in stop_token_ids if token < vocab_size]
        # One token more than the vocabulary's: see ``Vocabulary.ll``.
        self._bits_W = np.zeros(vocab_size // 32 + 1, dtype=np.int32)

    def mask(self) -> np.ndarray:
        self._inner.unsafe_compute_mask_ptr(self._bits_W.ctypes.data, self._bits_W.nbytes)
        bits = np.unpackbits(self._bits_W.view(np.uint8), bitorder="little")
        mask_V = bits[: self._vocab_size].astype(bool)
        mask_V[self._stops] = self._inner.is_accepting()
        if self._inner.is_error():  # its limits were reached
            mask_V[:] = False
        return mask_V

    def accept(self, token_id: int) -> None:
        if token_id not in self._stops:
            self._inner.consume_token(token_id)

    @property
    def is_finished(self) -> bool:
        return self._inner.is_stopped() and not self._inner.is_error()


@dataclass(frozen=True)
class Vocabulary:
    """Whose tokens a grammar is written in: a model's directories, its own first."""

    model: str
    digest: str
    directories: tuple[Path, ...]
    vocab_size: int

    @cached_property
    def ll(self) -> LLTokenizer:
        """llguidance's form: about 0.3 s for 128,000 tokens, during which no Python runs.

        Its end token is one that no model has, so that the request's own stop tokens count and
        no others.
        """
        tokenizer = load_tokenizer(self.model, self.directories)
        spelling = Spelling(tokenizer)
        spelled = [spelling.of(token) for token in range(self.vocab_size)]
        silent = [t for t, text in enumerate(spelled) if not text or t in spelling.special_ids]
        for token in silent:
            spelled[token] = spelled[token] or b"<%d>" % token
        tokens = _Tokens(
            [*spelled, b"<end>"],
            [*silent, self.vocab_size],
            lambda text: list(tokenizer.encode(text, add_special_tokens=False)),
        )
        ll = _llguidance()
        made: LLTokenizer = ll.LLTokenizer(ll.TokenizerWrapper(tokens), eos_token=self.vocab_size)
        return made


class _Tokens:
    """A vocabulary as llguidance asks for it; the last token ends.

    Called, it encodes what a grammar leaves no choice about, so that the model reads what it is
    used to. Where the tokenizer adds or loses something on the way (a space in front, unknown
    characters, the name of a special token), the longest tokens that fit take its place.
    """

    bos_token_id = None

    def __init__(
        self,
        tokens: list[bytes],
        special_token_ids: list[int],
        encode: Callable[[str], list[int]],
    ) -> None:
        self.tokens = tokens
        self.special_token_ids = special_token_ids
        self.eos_token_id = special_token_ids[-1]
        self._encode = encode
        self._special = frozenset(special_token_ids)
        self._id_of = {text: i for i, text in enumerate(tokens) if i not in self._special}
        self._longest = max(map(len, self._id_of), default=0)

    def __call__(self, text: bytes) -> list[int]:
        text = text[:MAX_FORCED]
        found = self._encode(text.decode(errors="replace"))
        spelled = b"".join(self.tokens[token] for token in found)
        if spelled == text and self._special.isdisjoint(found):
            return found
        found = []
        while text:
            lengths = range(min(self._longest, len(text)), 0, -1)
            length = next((n for n in lengths if text[:n] in self._id_of), 0)
            if length == 0:
                break
            found.append(self._id_of[text[:length]])
            text = text[length:]
        return found


def check_grammar(grammar: Grammar) -> None:
    """Raises RequestError for what is no grammar. Takes milliseconds; thread-safe."""
    message = _llguidance().LLMatcher.validate_grammar(_source(grammar))
    if message and not message.startswith("WARNING"):
        raise _unusable(grammar, message)


def _source(grammar: Grammar) -> str:
    """In llguidance's own notation."""
    matcher = _llguidance().LLMatcher
    try:
        match grammar.kind:
            case "regex":
                source = matcher.grammar_from_regex(grammar.text)
            case "lark":
                source = matcher.grammar_from_lark(grammar.text)
            case "json_schema":
                options = {"whitespace_pattern": WHITESPACE}
                source = matcher.grammar_from_json_schema(grammar.text, overrides=options)
    except ValueError as error:
        raise _unusable(grammar, str(error)) from error
    return str(source)


def _unusable(grammar: Grammar, reason: str) -> RequestError:
    kind = {"json_schema": "JSON schema", "lark": "grammar"}.get(grammar.kind, grammar.kind)
    return RequestError(f"not a usable {kind}: {' '.join(reason.split())[:500]}")


def _llguidance() -> Any:
    """Here, because an engine without grammars runs without it."""
    try:
        import llguidance
    except ImportError:
        raise RequestError("structured output needs 'pip install llguidance'") from None
    return llguidance


class Compiler:
    """Compiled grammars, the most recently used kept. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._vocabularies: dict[tuple[str, int], Vocabulary] = {}
        self._compiled: OrderedDict[tuple[str, str, Grammar], LLMatcher] = OrderedDict()

    def matcher(
        self, tenant: str, grammar: Grammar, vocabulary: Vocabulary, stop_token_ids: frozenset[int]
    ) -> GrammarMatcher:
        """Raises RequestError for a bad grammar, CheckpointError for a missing tokenizer.

        Each tenant has grammars of its own: else the time that compiling takes would tell which
        ones the others use.
        """
        key = (tenant, vocabulary.digest, grammar)
        with self._lock:
            inner = self._compiled.get(key)
        if inner is None:
            inner = self._compile(grammar, vocabulary)
        with self._lock:
            self._compiled[key] = inner
            self._compiled.move_to_end(key)
            while len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return GrammarMatcher(inner.deep_copy(), vocabulary.vocab_size, stop_token_ids)

    def _compile(self, grammar: Grammar, vocabulary: Vocabulary) -> LLMatcher:
        with self._lock:  # each vocabulary once
            tokenizer = self._shared(vocabulary).ll
        ll = _llguidance()
        limits = ll.LLParserLimits(
            initial_lexer_fuel=FIRST_FUEL,
            step_lexer_fuel=STEP_FUEL,
            max_lexer_states=LEXER_STATES,
        )
        inner: LLMatcher = ll.LLMatcher(tokenizer, _source(grammar), log_level=0, limits=limits)
        # Most of the work is in the first mask, so it is done here and not while others wait.
        inner.compute_bitmask()
        if inner.is_error():
            raise _unusable(grammar, inner.get_error())
        return inner

    def _shared(self, vocabulary: Vocabulary) -> Vocabulary:
        """The same object for all models that have the same tokenizer files."""
        own = [path for path in vocabulary.directories[:-1] if has_own_tokenizer(path)]
        key = (vocabulary.digest if own else "", vocabulary.vocab_size)
        return self._vocabularies.setdefault(key, vocabulary)


@dataclass(eq=False)
class _Wait:
    """A request's grammar. future: of its compilation, once that has begun."""

    tenant: str
    work: Callable[[], GrammarMatcher]
    future: Future[GrammarMatcher] | None = None


class Preparing:
    """Requests that wait for their grammar. Oldest first, but one tenant's leave a thread to the
    others'."""

    def __init__(self) -> None:
        self._compiler = Compiler()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="deltaserve-grammar")
        self._waiting: dict[Sequence, _Wait] = {}
        self._busy: list[tuple[str, Future[GrammarMatcher]]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, seq: Sequence, vocabulary: Vocabulary) -> None:
        sampling = seq.request.sampling
        assert sampling.grammar is not None
        tenant = seq.request.tenant
        work = partial(
            self._compiler.matcher, tenant, sampling.grammar, vocabulary, sampling.stop_token_ids
        )
        self._waiting[seq] = _Wait(tenant, work)
        self._begin()

    def _begin(self) -> None:
        """Give free threads work. What was dropped keeps its thread until it ends."""
        self._busy = [(tenant, future) for tenant, future in self._busy if not future.done()]
        running = Counter(tenant for tenant, _ in self._busy)
        for wait_ in self._waiting.values():
            if len(self._busy) == THREADS:
                return
            if wait_.future is None and running[wait_.tenant] < THREADS - 1:
                wait_.future = self._pool.submit(wait_.work)
                self._busy.append((wait_.tenant, wait_.future))
                running[wait_.tenant] += 1

    def __contains__(self, request_id: str) -> bool:
        return any(seq.request.request_id == request_id for seq in list(self._waiting))

    def drop(self, request_id: str) -> bool:
        """Forget a request, if it waits here."""
        for seq in self._waiting:
            if seq.request.request_id == request_id:
                del self._waiting[seq]
                return True
        return False

    def take(self) -> tuple[list[Sequence], list[TokenEvent]]:
        """The sequences whose grammar is ready, and the ends of those for which it failed."""
        ready, failed = [], []
        done = [(seq, w.future) for seq, w in self._waiting.items() if w.future and w.future.done()]
        for seq, future in done:
            del self._waiting[seq]
            try:
                seq.matcher = future.result()
                ready.append(seq)
            except Exception as error:  # whatever a tokenizer's files hold, the others go on
                if not isinstance(error, DeltaServeError):
                    logger.exception("a grammar could not be compiled")
                wrong = isinstance(error, RequestError)
                reason = FinishReason.REFUSED if wrong else FinishReason.ERROR
                failed.append(TokenEvent(seq.request.request_id, (), reason, str(error)))
        self._begin()
        return ready, failed

    def wait(self) -> None:
        """Until one is ready, but not long: for an engine that has nothing else to do."""
        if self._waiting:
            wait([future for _, future in self._busy], WAIT_SECONDS, FIRST_COMPLETED)
