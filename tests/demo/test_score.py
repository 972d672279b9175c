import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deltaserve.demo import score
from deltaserve.demo.fit import IGNORED, answer_loss, collate, rate
from deltaserve.demo.recipe import Schedule
from deltaserve.demo.score import complete, score_texts
from deltaserve.demo.tasks import TASKS, Example
from deltaserve.demo.tokenizer import EOS, build_tokenizer


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(build_tokenizer()),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            # Large weights, so that greedy choices are not near ties.
            initializer_range=0.3,
        )
    )


def test_score_texts() -> None:
    assert score_texts(["a", "b", "c", "d"], ["a", " b\n", "C", ""]) == 0.5
    for answers, completions in (([], []), (["a"], ["a", "b"])):
        with pytest.raises(ValueError, match="one completion for each"):
            score_texts(answers, completions)


def test_batched_completion_equals_one_by_one(model: LlamaForCausalLM) -> None:
    tokenizer = build_tokenizer()
    prompts = ["a", "copy: abcdef", "reverse: xyz", "add: 12+34"]
    batched = complete(model, tokenizer, prompts, max_new_tokens=6, batch_size=3)
    alone = [complete(model, tokenizer, [p], max_new_tokens=6)[0] for p in prompts]
    assert batched == alone


def test_exact_match_counts_right_answers(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = [Example("copy: ab", "ab"), Example("copy: abcd", "abcd")]

    def completions(*args: object, max_new_tokens: int, batch_size: int) -> list[str]:
        assert max_new_tokens == 6
        assert batch_size == 7
        return ["ab", "abcdd"]

    monkeypatch.setattr(score, "complete", completions)
    assert score.exact_match(model, build_tokenizer(), examples, batch_size=7) == 0.5


def test_labels_cover_the_answer_and_its_end() -> None:
    tokenizer = build_tokenizer()
    ids, labels = collate([Example("copy: ab", "ab"), Example("copy: abcd", "abcd")], tokenizer)
    assert ids.shape == labels.shape
    for row, answer in enumerate(("ab", "abcd")):
        kept = labels[row][labels[row] != IGNORED]
        assert tokenizer.decode(kept) == answer + EOS
        assert torch.equal(kept, ids[row][labels[row] != IGNORED])


def test_padding_does_not_change_the_loss(model: LlamaForCausalLM) -> None:
    tokenizer = build_tokenizer()
    short, long = TASKS["add"].examples("train", 1), TASKS["extract"].examples("train", 1)
    together = answer_loss(model, *collate(short + long, tokenizer))
    parts = [(collate(part, tokenizer)) for part in (short, long)]
    counts = [int((labels != IGNORED).sum()) for _, labels in parts]
    losses = [answer_loss(model, *part) for part in parts]
    mean = sum(n * loss for n, loss in zip(counts, losses, strict=True)) / sum(counts)
    torch.testing.assert_close(together, mean, rtol=1e-4, atol=1e-4)


def test_rate_warms_up_and_decays() -> None:
    schedule = Schedule(steps=100, batch=1, lr=1.0, warmup=10)
    rates = [rate(step, schedule) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) <= 1.0
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] < 0.001
