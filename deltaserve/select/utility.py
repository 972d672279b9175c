"""What a sample is worth: uncertainty, loss, loss against a reference, relevance to targets.

All are float64 [n], higher is worth more. N answer tokens, V vocabulary, B sequences of T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from deltaserve.errors import SelectionError
from deltaserve.select.pool import Pool, Progress, Sample, no_progress
from deltaserve.select.scale import Transform
from deltaserve.select.tokens import Batch, ModelOptions, batches, fitted, load_model

SCORES = ("loss", "margin", "entropy", "least_confidence", "gradnorm")
# Logits of one batch, in numbers: half a gigabyte in float32.
MAX_LOGITS = 1 << 27
ROWS = 8192


def logit_scores(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> dict[str, torch.Tensor]:
    """The scores of single predictions, float32 [N] each.

    loss: -log p(target). margin: 1 - (highest - second probability). entropy: nats.
    least_confidence: 1 - highest probability. gradnorm: the length of p - onehot(target), the
    gradient at the logits, which bounds that of the whole model (Katharopoulos and Fleuret 2018).
    """
    logp_NV = F.log_softmax(logits_NV.float(), dim=-1)
    p_NV = logp_NV.exp()
    target_N = logp_NV.gather(1, targets_N[:, None])[:, 0]
    first_N, second_N = p_NV.topk(2, dim=-1).values.unbind(dim=1)
    squared_N = (p_NV * p_NV).sum(dim=-1) - 2 * target_N.exp() + 1
    return {
        "loss": -target_N,
        "margin": 1 - (first_N - second_N),
        "entropy": -(p_NV * logp_NV.clamp_min(-1e4)).sum(dim=-1),
        "least_confidence": 1 - first_N,
        "gradnorm": squared_N.clamp_min(0).sqrt(),
    }


def score_pool(
    pool: Pool, options: ModelOptions, progress: Progress = no_progress
) -> dict[str, np.ndarray]:
    """Each of SCORES for each sample: the mean over the tokens of its last answer, or over all
    but the first token of a text; 0 where there are none. Raises SelectionError."""
    model, tokenizer = load_model(options, head=True)
    return score_samples(pool.samples(), len(pool), model, tokenizer, options, progress)


@torch.inference_mode()
def score_samples(
    samples: Iterable[Sample],
    count: int,
    model: Any,
    tokenizer: Any,
    options: ModelOptions,
    progress: Progress = no_progress,
) -> dict[str, np.ndarray]:
    """As `score_pool`, with a model in memory."""
    limit = max(1, MAX_LOGITS // model.config.get_text_config().vocab_size)
    options = fitted(options, model, tokenizer)
    options = replace(options, batch_tokens=min(options.batch_tokens, limit))
    found = {name: np.zeros(count) for name in SCORES}
    done = 0
    for batch in batches(_templated(samples, tokenizer, options), tokenizer, options):
        logits_BTV = model(
            input_ids=batch.ids_BT, attention_mask=batch.mask_BT().long(), use_cache=False
        ).logits
        answers_BT = answer_mask(batch)
        scored = logit_scores(logits_BTV[:, :-1][answers_BT], batch.ids_BT[:, 1:][answers_BT])
        for name, values_N in scored.items():
            found[name][batch.rows] = _means(values_N, answers_BT)
        done += len(batch.rows)
        progress(f"scoring {options.model}", done, count)
    return found


def _templated(
    samples: Iterable[Sample], tokenizer: Any, options: ModelOptions
) -> Iterator[Sample]:
    """The samples; raises SelectionError for messages that the model cannot be asked."""
    for sample in samples:
        if sample.messages is not None and not getattr(tokenizer, "chat_template", None):
            raise SelectionError(
                f"the pool holds messages, but {options.model} has no chat template: give text, "
                "or a model with one"
            )
        yield sample


def answer_mask(batch: Batch) -> torch.Tensor:
    """bool [B, T - 1]: where position t predicts token t + 1 of the answer."""
    places = torch.arange(1, batch.ids_BT.shape[1], device=batch.ids_BT.device)
    return (places >= batch.prompts_B[:, None]) & (places < batch.lengths_B[:, None])


def loss_difference(
    pool: Pool, options: ModelOptions, reference: str, progress: Progress = no_progress
) -> np.ndarray:
    """The model's loss less the reference's: what is learnable and not learnt yet.

    RHO-loss (Mindermann et al. 2022), with the reference as the model of what can be learnt:
    high for samples that the reference understands and the model does not; low for noise,
    which nobody predicts, and for what is known already.
    """
    own = score_pool(pool, options, progress)["loss"]
    return own - score_pool(pool, replace(options, model=reference), progress)["loss"]


def relevance(
    embeddings: np.ndarray, targets: np.ndarray, transform: Transform | None = None
) -> np.ndarray:
    """The highest cosine to any of the target examples.

    RDS+ (Ivison et al. 2025) takes the best of each target in turn; the maximum over targets
    orders samples alike. embeddings [n, d], targets [m, d]: by the same model and pooling.
    """
    move = transform or Transform()
    wanted = move(targets)
    blocks = range(0, len(embeddings), ROWS)
    found = [(move(embeddings[at : at + ROWS]) @ wanted.T).max(axis=1) for at in blocks]
    return np.concatenate(found).astype(np.float64)


def scores_of(logits: np.ndarray, targets: np.ndarray) -> Mapping[str, np.ndarray]:
    """SCORES of one prediction a sample: logits [n, V], targets int [n]; for a trainer's batch."""
    scored = logit_scores(torch.as_tensor(logits), torch.as_tensor(targets, dtype=torch.long))
    return {name: values.double().numpy() for name, values in scored.items()}


def _means(values_N: torch.Tensor, mask_BT: torch.Tensor) -> np.ndarray:
    """The mean of each row's values, 0 for rows without any: [B]."""
    sums_B = torch.zeros(len(mask_BT), dtype=torch.float64, device=mask_BT.device)
    rows_N = torch.nonzero(mask_BT)[:, 0]
    sums_B.index_add_(0, rows_N, values_N.double())
    return (sums_B / mask_BT.sum(dim=1).clamp_min(1)).cpu().numpy()
