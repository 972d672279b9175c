"""Compress fine-tunes of one base: what a caller asks for, and which way that takes."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deltaserve.artifact.checkpoint import Checkpoint, locate
from deltaserve.artifact.manifest import Manifest
from deltaserve.artifact.safetensors_io import MAX_SHARD_BYTES
from deltaserve.artifact.staging import require_free
from deltaserve.compress.change import compare
from deltaserve.compress.choose import Chosen, Request, calibrated
from deltaserve.compress.common import PathLike, Progress, check_device, silent
from deltaserve.compress.compat import check_compatible
from deltaserve.compress.goal import Goal
from deltaserve.compress.layers import ARCHITECTURES
from deltaserve.compress.lora import Adapter
from deltaserve.compress.plan import Plan, make_plan
from deltaserve.compress.store import Destination, Origin, adapter_changes, source_digest, store
from deltaserve.compress.textsource import TextOptions
from deltaserve.errors import ConfigError

# zstd's, for the lossless preset: at most the size of zstd -19 on the XOR of the two files.
SMALLEST = 19


@dataclass(frozen=True)
class Target:
    """A fine-tune (a directory, hub id or PEFT LoRA adapter) and where its delta goes."""

    model: PathLike
    out: PathLike


def compress(
    base: PathLike,
    model: PathLike,
    out: PathLike,
    plan: Plan | None = None,
    progress: Progress = silent,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    calibration: TextOptions | None = None,
    device: str = "cpu",
    distil: int = 0,
) -> Manifest:
    """Write ``model - base`` to the new directory ``out`` and return its manifest.

    base, model: local directories or hub ids; model may be a PEFT LoRA adapter, which is
    kept exactly and takes no plan. calibration: text that the fine-tune reads on
    ``device``, so that projections are quantised for what they do to it. Memory: a few
    times the largest tensor; with calibration also a decoder layer and the activations.
    distil: steps of ``distill`` after that, for which the whole model is in memory.
    Nothing is left at ``out`` unless all went well. Raises CheckpointError, CompatibilityError,
    CodecError, ConfigError, OutputExistsError.
    """
    request = Request(plan=plan, options=calibration, device=device, distil=distil)
    targets = [Target(model, out)]
    return compress_many(base, targets, request, progress, max_shard_bytes)[0].manifest


def compress_to(
    base: PathLike,
    model: PathLike,
    out: PathLike,
    goal: Goal,
    options: TextOptions | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Chosen:
    """Like ``compress``, with codecs chosen per tensor and the result checked on held-out text.

    The manifest's quality tells whether the goal was met. A model that cannot be
    calibrated is rounded plainly, and ``note`` says so. Raises what ``compress`` raises,
    and ConfigError for a ratio that no choice reaches.
    """
    request = Request(goal=goal, options=options or TextOptions(), device=device)
    return compress_many(base, [Target(model, out)], request, progress)[0]


def compress_many(
    base: PathLike,
    targets: Sequence[Target],
    request: Request,
    progress: Progress = silent,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Chosen]:
    """Several fine-tunes in step, layer by layer, so that what one reads of the base is still
    in memory for the next; the base is opened and hashed once."""
    for target in targets:
        require_free(Path(target.out))
    check_device(request.device)
    origin = Origin.open(base, progress)
    found: list[Chosen | None] = [None] * len(targets)
    running = {
        number: _steps(
            origin, target.model, Destination(Path(target.out), max_shard_bytes), request,
            _named(progress, target, len(targets)),
        )
        for number, target in enumerate(targets)
    }  # fmt: skip
    try:
        while running:
            for number, steps in list(running.items()):
                try:
                    next(steps)
                except StopIteration as end:
                    found[number] = end.value
                    del running[number]
    finally:
        for steps in running.values():
            steps.close()
    return [each for each in found if each is not None]


def _named(progress: Progress, target: Target, count: int) -> Progress:
    """Several at once are told apart by the names of their outputs."""
    if count == 1:
        return progress
    name = Path(target.out).name
    return lambda phase, done, total: progress(f"{name}: {phase}", done, total)


def _steps(
    origin: Origin, model: PathLike, to: Destination, request: Request, report: Progress
) -> Generator[None, None, Chosen]:
    path, name = locate(model)
    if Adapter.is_adapter(path):
        if request.plan is not None or (request.options is not None and request.goal is None):
            raise ConfigError(
                f"{name} is a LoRA adapter, which is always kept exactly; drop the options for "
                "codecs and calibration"
            )
        adapter = Adapter.open(path, name)
        changes = adapter_changes(origin.checkpoint, adapter)
        digest = source_digest(adapter, report)
        note = "adapters are kept exactly" if request.goal else ""
        return Chosen((yield from store(origin, adapter, digest, changes, to, report)), note=note)
    tuned, note = Checkpoint.open(model), ""
    names = check_compatible(origin.checkpoint, tuned)
    if request.goal is not None and request.goal.lossless:
        request = replace(
            request, goal=None, options=None, plan=make_plan("xor", {"level": SMALLEST})
        )
    elif request.goal is not None and tuned.architecture not in ARCHITECTURES:
        note = f"{tuned.architecture} cannot be calibrated: rounded plainly to 2 bits, not checked"
        request = replace(request, goal=None, options=None)
    digest = source_digest(tuned, report)
    if request.options is not None:
        return (yield from calibrated(origin, tuned, digest, names, to, request, report))
    plan = request.plan or make_plan()
    plan.check_rules(names)
    plain = (compare(name, origin.checkpoint, tuned, plan) for name in names)
    manifest = yield from store(origin, tuned, digest, plain, to, report)
    return Chosen(manifest, note=note)
