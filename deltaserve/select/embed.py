"""Embeddings: float32 [n, d], from a file or from any Hugging Face model.

B sequences of T tokens, D the hidden size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from deltaserve.errors import SelectionError
from deltaserve.select.extras import load_extra
from deltaserve.select.pool import Pool, Progress, no_progress
from deltaserve.select.tokens import Batch, ModelOptions, batches, fitted, load_model

Pooling = Literal["mean", "weighted"]
READ = 8192


def load_embeddings(path: Path, count: int, column: str = "embedding") -> np.ndarray:
    """Row i belongs to sample i: .npy (memory-mapped), .safetensors with one tensor, or
    ``column`` of a Parquet file.

    Raises SelectionError unless the file holds [count, d] finite numbers.
    """
    readers = {".npy": _read_npy, ".safetensors": _read_safetensors}
    if path.suffix == ".parquet":
        found = _read_parquet(path, column)
    elif path.suffix in readers:
        found = readers[path.suffix](path)
    else:
        raise SelectionError(f"{path}: embeddings are .npy, .safetensors or .parquet")
    check_embeddings(found, count, str(path))
    return found


def check_embeddings(embeddings: np.ndarray, count: int, where: str) -> None:
    """Raises SelectionError unless they are [count, d >= 1] finite floats."""
    if embeddings.ndim != 2 or embeddings.dtype.kind != "f" or not embeddings.shape[1]:
        raise SelectionError(
            f"{where}: embeddings must be a matrix of floats, samples x dimensions, not "
            f"{embeddings.dtype} of shape {list(embeddings.shape)}"
        )
    if len(embeddings) != count:
        raise SelectionError(
            f"{where} has {len(embeddings):,} embeddings, the pool {count:,} samples"
        )
    for start in range(0, count, READ):
        finite = np.isfinite(embeddings[start : start + READ]).all(axis=1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise SelectionError(f"{where}: the embedding in row {row} is not finite")


def embed_pool(
    pool: Pool,
    options: ModelOptions,
    pooling: Pooling | None = None,
    *,
    out: Path | None = None,
    progress: Progress = no_progress,
) -> np.ndarray:
    """The model's last hidden states, pooled: float32 [n, D].

    pooling: "mean" over the tokens, as sentence encoders are trained for, or "weighted" by
    position, for causal models, whose later tokens have read more (RDS+, Ivison et al. 2025,
    after SGPT); None chooses by the model. out: a .npy file to hold them instead of memory.
    Raises SelectionError if the model cannot be loaded.
    """
    model, tokenizer = load_model(options, head=False)
    chosen = pooling or ("weighted" if is_causal(model.config) else "mean")
    found = embed_samples(
        pool.samples(), len(pool), model, tokenizer, options, chosen, out, progress
    )
    check_embeddings(found, len(pool), options.model)
    return found


@torch.inference_mode()
def embed_samples(
    samples: Any,
    count: int,
    model: Any,
    tokenizer: Any,
    options: ModelOptions,
    pooling: Pooling,
    out: Path | None = None,
    progress: Progress = no_progress,
) -> np.ndarray:
    """As `embed_pool`, of ``count`` samples and a model in memory."""
    found, done = None, 0
    for batch in batches(samples, tokenizer, fitted(options, model, tokenizer)):
        hidden_BTD = model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT().long())[0]
        pooled_BD = pool_hidden(hidden_BTD, batch, pooling).cpu().numpy()
        if found is None:
            found = new_matrix(count, pooled_BD.shape[1], out)
        found[batch.rows] = pooled_BD
        done += len(batch.rows)
        progress("embedding", done, count)
    assert found is not None
    assert done == count
    return found


def new_matrix(count: int, dims: int, out: Path | None) -> np.ndarray:
    """An empty float32 [count, dims], in memory or in the .npy file ``out``."""
    if out is None:
        return np.empty((count, dims), dtype=np.float32)
    return np.lib.format.open_memmap(out, mode="w+", dtype=np.float32, shape=(count, dims))


def take_rows(embeddings: np.ndarray, rows: np.ndarray, out: Path) -> np.ndarray:
    """``embeddings[rows]`` in a file, block by block."""
    found = new_matrix(len(rows), embeddings.shape[1], out)
    for start in range(0, len(rows), READ):
        found[start : start + READ] = embeddings[rows[start : start + READ]]
    return found


def pool_hidden(hidden_BTD: torch.Tensor, batch: Batch, pooling: Pooling) -> torch.Tensor:
    """One vector for each sequence: [B, D]."""
    weights_BT = batch.mask_BT().float()
    if pooling == "weighted":
        weights_BT = weights_BT * torch.arange(1, weights_BT.shape[1] + 1, device=weights_BT.device)
    weights_BT = weights_BT / weights_BT.sum(dim=1, keepdim=True)
    return torch.einsum("bt,btd->bd", weights_BT, hidden_BTD.float())


def is_causal(config: Any) -> bool:
    """Whether the model's tokens see only what stands before them."""
    return any("CausalLM" in name for name in config.architectures or ())


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as cause:
        raise SelectionError(f"{path} cannot be read: {cause}") from None


def _read_safetensors(path: Path) -> np.ndarray:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) != 1:
                raise SelectionError(f"{path} holds {len(names)} tensors; embeddings are one")
            return file.get_tensor(names[0]).float().numpy()
    except (OSError, SafetensorError) as cause:
        raise SelectionError(f"{path} cannot be read: {cause}") from None


def _read_parquet(path: Path, column: str) -> np.ndarray:
    arrow, parquet = load_extra("pyarrow"), load_extra("pyarrow.parquet")
    try:
        file = parquet.ParquetFile(path)
    except (OSError, arrow.ArrowException) as cause:
        raise SelectionError(f"{path} cannot be read: {cause}") from None
    if column not in file.schema_arrow.names:
        names = ", ".join(file.schema_arrow.names)
        raise SelectionError(f"{path} has no column {column!r}; it has {names}")
    parts: list[np.ndarray] = []
    rows = 0
    for batch in file.iter_batches(READ, columns=[column]):
        parts.append(_matrix(batch.column(0), path, column, rows, parts))
        rows += batch.num_rows
    return np.concatenate(parts) if parts else np.empty((0, 1), dtype=np.float32)


def _matrix(
    lists: Any, path: Path, column: str, start: int, before: list[np.ndarray]
) -> np.ndarray:
    """A batch of lists of numbers as [b, d] float32; all batches have the same d."""
    arrow = load_extra("pyarrow")
    if not hasattr(lists, "flatten") or lists.null_count:
        raise SelectionError(f"{path}: column {column!r} must hold a list of numbers in every row")
    compute = load_extra("pyarrow.compute")
    lengths = compute.list_value_length(lists).to_numpy(zero_copy_only=False)
    expected = before[0].shape[1] if before else int(lengths[0])
    odd = np.flatnonzero(lengths != expected)
    if len(odd):
        raise SelectionError(
            f"{path}: embeddings of different dimensions: row {start + odd[0]} has "
            f"{lengths[odd[0]]}, those before it {expected}"
        )
    try:
        values = lists.flatten().cast(arrow.float32()).to_numpy(zero_copy_only=False)
    except arrow.ArrowException as cause:
        raise SelectionError(f"{path}: column {column!r} is not numbers: {cause}") from None
    return values.reshape(len(lists), expected)
