"""Base + delta as an ordinary Hugging Face checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from deltaserve.artifact.checkpoint import HEAD, INDEX, Checkpoint
from deltaserve.artifact.digest import checkpoint_digest
from deltaserve.artifact.files import COMPANIONS
from deltaserve.artifact.reader import Delta
from deltaserve.artifact.safetensors_io import MAX_SHARD_BYTES, SafetensorsWriter, Written
from deltaserve.artifact.staging import StagedDirectory, require_free, write_text
from deltaserve.compress.common import PathLike, Progress, silent


def export(
    base: PathLike,
    delta: PathLike,
    out: PathLike,
    progress: Progress = silent,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write the fine-tune that the delta stands for to the new directory ``out``.

    Streamed, one parameter in memory at a time. Raises BaseMismatchError for another
    base, CheckpointError, ArtifactError, OutputExistsError.
    """
    require_free(Path(out))
    artifact, origin = Delta.open(delta), Checkpoint.open(base)
    digest = checkpoint_digest(origin, lambda done, total: progress("hash base", done, total))
    artifact.check_base(digest)
    with StagedDirectory(out) as staged:
        writer = SafetensorsWriter(staged.path, "model", max_shard_bytes=max_shard_bytes)
        size = _write_parameters(writer, origin, artifact, progress)
        written = writer.finish()
        if len(written.files) > 1:
            write_text(staged.path / INDEX, _index(written, size))
        _write_companions(staged.path, origin, artifact)
        staged.commit()
    return staged.out


def exported_names(base: Checkpoint, delta: Delta) -> list[str]:
    """Parameters of the result: the base's, and the head where the delta gives it its own."""
    names = set(base.names()) | set(delta.names())
    if _tied(base, delta):
        names.discard(HEAD)
    return sorted(names)


def _write_parameters(
    writer: SafetensorsWriter, base: Checkpoint, delta: Delta, report: Progress
) -> int:
    changed, done = set(delta.names()), 0
    for name in exported_names(base, delta):
        reference = base.tensor(name) if base.has(name) else None
        if name in changed:
            tensor = delta.decode(name, reference)
        else:
            assert reference is not None
            tensor = reference
        writer.add(name, tensor)
        done += tensor.numel() * tensor.element_size()
        report("export", min(done, base.num_bytes), base.num_bytes)
    return done


def _tied(base: Checkpoint, delta: Delta) -> bool:
    """Head and embedding stay one: the base has them so, and the delta has no head."""
    return base.tied and HEAD not in delta.manifest.tensors


def _write_companions(target: Path, base: Checkpoint, delta: Delta) -> None:
    own = {path.name: path for path in delta.extra_files()}
    for name in COMPANIONS:
        source = own.get(name, base.path / name)
        if source.is_file() and name != "config.json":
            shutil.copyfile(source, target / name)
    config = json.loads((own.get("config.json", base.path / "config.json")).read_text("utf-8"))
    for holder in (config, config.get("text_config")):
        if isinstance(holder, dict) and (holder is config or "tie_word_embeddings" in holder):
            holder["tie_word_embeddings"] = _tied(base, delta)
    if delta.manifest.source.kind == "lora":
        _set_vocabulary(config, base, delta)
    write_text(target / "config.json", json.dumps(config, indent=2) + "\n")


def _set_vocabulary(config: dict[str, object], base: Checkpoint, delta: Delta) -> None:
    """An adapter has no config.json of its own, but may have added tokens."""
    entry = delta.manifest.tensors.get(base.embedding or "")
    if entry is not None and entry.shape[0] != base.shape(base.embedding or "")[0]:
        config["vocab_size"] = entry.shape[0]


def _index(written: Written, size: int) -> str:
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(written.index.items()))}
    return json.dumps(index, indent=2) + "\n"
