"""Answers and sizes become the table, results.json and a verdict."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from deltaserve.artifact.manifest import (
    BaseRef,
    ClassBytes,
    Manifest,
    Sizes,
    SourceRef,
    TensorEntry,
)
from deltaserve.demo.family import Family, FineTune
from deltaserve.demo.questions import Answer, EngineWork, Question, Session, questions_for
from deltaserve.demo.results import Results, assemble
from deltaserve.demo.table import curl_command, results_table, shell_command
from deltaserve.demo.tasks import TASKS, Example

DIGEST = "sha256:" + 64 * "0"


def entry(codec: str, resident: int, **params: int) -> TensorEntry:
    return TensorEntry(codec, params, (1,), "bfloat16", "linear", resident, resident, 0.0)


def manifest(resident: int) -> Manifest:
    tensors = {
        "norm": entry("raw", 1),
        "q": entry("int", 3, bits=2),
        "k": entry("int", 3, bits=2),
        "embedding": entry("int", 5, bits=4),
    }
    sizes = Sizes(ClassBytes(total=70), ClassBytes(total=resident), ClassBytes(total=14))
    base, source = BaseRef("base", None, DIGEST), SourceRef("add", DIGEST, "full")
    return Manifest(base, source, "LlamaForCausalLM", tensors, sizes, DIGEST)


def answers(model: str, right: int, wrong: int) -> list[Answer]:
    question = Question(model, "add", Example("add: 1+1", "2"), 5)
    return [Answer(question, "2", 3)] * right + [Answer(question, "3", 3)] * wrong


def results(served: int = 10, resident: int = 10, learnt: float = 1.0) -> Results:
    root = Path("/family")
    member = FineTune("add", root / "add", "add", "full", 0.0, learnt)
    given = answers("add", served, 10 - served) + answers("base", 1, 9)
    session = Session(tuple(given), 2.0, EngineWork(7, 5, 2))
    family = Family(root, root / "base", (member,))
    return assemble(family, 0, {"add": manifest(resident)}, session, {"ask": 2.0}, {"add": 9.0})


def test_numbers_of_a_row() -> None:
    found = results()
    (row,) = found.models
    assert row.codecs == ("int 2-bit", "int 4-bit", "raw")
    assert (row.resident_ratio, row.disk_ratio) == (7.0, 5.0)
    assert (row.base_score, row.fine_tune_score, row.served_score, row.kept) == (0.1, 1, 1, 1)
    assert (row.prompts, row.completion_tokens, row.tokens_per_second) == (10, 30, 15.0)
    assert (found.base.prompts, found.total.prompts) == (10, 20)
    assert found.total.tokens_per_second == 30.0
    assert found.failures() == []


def test_everything_is_json() -> None:
    content = json.loads(json.dumps(results().to_json()))
    assert content["failures"] == []
    assert content["models"][0]["codecs"] == ["int 2-bit", "int 4-bit", "raw"]
    assert content["engine"] == {"steps": 7, "mixed_steps": 5, "max_models_in_step": 2}
    assert {"torch", "transformers", "openai", "cpu", "date"} <= content["environment"].keys()


@pytest.mark.parametrize(
    ("run", "complaint"),
    [
        (results(served=9), "add keeps 90.0% of its fine-tune's score, less than 97%"),
        (results(resident=14), "add is 5.00x smaller in memory, less than 6x"),
        (results(learnt=0.0), "add keeps 0.0% of its fine-tune's score, less than 97%"),
    ],
)
def test_broken_promises_are_named(run: Results, complaint: str) -> None:
    assert run.failures() == [complaint]
    assert run.to_json()["failures"] == [complaint]


def test_the_table_shows_each_number() -> None:
    console = Console(width=140)
    with console.capture() as captured:
        console.print(results_table(results()))
    lines = captured.get().splitlines()
    (line,) = [line for line in lines if "add" in line]
    wanted = ["add", "full", "int 2-bit, int 4-bit, raw", "7.00x", "5.00x", "10.0%", "100.0%"]
    assert [cell.strip() for cell in line.split("│")][1:8] == wanted
    assert any("all" in line and "30" in line for line in lines)


def test_questions_take_turns_and_ask_the_base_everything() -> None:
    root = Path("/family")
    members = tuple(FineTune(n, root / n, n, "full", 0.0, 1.0) for n in ("add", "sort"))
    asked = questions_for(Family(root, root / "base", members))
    turn = [("add", "add"), ("base", "add"), ("sort", "sort"), ("base", "sort")]
    assert [(q.model, q.task) for q in asked[:8]] == turn * 2
    for model, task in turn:
        prompts = {q.example.prompt for q in asked if (q.model, q.task) == (model, task)}
        assert len(prompts) >= 64
        assert {TASKS[task].split_of(prompt) for prompt in prompts} == {"held_out"}


def test_commands_can_be_pasted() -> None:
    words = ["python", "-m", "deltaserve", "serve", "/a dir/base", "--delta=x=/a dir/x", "--port=0"]
    command = shell_command(words)
    shell = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True
    )
    assert shell.stdout.splitlines() == words
    assert command.count("\n") == 2
    curl = shlex.split(curl_command("http://h:1", "past", '<|verb|>say "it\'s"'))
    assert curl[:2] == ["curl", "http://h:1/v1/chat/completions"]
    body = json.loads(curl[-1])
    assert body["model"] == "past"
    assert body["messages"] == [{"role": "user", "content": '<|verb|>say "it\'s"'}]
