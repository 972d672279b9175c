"""Compress a fine-tune: one parameter at a time, from two checkpoints to one delta."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from deltaserve.artifact.checkpoint import HEAD, Checkpoint, locate
from deltaserve.artifact.codecs import get_codec
from deltaserve.artifact.codecs.base import Encoded, aligned, is_finite
from deltaserve.artifact.codecs.rows import RowsCodec
from deltaserve.artifact.digest import checkpoint_digest
from deltaserve.artifact.files import copy_changed
from deltaserve.artifact.manifest import BaseRef, ClassBytes, Manifest, SourceRef
from deltaserve.artifact.safetensors_io import MAX_SHARD_BYTES
from deltaserve.artifact.staging import require_free, write_text
from deltaserve.artifact.writer import DeltaWriter
from deltaserve.compress.card import model_card
from deltaserve.compress.classify import classify
from deltaserve.compress.common import PathLike, Progress, silent
from deltaserve.compress.compat import check_compatible
from deltaserve.compress.errors import relative_error
from deltaserve.compress.lora import Adapter
from deltaserve.compress.plan import Plan, make_plan
from deltaserve.errors import CheckpointError, CodecError, ConfigError


@dataclass(frozen=True)
class Change:
    """One parameter on its way into the delta; enc None: it did not change."""

    name: str
    kind: str
    enc: Encoded | None
    error: float
    full_bytes: int


def compress(
    base: PathLike,
    model: PathLike,
    out: PathLike,
    plan: Plan | None = None,
    progress: Progress = silent,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Manifest:
    """Write ``model - base`` to the new directory ``out`` and return its manifest.

    base, model: local directories or hub ids; model may be a PEFT LoRA adapter, which is
    kept exactly and takes no plan. Memory: a few times the largest tensor. Nothing is
    left at ``out`` unless all went well. Raises CheckpointError, CompatibilityError,
    CodecError, ConfigError, OutputExistsError.
    """
    require_free(Path(out))
    origin = Checkpoint.open(base)
    path, name = locate(model)
    if Adapter.is_adapter(path):
        if plan is not None:
            raise ConfigError(
                f"{name} is a LoRA adapter, which is always kept exactly; drop the codec options"
            )
        source: Checkpoint | Adapter
        source = adapter = Adapter.open(path, name)
        changes = _adapter_changes(origin, adapter)
    else:
        source = Checkpoint.open(model)
        changes = _model_changes(origin, source, plan or make_plan())
    with DeltaWriter(out, max_shard_bytes=max_shard_bytes) as writer:
        full = _store(writer, changes, source, progress)
        if isinstance(source, Adapter):
            full = [(classify(n, origin.shape(n)), _size(origin, n)) for n in origin.names()]
        manifest = _finish(writer, origin, source, ClassBytes.of(full), progress)
        writer.commit()
    return manifest


def _store(
    writer: DeltaWriter, changes: Iterator[Change], source: Checkpoint | Adapter, report: Progress
) -> list[tuple[str, int]]:
    """Write all changes; returns (kind, bytes) of every parameter seen."""
    full, done = [], 0
    for change in changes:
        if change.enc is not None:
            writer.add(change.name, change.enc, kind=change.kind, error=change.error)
        full.append((change.kind, change.full_bytes))
        done += change.full_bytes
        report("compress", min(done, source.num_bytes), source.num_bytes)
    return full


def _finish(
    writer: DeltaWriter,
    base: Checkpoint,
    source: Checkpoint | Adapter,
    full: ClassBytes,
    report: Progress,
) -> Manifest:
    kind = "lora" if isinstance(source, Adapter) else "full"
    base_digest = checkpoint_digest(base, lambda done, total: report("hash base", done, total))
    digest = checkpoint_digest(source, lambda done, total: report("hash model", done, total))
    copy_changed(source.path, base.path, writer.directory)
    manifest = writer.finish(
        base=BaseRef(base.name, _revision(base.path), base_digest),
        source=SourceRef(source.name, digest, kind),
        architecture=base.architecture,
        full=full,
    )
    write_text(writer.directory / "README.md", model_card(manifest))
    return manifest


def _model_changes(base: Checkpoint, model: Checkpoint, plan: Plan) -> Iterator[Change]:
    names = check_compatible(base, model)
    plan.check_rules(names)
    return (_compare(name, base, model, plan) for name in names)


def _compare(name: str, base: Checkpoint, model: Checkpoint, plan: Plan) -> Change:
    tensor, reference = model.tensor(name), base.tensor(name)
    for checkpoint, values in ((base, reference), (model, tensor)):
        if not is_finite(values):
            raise CheckpointError(
                f"{checkpoint.file(name)}: {name} holds NaN or infinite values; "
                "the model is damaged, use a sound checkpoint"
            )
    kind = classify(name, tuple(tensor.shape))
    # A head tied to the embedding is not stored by the fine-tune itself.
    full = 0 if name == HEAD and model.tied else tensor.numel() * tensor.element_size()
    if same(tensor, reference):
        if name == HEAD and base.tied:
            return Change(name, kind, _base_head(reference), 0.0, full)
        return Change(name, kind, None, 0.0, full)
    choice = plan.choose(name, kind, tensor, reference)
    try:
        enc = get_codec(choice.codec).encode(tensor, reference, **choice.params)
    except CodecError as cause:
        raise CodecError(f"{name}: {cause}") from None
    return Change(name, kind, enc, relative_error(enc, tensor, reference), full)


def _adapter_changes(base: Checkpoint, adapter: Adapter) -> Iterator[Change]:
    targets = adapter.targets(base)
    if adapter.keeps_base_head(base, targets):
        yield Change(HEAD, "head", _base_head(base.tensor(HEAD)), 0.0, 0)
    for target in targets:
        enc = adapter.encode(target, base)
        stored = sum(t.numel() * t.element_size() for t in enc.tensors.values())
        yield Change(target.parameter, classify(target.parameter, enc.shape), enc, 0.0, stored)


def _base_head(head: torch.Tensor) -> Encoded:
    """An entry without rows: says that the head is the base's although the embedding changed."""
    return RowsCodec().encode(head, head)


def same(tensor: torch.Tensor, base: torch.Tensor) -> bool:
    """Equal shape and bits; across dtypes, equal bits once both are converted exactly."""
    if tensor.shape != base.shape:
        return False
    if tensor.dtype != base.dtype:
        common = torch.promote_types(tensor.dtype, base.dtype)
        tensor, base = tensor.to(common), aligned(base, tuple(base.shape), common)
    if tensor.numel() == 0:
        return True
    bits = (t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, base))
    return torch.equal(*bits)


def _size(checkpoint: Checkpoint, name: str) -> int:
    tensor = checkpoint.tensor(name)
    return tensor.numel() * tensor.element_size()


def _revision(path: Path) -> str | None:
    """The commit of a hub snapshot: its directory is named after it."""
    real = path.resolve()
    return real.name if real.parent.name == "snapshots" else None
