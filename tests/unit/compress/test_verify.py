"""Reports are true, survive in the manifest, and leave the delta's identity alone."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.artifact.reader import Delta
from deltaserve.artifact.writer import record_quality
from deltaserve.compress.compare import Tokens
from deltaserve.compress.diff import diff
from deltaserve.compress.export import export
from deltaserve.compress.jsonl import read_text
from deltaserve.compress.judge import Read, judge, matches, parting, percentile
from deltaserve.compress.models import load_fine_tune, load_tokenizer
from deltaserve.compress.plan import make_plan
from deltaserve.compress.run import compress
from deltaserve.compress.sampling import continued_greedily, sample_text
from deltaserve.compress.text import Sample, Text, batches
from deltaserve.compress.textsource import TextOptions
from deltaserve.compress.verify import Thresholds, verify
from deltaserve.compress.weights import of_delta, of_model
from deltaserve.errors import ArtifactError, CompatibilityError, ConfigError

QUICK = TextOptions(samples=8, seq_len=24)


@pytest.fixture(scope="module")
def delta(talking_pair, tmp_path_factory):
    out = tmp_path_factory.mktemp("delta") / "d"
    compress(*talking_pair, out, make_plan("int", {"bits": 1}))
    return out


def model_of(path):
    return load_fine_tune(Checkpoint.open(path), Checkpoint.open(path), "cpu")


def test_an_exact_delta_has_no_divergence(talking_pair, tmp_path):
    base, tuned = talking_pair
    compress(base, tuned, tmp_path / "d", make_plan("xor"))
    quality = verify(base, tmp_path / "d", tuned, QUICK, Thresholds(0.0, 1.0))
    assert (quality.kl_mean, quality.kl_max, quality.agreement) == (0, 0, 1)
    assert quality.perplexity_delta == quality.perplexity_fine_tune
    assert (quality.identical, quality.first_divergence, quality.passed) == (1, -1, True)


def test_the_report_lands_in_the_manifest_and_not_in_the_digest(talking_pair, delta):
    base, tuned = talking_pair
    before = Delta.open(delta)
    quality = verify(base, delta, tuned, QUICK, Thresholds(max_kl=1e-9))
    assert 1e-9 < quality.kl_mean < quality.kl_p99 <= quality.kl_max
    assert not quality.passed
    after = Delta.open(delta)
    assert after.manifest.quality == quality
    assert after.manifest.digest == before.manifest.digest == quality.delta
    after.verify_digest()
    assert verify(base, delta, tuned, QUICK, Thresholds(max_kl=1e-9)) == quality


def test_divergence_is_that_of_the_exported_model(talking_pair, delta, tmp_path):
    """Against the definition, on a merged checkpoint, one sequence at a time without padding."""
    base, tuned = (Checkpoint.open(path) for path in talking_pair)
    text = sample_text(model_of(tuned.path), None, samples=5, seq_len=20, seed=3)
    mine, theirs = of_model(base, tuned), of_delta(base, Delta.open(delta))
    [reads] = judge(base, mine, theirs, [text.samples], tmp_path / "w", "cpu", lambda *_: None)
    assert sorted(r.sample.tokens for r in reads) == sorted(s.tokens for s in text.samples)
    export(base.path, delta, tmp_path / "out")
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (tuned.path, tmp_path / "out")
    ]
    for read in reads:
        ids = torch.tensor([read.sample.tokens])
        with torch.inference_mode():
            p, q = (torch.log_softmax(m(ids).logits[0, :-1], -1) for m in models)
        kl = (p.exp() * (p - q)).sum(-1)
        # The export rounds the sum of base and delta to bfloat16, an engine does not.
        assert torch.allclose(read.tokens.kl_N, kl, rtol=0.1, atol=1e-3)
        assert torch.equal(read.tokens.top_fine_tune_N, p.argmax(-1))
        nll = -p.gather(1, ids[0, 1:, None])[:, 0]
        assert torch.allclose(read.tokens.nll_fine_tune_N, nll, atol=1e-4)


def test_sampling_is_repeatable_and_leaves_the_generator_alone(talking_pair):
    model = model_of(talking_pair[1])
    tokenizer = load_tokenizer(talking_pair[1])
    state = torch.get_rng_state()
    texts = [sample_text(model, tokenizer, samples=6, seq_len=16, seed=s) for s in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0].samples) == 6
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    assert sum(s.tokens[1] == user for s in texts[0].samples) >= 3
    assert all(1 <= s.prompt < len(s.tokens) <= 16 for s in texts[0].samples)


def test_greedy_continuations_do_not_depend_on_their_batch(talking_pair):
    model = model_of(talking_pair[1])
    samples = [Sample(tuple(range(5, 5 + n)), n - 1) for n in (3, 9, 6)]
    together = continued_greedily(model, samples, 6, 64)
    assert together == tuple(continued_greedily(model, [s], 6, 64)[0] for s in samples)
    assert [s.prompt for s in together] == [2, 8, 5]
    assert all(len(s.tokens) <= s.prompt + 6 for s in together)
    assert continued_greedily(model, samples, 60, 8)[0].tokens[:2] == samples[0].tokens[:2]


def test_where_continuations_part_is_where_two_real_ones_do(talking_pair, delta, tmp_path):
    """One pass over the fine-tune's continuation says the same as generating twice."""
    base, tuned = (Checkpoint.open(path) for path in talking_pair)
    export(base.path, delta, tmp_path / "out")
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (tuned.path, tmp_path / "out")
    ]
    prompts = [Sample(tuple(range(5 + n, 11 + n)), 5) for n in range(8)]
    answers = [
        [
            m.generate(torch.tensor([s.tokens[: s.prompt]]), max_new_tokens=8, do_sample=False)[
                0, s.prompt :
            ].tolist()
            for s in prompts
        ]
        for m in models
    ]
    continued = [
        Sample((*s.tokens[: s.prompt], *answer), s.prompt)
        for s, answer in zip(prompts, answers[0], strict=True)
    ]
    sources = of_model(base, tuned), of_model(base, Checkpoint.open(tmp_path / "out"))
    [reads] = judge(base, *sources, [continued], tmp_path / "w", "cpu", lambda *_: None)
    found = {read.sample: parting(read) for read in reads}
    expected = []
    for mine, theirs in zip(*answers, strict=True):
        differs = [i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b]
        expected.append(differs[0] if differs else -1)
    assert [found[s] for s in continued] == expected
    assert len(set(expected)) > 1


def test_exact_matches_need_every_token_of_the_answer():
    def read(tokens, prompt, mine, theirs):
        tops = [torch.tensor(t) for t in (mine, theirs)]
        zeros = torch.zeros(len(mine))
        return Read(Sample(tokens, prompt), Tokens(zeros, *tops, zeros, zeros))

    assert matches(read((1, 2, 3, 4), 2, [9, 3, 4], [2, 3, 4])) == (True, True)
    assert matches(read((1, 2, 3, 4), 2, [2, 3, 5], [2, 3, 4])) == (False, True)
    assert parting(read((1, 2, 3, 4), 2, [9, 3, 4], [2, 3, 4])) == -1
    assert parting(read((1, 2, 3, 4), 2, [9, 3, 4], [2, 3, 5])) == 1


def test_statistics():
    assert percentile(torch.arange(1, 101), 0.99) == 99
    text = Text(tuple(Sample((1,) * n, 1) for n in range(2, 12)), "x", 0)
    fit, held = text.split(5)
    assert (len(fit.samples), len(held.samples)) == (8, 2)
    assert not set(fit.samples) & set(held.samples)
    assert [lengths for _, lengths in batches(text.samples, 4)] == [
        [2, 3, 4, 5],
        [6, 7, 8, 9],
        [10, 11],
    ]
    long = [Sample((1,) * 3000, 1)] * 3
    assert [len(lengths) for _, lengths in batches(long)] == [1, 1, 1]


def write(path, *entries):
    path.write_text("\n".join(e if isinstance(e, str) else json.dumps(e) for e in entries) + "\n")
    return path


def chat(*contents):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]}


def read(path, tokenizer, **options):
    settings = {"samples": 10, "seq_len": None, "context": 64, "seed": 0} | options
    return read_text(path, tokenizer, **settings)


def test_jsonl_of_text_and_messages(talking_pair, tmp_path):
    tokenizer = load_tokenizer(talking_pair[0])
    path = write(tmp_path / "d.jsonl", {"text": "hello there"}, "", chat("add: 1+2", "3"))
    text = read(path, tokenizer)
    decoded = {
        tokenizer.decode(s.tokens): tokenizer.decode(s.tokens[: s.prompt]) for s in text.samples
    }
    whole = "<bos><|user|>add: 1+2<|assistant|>3<eos>"
    assert decoded[whole] == "<bos><|user|>add: 1+2<|assistant|>"
    assert text.ref().sequences == 2
    assert text.ref().source == "d.jsonl"
    cut = read(path, tokenizer, seq_len=4)
    assert {len(s.tokens) for s in cut.samples} == {4}
    assert len(read(path, tokenizer, samples=1).samples) == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1: not JSON"),
        ([{"text": "fine"}, {"prompt": "x"}], "line 2: needs either"),
        ([{"text": 3}], "line 1: needs either"),
        ([{"messages": [{"role": "user"}]}], "line 1: needs either"),
        ([{"text": "x" * 100}], "line 1: 101 tokens, but the model reads at most 64"),
        ([""], "holds no text"),
    ],
)
def test_bad_files_are_refused_by_line(talking_pair, tmp_path, lines, message):
    with pytest.raises(ConfigError, match=message):
        read(write(tmp_path / "d.jsonl", *lines), load_tokenizer(talking_pair[0]))


def test_files_need_a_tokenizer_and_messages_a_template(talking_pair, tmp_path):
    path = write(tmp_path / "d.jsonl", chat("a", "b"))
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        read(path, None)
    tokenizer = load_tokenizer(talking_pair[0])
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        read(path, tokenizer)
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "absent.jsonl", tokenizer)


def test_thresholds_and_options_that_make_no_sense():
    for wrong in ({"max_kl": -1.0}, {"max_kl": math.nan}, {"min_agreement": 1.5}):
        with pytest.raises(ConfigError):
            Thresholds(**wrong)
    for wrong in ({"samples": 0}, {"seq_len": 1}, {"seed": -1}):
        with pytest.raises(ConfigError):
            TextOptions(**wrong)
    assert Thresholds(0.1, 0.9).met(0.1, 0.9)
    assert not Thresholds(0.1, 0.9).met(0.2, 1.0)
    assert not Thresholds(0.1, 0.9).met(0.0, 0.8)


def test_another_model_than_the_compressed_one_is_refused(talking_pair, delta):
    base, _ = talking_pair
    with pytest.raises(ArtifactError, match="give the model that was compressed"):
        verify(base, delta, base, QUICK)


def test_another_tokenizer_is_refused(talking_pair, delta, tmp_path):
    base, tuned = talking_pair
    copy = tmp_path / "tuned"
    copy.mkdir()
    for file in tuned.iterdir():
        text = file.read_bytes()
        if file.name == "tokenizer.json":
            text = text.replace(b'"a": ', b'"~~": ').replace(b'"b": ', b'"a": ')
            text = text.replace(b'"~~": ', b'"b": ')
        (copy / file.name).write_bytes(text)
    with pytest.raises(CompatibilityError, match=r"token '[ab]' is number"):
        verify(base, delta, copy, QUICK)


def test_a_report_about_another_delta_is_refused(talking_pair, delta):
    base, tuned = talking_pair
    quality = verify(base, delta, tuned, QUICK)
    manifest = Delta.open(delta).manifest
    record_quality(delta, manifest, replace(quality, delta="sha256:" + "0" * 64))
    with pytest.raises(ArtifactError, match="quality was measured on"):
        Delta.open(delta)
    record_quality(delta, manifest, quality)
    damaged = json.loads((delta / "delta.json").read_text())
    for field, value in (("kl_mean", "x"), ("passed", 1), ("prompts", 1.5), ("agreement", None)):
        (delta / "delta.json").write_text(
            json.dumps(damaged | {"quality": damaged["quality"] | {field: value}})
        )
        with pytest.raises(ArtifactError, match=f"quality.{field}"):
            Delta.open(delta)
    (delta / "delta.json").write_text(json.dumps(damaged))


def test_diff_says_what_changed(pair):
    base, tuned, model = pair(only="layers.1.mlp.up_proj", dtype=torch.float32)
    found = {each.name: each for each in diff(base, tuned)}
    assert len(found) == len(list(model.named_parameters()))
    changed = found.pop("model.layers.1.mlp.up_proj.weight")
    assert (changed.unchanged, changed.rows) == (0, 1)
    assert 0.4 < changed.norm < 0.4 * math.sqrt(2) * 1.5
    # A random 48 x 32 matrix is nearly of full rank.
    assert 20 < changed.effective_rank <= 32
    assert 10 < changed.energy_rank < 32
    assert all((e.unchanged, e.norm, e.effective_rank) == (1, 0, 0) for e in found.values())


def test_diff_sees_a_rank(pair):
    base, tuned, model = pair(only="nothing", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += torch.ones(48, 1) @ torch.rand(1, 32)
    model.save_pretrained(tuned)
    found = {each.name: each for each in diff(base, tuned)}
    changed = found["model.layers.0.mlp.up_proj.weight"]
    assert changed.energy_rank == 1
    assert changed.effective_rank < 1.1
