"""Manifests as tables on stdout."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from deltaserve.artifact.manifest import KINDS, Manifest, TensorEntry
from deltaserve.artifact.reader import Delta

PLAIN_WIDTH = 140


def print_summary(manifest: Manifest, out: Path) -> None:
    """After ``compress``: sizes by class and what to do next."""
    console = _console()
    console.print(_sizes(manifest))
    console.print(_ratios(manifest))
    console.print(f"wrote {out}", soft_wrap=True, highlight=False, markup=False)


def print_delta(delta: Delta, *, verified: bool) -> None:
    """The whole manifest."""
    console, manifest = _console(), delta.manifest
    facts = {
        "delta": str(delta.path),
        "digest": manifest.digest + (" (verified)" if verified else ""),
        "base": manifest.base.name + _revision(manifest),
        "base digest": manifest.base.digest,
        "source": f"{manifest.source.name} ({manifest.source.kind})",
        "source digest": manifest.source.digest,
        "architecture": manifest.architecture,
        "also differs": ", ".join(p.name for p in delta.extra_files()) or "nothing",
    }
    for label, value in facts.items():
        console.print(f"{label:>14}  {value}", soft_wrap=True, highlight=False, markup=False)
    console.print(_sizes(manifest))
    console.print(_parameters(manifest))
    console.print(_ratios(manifest))


def _console() -> Console:
    console = Console(highlight=False)
    # A pipe has no width; rich would cut names at 80 columns.
    return console if console.is_terminal else Console(width=PLAIN_WIDTH, highlight=False)


def _revision(manifest: Manifest) -> str:
    return f"@{manifest.base.revision}" if manifest.base.revision else ""


def _ratios(manifest: Manifest) -> str:
    sizes = manifest.sizes
    return f"{sizes.resident_ratio:.2f}x smaller in memory, {sizes.disk_ratio:.2f}x on disk"


def _sizes(manifest: Manifest) -> Table:
    table = Table("class", title="bytes by class of parameter", title_justify="left")
    for column in ("fine-tune", "in memory", "on disk"):
        table.add_column(column, justify="right")
    for kind in (*KINDS, "total"):
        sizes = manifest.sizes
        counts = [getattr(s, kind) for s in (sizes.full, sizes.resident, sizes.disk)]
        if any(counts) or kind == "total":
            table.add_row(kind, *(f"{count:,}" for count in counts))
    return table


def _parameters(manifest: Manifest) -> Table:
    table = Table(title="changed parameters", title_justify="left")
    table.add_column("parameter", overflow="fold")
    table.add_column("shape", no_wrap=True)
    table.add_column("codec")
    for column in ("bits/value", "in memory", "error"):
        table.add_column(column, justify="right")
    for name, entry in manifest.tensors.items():
        table.add_row(
            name,
            "x".join(map(str, entry.shape)) or "scalar",
            _codec(entry),
            _bits(entry),
            f"{entry.resident_bytes:,}",
            f"{entry.error:.4f}",
        )
    return table


def _codec(entry: TensorEntry) -> str:
    """Short, for a column: the settings that distinguish one parameter from the next."""
    p, words = entry.params, [entry.codec]
    if "bits" in p and (entry.codec != "rows" or p["bits"]):
        words.append(f"{p['bits']}-bit")
    if p.get("scale_axis", "group") != "group":
        words.append(f"per {p['scale_axis']}")
    elif "group_size" in p:
        words.append(f"g{p['group_size'] or '=row'}")
    words += [f"{p['planes']} planes"] if p.get("planes", 1) > 1 else []
    words += ["asymmetric"] if not p.get("symmetric", True) else []
    words += [f"{key} {p[key]}" for key in ("rank", "rows") if key in p]
    return " ".join(words)


def _bits(entry: TensorEntry) -> str:
    count = 1
    for size in entry.shape:
        count *= size
    return f"{8 * entry.resident_bytes / count:.2f}" if count else "-"
