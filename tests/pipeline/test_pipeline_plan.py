"""Plans: immutable, printed, fingerprinted, stored as YAML, and checked before they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deltaserve.errors import PipelineError
from deltaserve.pipeline import Plan, prepare
from tests.pipeline.pipelines import chats, count_words, long_enough, stream, texts, tokenizer


@pytest.fixture
def a(tmp_path: Path) -> Plan:
    return Plan.from_jsonl(texts(tmp_path / "a.jsonl", 60))


def test_builders_leave_a_plan_as_it_is(a: Plan) -> None:
    before = str(a)
    a.shuffle(1).batch(4)
    assert str(a) == before


def test_a_plan_prints_its_operators(a: Plan) -> None:
    lines = str(a.filter(long_enough, name="long").shuffle(3)).splitlines()
    assert lines[0] == "shuffle(seed=3)"
    assert lines[1].strip() == "filter(fn=long_enough) [long]"
    assert lines[2].strip().startswith("jsonl(paths=(")


def test_fingerprints_know_parameters_and_code_but_not_seeds_or_names(a: Plan) -> None:
    limit = 3

    def short(row: dict[str, Any]) -> bool:
        return len(row["text"]) < limit

    one = a.filter(short).shuffle(1).fingerprint()
    assert a.filter(short, name="other").shuffle(2).fingerprint() == one
    assert a.filter(short).shuffle(1, window=9).fingerprint() != one
    limit = 4
    assert a.filter(short).shuffle(1).fingerprint() != one


def test_a_fingerprint_knows_the_helpers_of_a_function(a: Plan) -> None:
    def made(word: str) -> Any:
        space: dict[str, Any] = {"__name__": "made"}
        exec(f"def helper(t): return t + {word!r}\ndef fn(row): return helper(row)", space)
        return space["fn"]

    assert a.map(made("x")).fingerprint() == a.map(made("x")).fingerprint()
    assert a.map(made("x")).fingerprint() != a.map(made("y")).fingerprint()


def test_yaml_gives_the_same_stream(tmp_path: Path, a: Plan) -> None:
    name = tokenizer(tmp_path / "tokenizer")
    chat = Plan.from_jsonl(chats(tmp_path / "c.jsonl", 40))
    plan = (
        Plan.mix({a.tokenize(name).shuffle(1): 2.0, chat.chat_template(name).tokenize(name): 1.0})
        .map("pipelines:tokens")
        .bucket([8, 32], window=3)
        .batch(4, pad=0)
        .prefetch(2)
    )
    file = tmp_path / "plan.yaml"
    file.write_text(plan.to_yaml())
    read = Plan.from_yaml(file, allow_functions=True)
    assert read.fingerprint() == plan.fingerprint()
    assert stream(read) == stream(plan)


def test_paths_in_a_file_are_relative_to_it(tmp_path: Path, a: Plan) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("source: {jsonl: a.jsonl}\nsteps: [take: 3, cache]\n")
    assert len(stream(Plan.from_yaml(file), cache=tmp_path / "cache")) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("steps: []", "source is missing"),
        ("source: {csv: x}", "no 'csv': choose one of jsonl"),
        ("source: {jsonl: a.jsonl}\nsteps: [shufle: 1]", "step 1: no 'shufle'"),
        ("source: {jsonl: a.jsonl}\nsteps: [shuffle: {sed: 1}]", "no 'sed': it takes seed"),
        ("source: {jsonl: a.jsonl}\nsteps: [pack: {}]", "length is missing"),
        ("source: {jsonl: a.jsonl}\nsteps: [pack: {length: x}]", "step 1 .pack.: invalid literal"),
        ("source: {jsonl: a.jsonl}\nsteps: [pack: {length: 0}]", "length must be at least 1"),
        ("source: {jsonl: a.jsonl}\nsteps: [map: {fn: 'os:getcwd'}]", "allow-functions"),
        ("source: {jsonl: a.jsonl, text: b}", "must be one of"),
        ("source: {mix: {parts: [{weight: 1}]}}", "part 1: source is missing"),
        ("source: {jsonl: a.jsonl}\nsource: {jsonl: b}", "given twice"),
        ("source: [", "not valid YAML"),
    ],
)
def test_wrong_files_are_told(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(content)
    with pytest.raises(PipelineError, match=message):
        Plan.from_yaml(file)


def test_a_function_without_a_name_cannot_be_stored(a: Plan) -> None:
    with pytest.raises(PipelineError, match="registered name"):
        a.map(count_words).to_yaml()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda a: a.pack(8), "pack: no field 'input_ids'.*id, text.*tokenize first"),
        (lambda a: a.chat_template("x"), "no field 'messages'"),
        (lambda a: a.tokenize("x", text="body"), "tokenize: no field 'body'"),
        (lambda a: a.map(count_words).batch(2).batch(2), "batch batches"),
        (lambda a: a.map(count_words).batch(2).pack(8), "works on a row, and gets a batch"),
        (lambda a: a.map(count_words).pack(8).tokenize("x"), "gets a packed row"),
        (lambda a: a.map(count_words).bucket([4]), "a batch must follow"),
        (lambda a: a.map(count_words).bucket([4]).take(3).batch(2), "a batch must follow"),
        (lambda a: a.map(count_words).pack(8).shuffle(1), "above pack rows have no numbers"),
        (lambda a: a.repeat().shuffle(1), "has no end"),
        (lambda a: a.repeat().repeat(2), "has no end already"),
        (lambda a: a.map(count_words).pack(8).cache(), "cannot stand above pack"),
        (lambda a: a.map(count_words, random=True), "fn.row, rng."),
        (lambda a: a.map("nowhere"), "no function 'nowhere' is registered"),
        (lambda a: a.map("no_module_of_this:name"), "cannot be imported"),
        (lambda a: a.map(count_words, reads=["body"]), "map: no field 'body'"),
        (lambda a: Plan.mix({a: 1, a.map(count_words).batch(2): 1}), "a batch and a row"),
    ],
)
def test_plans_that_cannot_work_are_told_before_they_run(a: Plan, build: Any, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        prepare(build(a))


def test_a_cache_cannot_stand_above_a_random_operator(a: Plan) -> None:
    def noisy(row: Any, rng: Any) -> Any:
        return row

    with pytest.raises(PipelineError, match="noisy draws at random"):
        a.map(noisy, random=True, name="noisy").shuffle(1).cache().check()
    with pytest.raises(PipelineError, match="not deterministic"):
        a.map(count_words, deterministic=False).cache().check()
    a.cache().map(noisy, random=True).check()


@pytest.mark.parametrize("weights", [(0, 1), (-1, 2), (float("nan"), 1)])
def test_weights_must_be_positive(a: Plan, weights: tuple[float, float]) -> None:
    with pytest.raises(PipelineError, match="positive"):
        Plan.mix([(a, weights[0]), (a, weights[1])])
