"""Each method does what its paper says, and predictions of cost are near what is measured."""

from __future__ import annotations

import pytest
import torch

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.artifact.codecs import get_codec
from deltaserve.artifact.reader import Delta
from deltaserve.compress.activations import Activations
from deltaserve.compress.dare import DropParams, encode_dropped
from deltaserve.compress.encode import encode
from deltaserve.compress.gptq import Solver
from deltaserve.compress.hessian import Hessian, output_error
from deltaserve.compress.judge import judge
from deltaserve.compress.layers import LayerWalk
from deltaserve.compress.models import load_fine_tune
from deltaserve.compress.plan import CodecChoice, choice, make_plan
from deltaserve.compress.run import compress
from deltaserve.compress.sampling import sample_text
from deltaserve.compress.sensitivity import at_the_embedding, at_the_head, through_layer
from deltaserve.compress.svd import weighted_svd
from deltaserve.compress.textsource import TextOptions
from deltaserve.compress.verify import verify
from deltaserve.compress.weights import Source, of_model
from deltaserve.errors import CodecError, ConfigError

TEXT = TextOptions(samples=16, seq_len=24)


def hessian(columns=64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    mix *= torch.logspace(0, -2, columns)[:, None]
    found = Hessian(columns)
    found.add(torch.randn(900, columns, generator=generator) @ mix)
    return found


def delta(rows=48, columns=64):
    return 0.01 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def cost(enc, exact, h):
    return float(output_error(get_codec(enc.codec).delta(enc) - exact, h.mean_KK).sum())


def test_weighted_vectors_are_the_best_of_their_rank_and_dead_inputs_do_no_harm():
    d, h = delta(), hessian()
    u, v = weighted_svd(d, h, 6)
    weighted = float(output_error(u @ v - d, h.damped()).sum())
    plain = get_codec("lowrank").encode(d, torch.zeros_like(d), rank=6)
    assert weighted < 0.9 * cost(plain, d, h)
    # Eckart and Young: the rest of the spectrum of d L is what no rank 6 can have.
    rest = torch.linalg.svdvals(d @ h.root())[6:].square().sum()
    assert weighted == pytest.approx(float(rest), rel=1e-3)
    dead = Hessian(64)
    u, v = weighted_svd(d, dead, 4)
    assert torch.isfinite(u @ v).all()


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_quantised_factors_lose_with_fewer_bits_and_beat_plain_ones(bits):
    d, h, zero = delta(), hessian(), torch.zeros(48, 64)
    params = {"rank": 12, "bits": bits}
    mine = encode(CodecChoice("lowrank", params), d, zero, h)
    plain = get_codec("lowrank").encode(d, zero, **params)
    assert mine.num_bytes == plain.num_bytes == -(-12 * bits // 8) * 48 + 12 * 8 * bits + 4 * 12
    assert cost(mine, d, h) < cost(plain, d, h)


def test_the_terms_of_a_sum_mend_one_another():
    d, h, zero = delta(), hessian(), torch.zeros(48, 64)
    d += 0.1 * d[:, :1] @ d[:1].sign()  # a direction that one bit per value has no room for
    d += 0.01 * torch.outer(d[:, 3].sign(), d[5].sign())
    one = {"codec": "int", "bits": 1, "group_size": 0}
    beside = {"codec": "lowrank", "rank": 4, "bits": 4}
    both = encode(choice("sum", {"terms": [beside, one]}, "x"), d, zero, h)
    alone = encode(CodecChoice("int", {"bits": 1, "group_size": 0}), d, zero, h)
    assert cost(both, d, h) < 0.8 * cost(alone, d, h)
    with pytest.raises(CodecError, match="'raw' cannot be a term"):
        get_codec("sum").encode(d, zero, terms=[{"codec": "raw"}])
    for wrong in ([{}], [{"bits": 1}], [{"codec": "int", "bits": 9}]):
        with pytest.raises((ConfigError, CodecError)):
            choice("sum", {"terms": wrong}, "x")


def test_dropping_keeps_the_expectation_or_the_largest():
    d, zero = delta(400, 400), torch.zeros(400, 400)
    codec = get_codec("sparse")
    kept = codec.delta(encode_dropped(d, zero, DropParams(0.25)))
    assert float((kept != 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    some = kept != 0
    assert torch.allclose(kept[some], 4 * d[some])
    largest = codec.delta(encode_dropped(d, zero, DropParams(0.25, random=False)))
    assert int((largest != 0).sum()) == 40_000
    assert largest[largest != 0].abs().min() >= d[largest == 0].abs().max()
    with pytest.raises(CodecError, match="keep must lie"):
        DropParams(0.0)


def test_settings_of_the_solver_have_an_effect():
    d, h, zero = delta(), hessian(), torch.zeros(48, 64)
    one_bit = CodecChoice("int", {"bits": 1, "group_size": 0})
    costs = [
        cost(encode(one_bit, d, zero, h, solver), d, h)
        for solver in (Solver(rounds=0), Solver(rounds=1, order=False, refit=False), Solver())
    ]
    assert costs[0] > costs[1] > costs[2]
    unordered = cost(encode(one_bit, d, zero, h, Solver(order=False)), d, h)
    assert unordered != costs[2]


def test_distilled_scales_are_nearer_to_the_fine_tune(talking_pair, tmp_path):
    base, tuned = talking_pair
    # Scales of the largest value, by far too large for the others: there is much to learn.
    settings = {"bits": 1, "scale_axis": "row", "clip": "absmax"}
    plan = make_plan("int", settings, solver=Solver(rounds=0))
    reports = []
    for steps in (0, 40):
        out = tmp_path / str(steps)
        manifest = compress(base, tuned, out, plan, calibration=TEXT, distil=steps)
        reports.append(verify(base, out, tuned, TextOptions(samples=8, seq_len=24, seed=5)).kl_mean)
        for name, entry in manifest.tensors.items():
            assert entry.bytes == Delta.open(tmp_path / "0").manifest.tensors[name].bytes
    assert reports[1] < 0.8 * reports[0]
    again = compress(base, tuned, tmp_path / "again", plan, calibration=TEXT, distil=40)
    assert again.digest == Delta.open(tmp_path / "40").manifest.digest


@pytest.mark.parametrize("name", ["layers.0.mlp.up_proj", "layers.1.self_attn.o_proj", "lm_head",
                                  "embed_tokens"])  # fmt: skip
def test_predicted_cost_is_near_the_divergence_that_is_measured(talking_pair, tmp_path, name):
    tuned = Checkpoint.open(talking_pair[1])
    text = sample_text(load_fine_tune(tuned, tuned, "cpu"), None, samples=48, seq_len=24, seed=0)
    mine = of_model(tuned, tuned)
    embedding, head = (mine.table(n) for n in ("model.embed_tokens.weight", "lm_head.weight"))
    norm = mine("model.norm.weight")
    walk = LayerWalk(tuned, [text.samples], embedding, tmp_path / "in", "cpu")
    weights = [
        {n: mine(n) for n in tuned.names() if n.startswith(walk.prefix(layer))} for layer in (0, 1)
    ]
    for layer in (0, 1):
        walk.advance(layer, weights[layer])
    shapes = [tuple(ids.shape) for _, ids, _ in walk.batches]
    grads = Activations(tmp_path / "back", shapes, 32)
    costs = {"lm_head.weight": at_the_head(walk, grads, norm, head, None, 0)}
    for layer in (1, 0):
        costs |= through_layer(walk, grads, layer, weights[layer])
    costs["model.embed_tokens.weight"] = at_the_embedding(walk, grads, embedding)
    [full] = [n for n in costs if name in n]
    noise = torch.randn(mine(full).shape, generator=torch.Generator().manual_seed(4))
    error = 0.02 * float(mine(full).std()) * noise
    changed = Source(lambda n: (None, mine(n) + error if n == full else mine(n)))
    [reads] = judge(tuned, mine, changed, [text.samples], tmp_path / "w", "cpu", lambda *_: None)
    measured = float(torch.cat([r.tokens.kl_N for r in reads]).double().mean())
    assert 0.4 * measured < float(costs[full].by_row(error).sum()) < 2.5 * measured
