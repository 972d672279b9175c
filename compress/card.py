"""The model card that travels with a delta."""

from __future__ import annotations

from collections import Counter

from deltaserve.artifact.manifest import Manifest


def model_card(manifest: Manifest) -> str:
    """README.md: what it is, how small, how exact, how to serve it."""
    sizes, base = manifest.sizes, manifest.base
    codecs = Counter(entry.codec for entry in manifest.tensors.values())
    worst = max(manifest.tensors.items(), key=lambda item: item[1].error, default=None)
    lines = [
        "---",
        "library_name: deltaserve",
        f"base_model: {base.name}",
        "---",
        "",
        f"# {manifest.source.name}, as a delta of {base.name}",
        "",
        f"The difference between {manifest.source.name} and its base, made by `deltaserve "
        "compress`. It is of use only with that base.",
        "",
        "| | bytes | smaller by |",
        "|---|---|---|",
        f"| fine-tune | {sizes.full.total:,} | |",
        f"| delta in memory | {sizes.resident.total:,} | {sizes.resident_ratio:.2f}x |",
        f"| delta on disk | {sizes.disk.total:,} | {sizes.disk_ratio:.2f}x |",
        "",
        f"- base: {base.name}, digest `{base.digest}`",
        f"- delta: digest `{manifest.digest}`",
        "- codecs: " + (", ".join(f"{name} ({n})" for name, n in codecs.most_common()) or "none"),
    ]
    if worst is not None:
        lines.append(f"- largest relative error of a delta: {worst[1].error:.3g} ({worst[0]})")
    lines += [
        "",
        "Serve it beside other fine-tunes of the same base:",
        "",
        "    deltaserve serve BASE --delta NAME=PATH",
        "",
    ]
    return "\n".join(lines)
