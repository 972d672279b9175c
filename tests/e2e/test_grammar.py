"""Whatever a model would like to say, its answer matches the grammar that was asked for."""

from __future__ import annotations

import json
import os
import re
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.compress.plan import make_plan
from deltaserve.compress.run import compress
from deltaserve.demo.tokenizer import build_tokenizer
from deltaserve.engine import grammar as grammars
from deltaserve.engine.core import Engine
from deltaserve.engine.model import KVCache
from deltaserve.engine.tokenizer import load_tokenizer
from deltaserve.engine.types import EngineRequest, FinishReason, Grammar, SamplingParams
from deltaserve.errors import RequestError
from tests.engine_helpers import BASE, make_engine
from tests.families import COMMON, make_fine_tune
from tests.unit.server.tiny_tokenizer import byte_level_tokenizer

ADDED = "true"  # a token of the fine-tune alone, and a word of JSON
MODELS = (BASE, "tune", "grown")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "ok": {"type": "boolean"},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "ok", "tags"],
    "additionalProperties": False,
}


class World:
    """A base, a fine-tune, and one with a token more; each with its real tokenizer."""

    def __init__(self, root: Path, tokenizer: Any, grown: Any) -> None:
        self.base = root / "base"
        config = AutoConfig.for_model("llama", **{**COMMON, "vocab_size": len(tokenizer) + 5})
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(self.base)
        tokenizer.save_pretrained(self.base)
        self.deltas = {}
        self.tokenizers = {BASE: tokenizer, "tune": tokenizer, "grown": grown}
        for seed, name in enumerate(("tune", "grown"), start=1):
            make_fine_tune(self.base, root / name, seed=seed)
            self.tokenizers[name].save_pretrained(root / name)
            self.deltas[name] = root / f"{name}.delta"
            compress(self.base, root / name, self.deltas[name], make_plan(codec="raw"))
        self.engine = make_engine(self.base, self.deltas)
        self.eos = tokenizer.eos_token_id


@pytest.fixture(scope="module", params=["byte-level", "words and characters"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("grammar")
    make: Any = byte_level_tokenizer if request.param == "byte-level" else build_tokenizer
    return World(root, make(), make(added=(ADDED,)))


def ask(world: World, name: str, model: str, grammar: Grammar | None, **params: Any) -> Any:
    defaults = {
        "max_tokens": 100, "temperature": 1.5, "seed": 3, "stop_token_ids": frozenset({world.eos}),
        "grammar": grammar,
    }  # fmt: skip
    return EngineRequest(name, model, (5, 6, 7), SamplingParams(**{**defaults, **params}))


def answers(
    world: World, requests: list[EngineRequest], engine: Engine | None = None
) -> dict[str, tuple[str, FinishReason]]:
    """Text (without stop tokens) and reason of each."""
    engine = engine or world.engine
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    reasons: dict[str, FinishReason] = {}
    for request in requests:
        engine.check(request)
        engine.add(request)
    while engine.has_work():
        for event in engine.step():
            tokens[event.request_id] += event.token_ids
            if event.finish_reason is not None:
                assert event.error is None, event.error
                reasons[event.request_id] = event.finish_reason
    return {
        r.request_id: (text(world.tokenizers[r.model], tokens[r.request_id]), reasons[r.request_id])
        for r in requests
    }


def text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True))


def check_schema(value: Any) -> None:
    assert set(value) == {"name", "ok", "tags"}
    assert len(value["name"]) <= 5
    assert type(value["ok"]) is bool
    assert len(value["tags"]) <= 2
    assert set(value["tags"]) <= {"a", "b"}


def test_json_of_all_models_in_one_batch_parses(world: World) -> None:
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    requests = [
        ask(world, f"{model}{seed}", model, grammar, seed=seed, temperature=t)
        for model in MODELS
        for seed, t in ((1, 1.5), (2, 1.0), (3, 0.0))
    ]
    free = [ask(world, f"free{seed}", BASE, None, seed=seed) for seed in range(3)]
    found = answers(world, [*requests, *free])
    ended = 0
    for request in requests:
        answer, reason = found[request.request_id]
        if reason is FinishReason.STOP:
            check_schema(json.loads(answer))
            ended += 1
    assert ended >= 3  # not all are cut by max_tokens
    assert world.engine.counters.mixed_steps > 0
    again = answers(world, [ask(world, "again", BASE, grammar, seed=1)])
    assert again["again"] == found["base1"]  # whatever shared the batch


def test_patterns_choices_and_grammars_match(world: World) -> None:
    pattern = r"[a-f]{3}-(\d\d|x)?"
    sums = 'start: term ("+" term)*\nterm: /[0-9]{1,3}/'
    choices = ["yes", "no", "it depends", "</s>", "<eos>"]  # the last are names, not tokens
    lark = "start: " + " | ".join(map(json.dumps, choices))
    requests = [
        ask(world, f"{kind}{model}", model, Grammar(kind, source), seed=number)  # type: ignore[arg-type]
        for number, model in enumerate(MODELS)
        for kind, source in (("regex", pattern), ("lark", lark))
    ]
    requests += [ask(world, f"sum{m}", m, Grammar("lark", sums), max_tokens=200) for m in MODELS]
    for name, (answer, reason) in answers(world, requests).items():
        if name.startswith("regex"):
            assert re.fullmatch(pattern, answer), answer
        elif name.startswith("lark"):
            assert answer in choices
        elif reason is FinishReason.STOP:
            assert re.fullmatch(r"\d{1,3}(\+\d{1,3})*", answer), answer
        else:
            assert re.match(r"\d{1,3}\+", answer), answer


def test_nothing_ends_an_answer_that_does_not_match_yet(world: World) -> None:
    """Stop tokens wait for the grammar; ends that are ignored do not keep it open; bias cannot
    break it; max_tokens cuts it anywhere."""
    grammar = Grammar("regex", "(ab){4}")
    likes_to_end = {"logit_bias": ((world.eos, 100.0),)}
    unlimited = {"stop_token_ids": frozenset(), "min_tokens": 30}
    found = answers(
        world,
        [
            ask(world, "eager", BASE, grammar, **likes_to_end),
            ask(world, "endless", "tune", grammar, **unlimited),
            ask(world, "cut", "grown", grammar, max_tokens=1),
            ask(world, "open", BASE, Grammar("regex", "(ab)+"), **likes_to_end),
        ],
    )
    assert found["eager"] == found["endless"] == ("abababab", FinishReason.STOP)
    assert found["cut"][1] is FinishReason.LENGTH
    assert "abababab".startswith(found["cut"][0])
    assert found["open"] == ("ab", FinishReason.STOP)


def test_a_fine_tunes_own_tokens_can_be_drawn(world: World) -> None:
    own = world.tokenizers["grown"].convert_tokens_to_ids(ADDED)
    assert own >= len(world.tokenizers[BASE])
    bias = {"logit_bias": ((own, 100.0),), "temperature": 0.0}
    request = ask(world, "r", "grown", Grammar("json_schema", '{"type": "boolean"}'), **bias)
    world.engine.add(request)
    events = []
    while world.engine.has_work():
        events += world.engine.step()
    assert [event.token_ids for event in events] == [(own,)]
    assert events[0].finish_reason is FinishReason.STOP


def test_preemption_keeps_the_place_in_the_grammar(world: World) -> None:
    config = Checkpoint.open(world.base).hf_config
    engine = make_engine(
        world.base,
        world.deltas,
        block_size=4,
        max_model_len=120,
        max_num_batched_tokens=8,
        max_num_seqs=4,
        kv_cache_memory_bytes=128 * KVCache.bytes_per_token(config, torch.float32),
    )
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    requests = [
        ask(world, f"{model}{seed}", model, grammar, seed=seed)
        for model in MODELS
        for seed in (1, 2)
    ]
    tight = answers(world, requests, engine)
    assert engine.stats().preemptions > 0
    assert tight == answers(world, requests)


def test_a_slow_grammar_keeps_nobody_else_waiting(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ = grammars.Compiler._compile

    def slowly(*args: Any) -> Any:
        time.sleep(0.4)
        return compile_(*args)

    monkeypatch.setattr(grammars.Compiler, "_compile", slowly)
    engine = world.engine
    engine.add(ask(world, "slow", BASE, Grammar("regex", "slow[0-9]")))
    engine.add(ask(world, "aborted", BASE, Grammar("regex", "x{9}")))
    engine.add(ask(world, "free", BASE, None, max_tokens=5))
    assert engine.stats().waiting == 3
    aborted = engine.abort("aborted")
    assert aborted is not None
    assert aborted.finish_reason is FinishReason.ABORT
    order = []
    while engine.has_work():
        order += [event.request_id for event in engine.step() if event.finish_reason]
    assert order == ["free", "slow"]


def test_what_cannot_be_compiled_or_spelled_ends_with_an_error(world: World) -> None:
    with pytest.raises(RequestError, match="not a usable regex"):
        grammars.check_grammar(Grammar("regex", "a("))
    engine = world.engine
    engine.add(ask(world, "broken", BASE, Grammar("regex", "a(")))
    engine.add(ask(world, "fine", BASE, Grammar("regex", "ab")))
    unspellable = world.tokenizers[BASE].unk_token is not None  # a vocabulary of words
    if unspellable:
        engine.add(ask(world, "foreign", BASE, Grammar("regex", "a\u00e9")))
    ends = {}
    while engine.has_work():
        ends |= {e.request_id: e for e in engine.step() if e.finish_reason}
    assert ends["broken"].finish_reason is FinishReason.REFUSED
    assert "not a usable regex" in (ends["broken"].error or "")
    assert ends["fine"].finish_reason is FinishReason.STOP
    if unspellable:
        assert ends["foreign"].finish_reason is FinishReason.REFUSED
        assert "no token of the model's vocabulary" in (ends["foreign"].error or "")
    assert engine.stats().kv_blocks_used == 0


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_only_allowed_tokens_are_drawn(world: World, temperature: float) -> None:
    engine = world.engine
    params = {"allowed_token_ids": (8, 9, 20), "max_tokens": 20, "temperature": temperature}
    engine.add(ask(world, "r", "tune", None, **params))
    engine.add(ask(world, "free", BASE, None, max_tokens=20))
    drawn: dict[str, list[int]] = {"r": [], "free": []}
    while engine.has_work():
        for event in engine.step():
            drawn[event.request_id] += event.token_ids
    assert len(drawn["r"]) == 20
    assert set(drawn["r"]) <= {8, 9, 20}
    assert not set(drawn["free"]) <= {8, 9, 20}
    for wrong in ((), (-1,), (10_000,)):
        with pytest.raises(RequestError, match="allowed_token_ids"):
            engine.check(ask(world, "x", BASE, None, allowed_token_ids=wrong))
    with pytest.raises(RequestError, match="only stop tokens"):
        engine.check(ask(world, "x", BASE, None, allowed_token_ids=(world.eos,), min_tokens=1))
    with pytest.raises(RequestError, match="exclude each other"):
        engine.check(ask(world, "x", BASE, Grammar("regex", "a"), allowed_token_ids=(5,)))


def test_models_with_the_same_tokenizer_share_its_grammar_form(world: World) -> None:
    compiler = world.engine.preparing._compiler
    answers(world, [ask(world, m, m, Grammar("regex", "ab")) for m in MODELS])
    assert len(compiler._vocabularies) == 2  # the base's for two, and that of the grown one


schemas = st.recursive(
    st.sampled_from(
        [{"type": "boolean"}, {"type": "null"}, {"type": "integer", "minimum": 0, "maximum": 99}]
    )
    | st.lists(st.sampled_from(["a", "b c", "é", 1, None]), min_size=1, unique=True).map(
        lambda values: {"enum": values}
    )
    | st.integers(0, 3).map(lambda n: {"type": "string", "maxLength": n}),
    lambda inner: st.one_of(
        st.tuples(inner, st.integers(0, 2)).map(
            lambda t: {"type": "array", "items": t[0], "maxItems": t[1]}
        ),
        st.dictionaries(st.sampled_from("xyz"), inner, max_size=2).map(
            lambda p: {
                "type": "object",
                "properties": p,
                "required": list(p),
                "additionalProperties": False,
            }
        ),
    ),
    max_leaves=3,
)


def conforms(value: Any, schema: dict[str, Any]) -> bool:
    """The few keywords of ``schemas``, by hand."""
    if "enum" in schema:
        return any(value == other and type(value) is type(other) for other in schema["enum"])
    match schema["type"]:
        case "boolean":
            return type(value) is bool
        case "null":
            return value is None
        case "integer":
            return type(value) is int and 0 <= value <= 99
        case "string":
            return isinstance(value, str) and len(value) <= schema["maxLength"]
        case "array":
            fits = isinstance(value, list) and len(value) <= schema["maxItems"]
            return fits and all(conforms(item, schema["items"]) for item in value)
    properties = schema["properties"]
    same = isinstance(value, dict) and set(value) == set(properties)
    return same and all(conforms(value[name], properties[name]) for name in properties)


@pytest.fixture(scope="module")
def bytes_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("schemas")
    return World(root, byte_level_tokenizer(), byte_level_tokenizer(added=(ADDED,)))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(several=st.lists(schemas, min_size=3, max_size=3), seed=st.integers(0, 2**62))
def test_random_schemas_are_met(bytes_world: World, several: list[Any], seed: int) -> None:
    requests = [
        ask(bytes_world, model, model, Grammar("json_schema", json.dumps(schema)), seed=seed)
        for model, schema in zip(MODELS, several, strict=True)
    ]
    found = answers(bytes_world, requests)
    for model, schema in zip(MODELS, several, strict=True):
        answer, reason = found[model]
        if reason is FinishReason.STOP:
            assert conforms(json.loads(answer), schema), (answer, schema)


def test_tokens_are_spelled_as_they_decode(world: World) -> None:
    tokenizer = load_tokenizer("tune", [world.deltas["tune"], world.base])
    spelling = grammars.Spelling(tokenizer)
    for sample in ('{"a": [1, "x"]}', "add: hello", "reverse: it"):
        ids = tokenizer.encode(sample, add_special_tokens=False)
        assert b"".join(map(spelling.of, ids)).decode() == sample


@pytest.mark.parametrize(
    "grammar",
    [Grammar("regex", "a{100000}"), Grammar("regex", "a{1000000}b"), Grammar("regex", "a{9999}|b"),
     Grammar("regex", "((((a{0,100}){0,100}){0,100}){0,100})")],
    ids=lambda grammar: grammar.text,
)  # fmt: skip
def test_no_grammar_makes_all_others_wait_or_fills_the_memory(world: World, grammar) -> None:
    """What it leaves no choice about was encoded anew for each token: 80 ms for 100,000 letters."""
    engine, before = world.engine, resident_bytes()
    engine.add(ask(world, "hostile", BASE, grammar))
    spent, end = [], None
    while engine.has_work():
        began = time.perf_counter()
        end = next((e.finish_reason for e in engine.step() if e.finish_reason), end)
        spent.append(time.perf_counter() - began)
    assert end not in (None, FinishReason.ERROR)
    assert max(spent) < 0.5
    assert statistics.median(spent) < 0.04
    assert resident_bytes() - before < 150 * 2**20


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
