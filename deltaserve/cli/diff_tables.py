"""What a fine-tune changed, as pictures of characters on stdout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table

from deltaserve.cli.tables import make_console
from deltaserve.compress.diff import ParameterDiff

BARS = " ▁▂▃▄▅▆▇█"


def print_diff(found: Sequence[ParameterDiff], *, parameters: bool = False) -> None:
    """Matrices by layer, all by kind; parameters: and each one that changed."""
    console = make_console()
    matrices = [each for each in found if each.full_rank and each.place[0]]
    if matrices:
        console.print(_picture("how far it moved, of the base's norm", matrices, _moved))
        console.print(_picture("directions it moved in, of all", matrices, _directions))
    console.print(_kinds(found))
    if parameters:
        console.print(_parameters([each for each in found if each.unchanged < 1]))
    same = sum(each.unchanged == 1 for each in found)
    console.print(f"{same} of {len(found)} parameters are unchanged")
    _advise(console, parameters)


def _moved(each: ParameterDiff) -> float:
    return each.relative


def _directions(each: ParameterDiff) -> float:
    return each.effective_rank / each.full_rank


def _picture(
    title: str, matrices: Sequence[ParameterDiff], share: Callable[[ParameterDiff], float]
) -> Table:
    """Layers down, projections across; bars reach to the largest share."""
    columns = list(dict.fromkeys(each.place[1] for each in matrices))
    top = max(share(each) for each in matrices) or 1.0
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    table.add_column("")
    for column in columns:
        table.add_column(column.removesuffix("_proj"), justify="right", no_wrap=True)
    layers: dict[str, dict[str, str]] = {}
    for each in matrices:
        layer, column = each.place
        bar = BARS[math.ceil(share(each) / top * (len(BARS) - 1))]
        layers.setdefault(layer, {})[column] = f"{bar} {share(each):.1%}"
    for layer in sorted(layers, key=lambda name: int(name.split()[1])):
        table.add_row(layer, *(layers[layer].get(column, "") for column in columns))
    return table


def _kinds(found: Sequence[ParameterDiff]) -> Table:
    """Sums over parameters of one kind, and which codecs would suit them."""
    table = Table(title="by kind", title_justify="left", box=None, padding=(0, 1))
    table.add_column("")
    for column in ("values", "equal", "rows changed", "norm", "suits"):
        table.add_column(column, justify="right")
    for kind, group in groupby(sorted(found, key=lambda d: d.kind), key=lambda d: d.kind):
        members = list(group)
        values = sum(math.prod(d.shape) for d in members)
        rows = sum(d.shape[0] if d.shape else 1 for d in members)
        codecs = [d.suits for d in members if d.suits]
        counted = ", ".join(f"{c} ({codecs.count(c)})" for c in dict.fromkeys(codecs))
        table.add_row(
            kind,
            f"{values:,}",
            f"{sum(d.unchanged * math.prod(d.shape) for d in members) / max(values, 1):.1%}",
            f"{sum(d.rows * (d.shape[0] if d.shape else 1) for d in members) / rows:.1%}",
            f"{math.sqrt(sum(d.norm**2 for d in members)):.4g}",
            counted or "nothing to store",
        )
    return table


def _parameters(changed: Sequence[ParameterDiff]) -> Table:
    table = Table(title="changed parameters", title_justify="left", box=None, padding=(0, 1))
    table.add_column("", overflow="fold")
    table.add_column("shape", no_wrap=True)
    columns = ("equal", "rows changed", "norm", "of base", "eff. rank", "rank 90%", "suits")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for each in changed:
        table.add_row(
            " ".join(each.place).strip(),
            "x".join(map(str, each.shape)) or "scalar",
            f"{each.unchanged:.1%}",
            f"{each.rows:.1%}",
            f"{each.norm:.4g}",
            f"{each.relative:.2%}",
            f"{each.effective_rank:.1f}" if each.effective_rank else "-",
            str(each.energy_rank or "-"),
            each.suits,
        )
    return table


def _advise(console: Console, parameters: bool) -> None:
    if not parameters:
        console.print("--parameters lists each of them")
    console.print("deltaserve compress tries them all and takes what costs least")
