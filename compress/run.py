"""Compress a fine-tune: one parameter at a time, from two checkpoints to one delta."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from deltaserve.artifact.checkpoint import HEAD, Checkpoint, locate
from deltaserve.artifact.digest import checkpoint_digest
from deltaserve.artifact.files import copy_changed
from deltaserve.artifact.manifest import BaseRef, ClassBytes, Manifest, SourceRef
from deltaserve.artifact.safetensors_io import MAX_SHARD_BYTES
from deltaserve.artifact.staging import require_free, write_text
from deltaserve.artifact.writer import DeltaWriter
from deltaserve.compress.calibrate import calibrated_changes, calibration_text
from deltaserve.compress.card import model_card
from deltaserve.compress.change import Change, base_head, compare
from deltaserve.compress.classify import classify
from deltaserve.compress.common import PathLike, Progress, silent
from deltaserve.compress.compat import check_compatible
from deltaserve.compress.lora import Adapter
from deltaserve.compress.plan import Plan, make_plan
from deltaserve.compress.text import Text
from deltaserve.compress.textsource import TextOptions
from deltaserve.errors import ConfigError

# A finished delta before anyone can see it: returns its manifest, perhaps with a report.
Check = Callable[[Path, Manifest], Manifest]


def compress(
    base: PathLike,
    model: PathLike,
    out: PathLike,
    plan: Plan | None = None,
    progress: Progress = silent,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    calibration: TextOptions | Text | None = None,
    device: str = "cpu",
    check: Check | None = None,
) -> Manifest:
    """Write ``model - base`` to the new directory ``out`` and return its manifest.

    base, model: local directories or hub ids; model may be a PEFT LoRA adapter, which is
    kept exactly and takes no plan. calibration: text that the fine-tune reads on
    ``device``, so that projections are quantised for what they do to it. Memory: a few
    times the largest tensor; with calibration also a decoder layer and the activations.
    check: sees the result before it appears; what it raises ends the run.
    Nothing is left at ``out`` unless all went well. Raises CheckpointError, CompatibilityError,
    CodecError, ConfigError, OutputExistsError.
    """
    require_free(Path(out))
    origin = Checkpoint.open(base)
    path, name = locate(model)
    text: Text | None = None
    if Adapter.is_adapter(path):
        if plan is not None or calibration is not None:
            raise ConfigError(
                f"{name} is a LoRA adapter, which is always kept exactly; drop the options for "
                "codecs and calibration"
            )
        source: Checkpoint | Adapter
        source = adapter = Adapter.open(path, name)
        changes = _adapter_changes(origin, adapter)
    else:
        source = tuned = Checkpoint.open(model)
        plan = plan or make_plan()
        names = check_compatible(origin, tuned)
        plan.check_rules(names)
        if calibration is None:
            changes = (compare(name, origin, tuned, plan) for name in names)
        else:
            text = (
                calibration
                if isinstance(calibration, Text)
                else calibration_text(origin, tuned, calibration, device)
            )
            changes = calibrated_changes(names, origin, tuned, plan, text, device)
    with DeltaWriter(out, max_shard_bytes=max_shard_bytes) as writer:
        full = _store(writer, changes, source, progress)
        if isinstance(source, Adapter):
            full = [(classify(n, origin.shape(n)), _size(origin, n)) for n in origin.names()]
        manifest = _finish(writer, origin, source, ClassBytes.of(full), text, progress)
        if check is not None:
            manifest = check(writer.directory, manifest)
        write_text(writer.directory / "README.md", model_card(manifest))
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
    text: Text | None,
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
        calibration=None if text is None else text.ref(),
    )
    return manifest


def _adapter_changes(base: Checkpoint, adapter: Adapter) -> Iterator[Change]:
    targets = adapter.targets(base)
    if adapter.keeps_base_head(base, targets):
        yield Change(HEAD, "head", base_head(base.tensor(HEAD)), 0.0, 0)
    for target in targets:
        enc = adapter.encode(target, base)
        stored = sum(t.numel() * t.element_size() for t in enc.tensors.values())
        yield Change(target.parameter, classify(target.parameter, enc.shape), enc, 0.0, stored)


def _size(checkpoint: Checkpoint, name: str) -> int:
    tensor = checkpoint.tensor(name)
    return tensor.numel() * tensor.element_size()


def _revision(path: Path) -> str | None:
    """The commit of a hub snapshot: its directory is named after it."""
    real = path.resolve()
    return real.name if real.parent.name == "snapshots" else None
