"""Manifests as tables on stdout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deltaserve.artifact.manifest import KINDS, Manifest, TensorEntry
from deltaserve.artifact.quality import Quality, TextRef
from deltaserve.artifact.reader import Delta
from deltaserve.compress.choose import Chosen

PLAIN_WIDTH = 140


def print_summary(chosen: Chosen, out: Path) -> None:
    """After ``compress``: sizes by class, the verdict if there is one, what to do next."""
    console, manifest = make_console(), chosen.manifest
    console.print(_sizes(manifest))
    console.print(_ratios(manifest))
    if chosen.note:
        console.print(chosen.note, soft_wrap=True)
    if manifest.quality is not None:
        console.print(f"{verdict(manifest.quality)}, on held-out text")
    elif not chosen.exact:
        console.print("not compared with the fine-tune: deltaserve verify does that")
    console.print(f"wrote {out}", soft_wrap=True, highlight=False, markup=False)


def print_candidates(chosen: Chosen) -> None:
    """After ``compress --explain``: every candidate of every tensor, and the choice."""
    table = Table(title="candidates", title_justify="left")
    table.add_column("parameter", overflow="fold")
    table.add_column("candidate")
    for column in ("in memory", "nats per token"):
        table.add_column(column, justify="right")
    table.add_column("chosen")
    assert chosen.table is not None
    for name, candidates in chosen.table.items():
        for number, each in enumerate(sorted(candidates, key=lambda c: c.bytes)):
            table.add_row(
                "" if number else name,
                _settings(each.choice.codec, each.choice.params),
                f"{each.bytes:,}",
                f"{each.error:.3g}",
                "yes" if each == chosen.picks.get(name) else "",
            )
        table.add_section()
    make_console().print(table)


def print_delta(delta: Delta, *, verified: bool) -> None:
    """The whole manifest."""
    console, manifest = make_console(), delta.manifest
    facts = {
        "delta": str(delta.path),
        "digest": manifest.digest + (" (verified)" if verified else ""),
        "base": manifest.base.name + _revision(manifest),
        "base digest": manifest.base.digest,
        "source": f"{manifest.source.name} ({manifest.source.kind})",
        "source digest": manifest.source.digest,
        "architecture": manifest.architecture,
        "calibrated on": _text(manifest.calibration),
        "also differs": ", ".join(p.name for p in delta.extra_files()) or "nothing",
    }
    for label, value in facts.items():
        console.print(f"{label:>14}  {value}", soft_wrap=True, highlight=False, markup=False)
    console.print(_sizes(manifest))
    console.print(_parameters(manifest))
    if manifest.quality is not None:
        console.print(_quality(manifest.quality))
    console.print(_ratios(manifest))


def print_quality(quality: Quality) -> None:
    """After ``verify``: what was measured, and the verdict in one line."""
    console = make_console()
    console.print(_quality(quality))
    console.print(verdict(quality))


def verdict(quality: Quality) -> str:
    """For example "passed: KL 0.0012 (at most 0.01), agreement 99.5 %"."""
    most, least = quality.max_kl, quality.min_agreement
    words = "verified" if most is None and least is None else "passed"
    kl = f"KL {quality.kl_mean:.3g}" + (f" (at most {most:g})" if most is not None else "")
    agreement = f"agreement {quality.agreement:.2%}"
    agreement += f" (at least {least:.2%})" if least is not None else ""
    return f"{words if quality.passed else 'MISSED'}: {kl}, {agreement}"


def make_console() -> Console:
    console = Console(highlight=False)
    # A pipe has no width; rich would cut names at 80 columns.
    return console if console.is_terminal else Console(width=PLAIN_WIDTH, highlight=False)


def _revision(manifest: Manifest) -> str:
    return f"@{manifest.base.revision}" if manifest.base.revision else ""


def _text(text: TextRef | None) -> str:
    if text is None:
        return "nothing"
    return f"{text.tokens:,} tokens in {text.sequences} sequences, {text.source}"


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


def _quality(quality: Quality) -> Table:
    text = quality.text
    table = Table(title="base + delta against fine-tune", title_justify="left", show_header=False)
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row(f"tokens, {text.source}", f"{text.tokens:,}")
    places = "none" if quality.first_divergence < 0 else f"token {quality.first_divergence}"
    for label, value in (
        ("KL of the next token, mean (nats)", f"{quality.kl_mean:.3g}"),
        ("KL, 99th percentile", f"{quality.kl_p99:.3g}"),
        ("KL, largest", f"{quality.kl_max:.3g}"),
        ("same most likely token", f"{quality.agreement:.2%}"),
        ("perplexity of the fine-tune", f"{quality.perplexity_fine_tune:.4f}"),
        ("perplexity of base + delta", f"{quality.perplexity_delta:.4f}"),
        (f"identical greedy continuations, {quality.prompts}", f"{quality.identical:.1%}"),
        (f"first difference, median of {quality.continued}", places),
    ):
        table.add_row(label, value)
    if quality.tasks is not None:
        for label, score in (
            ("fine-tune", quality.tasks_fine_tune),
            ("base + delta", quality.tasks_delta),
        ):
            table.add_row(f"exact matches of the {label}, {quality.tasks}", f"{score:.1%}")
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
    return _settings(entry.codec, entry.params)


def _settings(codec: str, p: Mapping[str, Any]) -> str:
    """Short, for a column: the settings that distinguish one parameter from the next."""
    words = [codec]
    if "bits" in p and (codec != "rows" or p["bits"]):
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
