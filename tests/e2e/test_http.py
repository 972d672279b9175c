"""``deltaserve serve`` as typed: a real engine, a base and its deltas, the official client."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from deltaserve.cli.main import dispatch
from deltaserve.compress.plan import make_plan
from deltaserve.compress.run import compress
from deltaserve.demo.tokenizer import build_tokenizer
from tests.families import COMMON, make_fine_tune
from tests.process_helpers import engine_of, gone, wait_until

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}!{% endfor %}"
PROMPTS = ("reverse: abc", "add: 12+34", "sort: hello")
MAX_TOKENS = 12


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and two full fine-tunes of it; ``beta`` has a chat template of its own."""
    root = tmp_path_factory.mktemp("checkpoints")
    tokenizer = build_tokenizer()
    config = AutoConfig.for_model("llama", **{**COMMON, "vocab_size": len(tokenizer)})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for seed, name in enumerate(("alpha", "beta"), start=1):
        make_fine_tune(root / "base", root / name, seed=seed)
        build_tokenizer().save_pretrained(root / name)
    (root / "beta" / "chat_template.jinja").write_text(TEMPLATE)
    return {name: root / name for name in ("base", "alpha", "beta")}


@pytest.fixture(scope="module")
def deltas(checkpoints: dict[str, Path]) -> dict[str, Path]:
    out = checkpoints["base"].parent / "deltas"
    for name in ("alpha", "beta"):
        compress(checkpoints["base"], checkpoints[name], out / name, make_plan(codec="raw"))
    return {name: out / name for name in ("alpha", "beta")}


def start(
    checkpoints: dict[str, Path], deltas: dict[str, Path], *options: str
) -> tuple[subprocess.Popen, str]:
    """The command in its own process, and its URL once it is ready."""
    command = [sys.executable, "-m", "deltaserve", "serve", str(checkpoints["base"])]
    for name, path in deltas.items():
        command += ["--delta", f"{name}={path}"]
    command += ["--port", "0", "--device", "cpu", "--kv-cache-memory-bytes", str(1 << 24)]
    command += options
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout or ():
        lines.append(line)
        if ready := re.match(r"DeltaServe ready at (http://\S+) — 3 models: base, alpha", line):
            return process, ready[1]
    raise AssertionError(f"the server ended with {process.wait()}: {lines}")


@pytest.fixture(scope="module", params=["--engine-process", "--no-engine-process"])
def url(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], deltas: dict[str, Path]
) -> Iterator[str]:
    process, url = start(checkpoints, deltas, request.param)
    yield url
    process.terminate()
    assert process.wait(20) == 0


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def reference(path: Path, prompt: str) -> str:
    """What transformers generates from a checkpoint."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=MAX_TOKENS, do_sample=False)
    return tokenizer.decode(
        out[0, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def test_every_model_gives_its_own_answer(client, checkpoints):
    wanted = {(name, p): reference(path, p) for name, path in checkpoints.items() for p in PROMPTS}

    def ask(key: tuple[str, str]) -> str:
        answer = client.completions.create(
            model=key[0], prompt=key[1], max_tokens=MAX_TOKENS, temperature=0
        )
        return answer.choices[0].text

    with ThreadPoolExecutor(len(wanted)) as pool:
        served = dict(zip(wanted, pool.map(ask, wanted), strict=True))
    assert served == wanted
    assert len(set(wanted.values())) > len(PROMPTS)  # the models do differ


def test_models_tell_parent_and_size(client):
    alpha = client.models.retrieve("alpha")
    assert alpha.parent == "base"
    assert alpha.bytes["full"] >= alpha.bytes["resident"] > 0
    assert alpha.codecs == ["raw"]


@pytest.mark.parametrize("model", ["base", "alpha", "beta"])
def test_stream_equals_whole_and_seed_repeats(client, model):
    ask = {"model": model, "prompt": PROMPTS[0], "max_tokens": 30, "seed": 5, "n": 2}
    whole = client.completions.create(**ask)
    texts = ["", ""]
    for chunk in client.completions.create(**ask, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("model", ["base", "alpha", "beta"])
def test_answers_are_scored_as_lm_eval_asks(client, checkpoints, model):
    """The request of ``lm_eval --model local-completions`` for log-likelihoods: tokens in, and
    the logprobs of all but the generated one out."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoints[model])
    questions = [("add: 12+34", " 46"), ("sort: hello", " ehllo"), ("add: 12+34", " 47")]
    prompts = [tokenizer(q + a).input_ids for q, a in questions]
    starts = [len(tokenizer(q).input_ids) for q, _ in questions]
    answer = client.completions.create(
        model=model, prompt=prompts, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
    )
    checkpoint = AutoModelForCausalLM.from_pretrained(checkpoints[model], dtype=torch.float32)
    for ids, start, choice in zip(prompts, starts, answer.choices, strict=True):
        scores = checkpoint.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = [scores[i - 1, ids[i]].item() for i in range(start, len(ids))]
        assert choice.logprobs.token_logprobs[start:-1] == pytest.approx(expected, abs=1e-4)
        greedy = [int(scores[i - 1].argmax()) == ids[i] for i in range(start, len(ids))]
        tops = choice.logprobs.top_logprobs[start:-1]
        found = [
            own == max(top.values())
            for own, top in zip(choice.logprobs.token_logprobs[start:-1], tops, strict=True)
        ]
        assert found == greedy


def test_structured_answers_of_mixed_models(client):
    def ask(model: str) -> str:
        return client.completions.create(
            model=model, prompt="x", temperature=1.5, logprobs=1,
            extra_body={"guided_choice": ["yes", "no: 1"]},
        ).choices[0].text  # fmt: skip

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(ask, ["base", "alpha", "beta"] * 2))
    assert set(found) <= {"yes", "no: 1"}
    with pytest.raises(openai.BadRequestError, match="guided_regex: not a usable regex"):
        client.completions.create(model="base", prompt="x", extra_body={"guided_regex": "("})


PARAMETERS = {
    "type": "object",
    "properties": {"unit": {"$ref": "#/$defs/Unit"}, "days": {"enum": [1, 2]}},
    "required": ["unit", "days"],
    "additionalProperties": False,
    "$defs": {"Unit": {"enum": ["C", "F"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "stop"}},
]


def check_call(function) -> None:
    arguments = json.loads(function.arguments)
    if function.name == "stop":
        assert arguments == {}
    else:
        assert function.name == "weather"
        assert set(arguments) == {"unit", "days"}
        assert arguments["unit"] in ("C", "F")
        assert arguments["days"] in (1, 2)


@pytest.mark.parametrize("model", ["base", "alpha", "beta"])
def test_forced_calls_match_the_schemas_of_the_tools(client, model):
    ask = {"model": model, "messages": [{"role": "user", "content": "x"}], "tools": TOOLS,
           "temperature": 1.2, "seed": 4, "max_completion_tokens": 150}  # fmt: skip
    one = client.chat.completions.create(
        **ask, tool_choice="required", parallel_tool_calls=False
    ).choices[0]
    assert (one.finish_reason, len(one.message.tool_calls)) == ("tool_calls", 1)
    check_call(one.message.tool_calls[0].function)
    named = {"type": "function", "function": {"name": "weather"}}
    forced = client.chat.completions.create(**ask, tool_choice=named).choices[0]
    assert (forced.finish_reason, forced.message.content) == ("tool_calls", None)
    check_call(forced.message.tool_calls[0].function)
    chunks = client.chat.completions.create(**ask, tool_choice=named, stream=True)
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    streamed = "".join(delta.function.arguments for delta in deltas)
    assert streamed == forced.message.tool_calls[0].function.arguments


def test_tools_need_a_template_that_knows_them(client):
    with pytest.raises(openai.BadRequestError, match="--tool-call-parser"):
        client.chat.completions.create(
            model="base", messages=[{"role": "user", "content": "x"}], tools=TOOLS
        )


def test_chat_uses_the_fine_tunes_own_template(client):
    messages = [{"role": "user", "content": "abc"}]
    tokens = {
        name: client.chat.completions.create(
            model=name, messages=messages, max_tokens=4
        ).usage.prompt_tokens
        for name in ("alpha", "beta")
    }
    assert tokens == {"alpha": 6, "beta": 5}  # <bos><|user|>abc<|assistant|>; <bos>abc!


def test_refusals_of_the_engine(client):
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="alpha", prompt=[5] * 300)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gamma", prompt="x")


def test_a_client_that_leaves_does_no_harm(client):
    stream = client.completions.create(model="beta", prompt="x", max_tokens=200, stream=True)
    next(iter(stream))
    stream.close()
    assert client.completions.create(model="beta", prompt="x", max_tokens=2).choices


def test_interrupt_while_streaming(checkpoints, deltas):
    process, url = start(checkpoints, deltas)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused") as client:
        stream = client.completions.create(model="beta", prompt="x", max_tokens=150, stream=True)
        next(iter(stream))
        process.send_signal(signal.SIGINT)
        for _ in stream:  # what has begun may end
            pass
    assert process.wait(20) == 0
    assert process.stdout is not None
    assert "DeltaServe stopped." in process.stdout.read()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_engine_comes_back_and_a_killed_server_takes_it_along(checkpoints, deltas):
    server, url = start(checkpoints, deltas)
    with (
        httpx.Client(base_url=url) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client,
    ):
        assert http.get("/ready").status_code == 200
        ask = {"model": "beta", "prompt": "x", "temperature": 0}
        before = client.completions.create(**ask).choices[0].text
        stream = client.completions.create(**ask, max_tokens=200, stream=True)
        next(iter(stream))
        for pid in engine_of(server):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(openai.APIError, match="was killed by SIGKILL"):
            list(stream)
        assert http.get("/ready").status_code == 503
        assert http.get("/health").json() == {"status": "recovering"}
        with pytest.raises(openai.InternalServerError, match="being started again"):
            client.completions.create(**ask)
        wait_until(lambda: http.get("/ready").status_code == 200)
        assert client.completions.create(**ask).choices[0].text == before
    children = engine_of(server)
    assert children
    server.kill()
    server.wait()
    wait_until(lambda: all(map(gone, children)), 3.0)


def test_what_does_not_end_in_time_is_told_why(checkpoints, deltas):
    server, url = start(checkpoints, deltas, "--drain-timeout-s", "0.3")
    with (
        httpx.Client(base_url=url) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client,
    ):
        ask = {"model": "beta", "prompt": "x", "n": 64, "extra_body": {"ignore_eos": True}}
        stream = client.completions.create(**ask, max_tokens=200, stream=True)
        next(iter(stream))
        server.send_signal(signal.SIGTERM)
        wait_until(lambda: http.get("/ready").status_code == 503)
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            client.completions.create(model="beta", prompt="x")
        with pytest.raises(openai.APIError, match=r"did not end within 0\.3 s"):
            list(stream)
    assert server.wait(20) == 0


@pytest.mark.parametrize("engine", ["--engine-process", "--no-engine-process"])
def test_a_signal_while_it_loads_ends_it_in_order(checkpoints, engine):
    command = [sys.executable, "-m", "deltaserve", "serve", str(checkpoints["base"])]
    command += ["--port", "0", "--device", "cpu", engine]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("Loading")
    process.terminate()
    said = process.stdout.read()  # to the end of its engine, too
    assert process.wait(20) == 0
    assert said == "DeltaServe stopped: SIGTERM came while the models were loaded.\n"


def test_a_second_signal_ends_it_at_once(checkpoints, deltas):
    server, url = start(checkpoints, deltas, "--drain-timeout-s", "600")
    assert server.stdout.readline().startswith("No key is set")
    children = engine_of(server)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        ask = {"model": "beta", "prompt": "x", "n": 64, "extra_body": {"ignore_eos": True}}
        stream = client.completions.create(**ask, max_tokens=200, stream=True)
        next(iter(stream))
        server.send_signal(signal.SIGTERM)
        server.send_signal(signal.SIGINT)
        assert server.wait(10) == 0
    assert all(map(gone, children))


def test_bad_starts(checkpoints, deltas, capfd, monkeypatch):
    monkeypatch.delenv("DELTASERVE_API_KEY", raising=False)
    base = str(checkpoints["base"])
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        bad = {
            ("serve", base, "--port", port): f"port {port} of 127.0.0.1 is in use",
            ("serve", base, "--host", "0.0.0.0"): "DELTASERVE_API_KEY",
            ("serve", base, "--delta", "x"): "NAME=PATH",
            ("serve",): "no base model",
            ("serve", base, "--config", os.devnull): "must hold a mapping",
            ("serve", base, "--port", "0", "--delta", f"x={base}"): "delta",
        }
        for command, message in bad.items():
            assert dispatch(list(command)) == 2
            *_, error = capfd.readouterr().err.splitlines()  # after transformers' progress bars
            assert error.startswith("deltaserve: error: ")
            assert message in error
