"""The results as people read them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from deltaserve.demo.results import ModelRow, Results

PIPE_WIDTH = 140  # a pipe has no width of its own; rich would cut at 80 columns
NUMBERS = ("memory", "disk", "base", "fine-tune", "served", "kept", "tokens/s")
NOTES = (
    "memory, disk: bytes of everything that the fine-tune stores, embeddings included, by bytes "
    "of its delta; for the LoRA adapter, of the dense model that it stands for.",
    "base, fine-tune, served: exact match on the same held-out prompts. base and served were "
    "answered over HTTP, fine-tune by transformers. kept: served / fine-tune.",
    "tokens/s: generated tokens by the seconds in which all models were asked at once.",
)


def print_results(results: Results) -> None:
    """The table on stdout, with what its numbers mean."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH, highlight=False)
    console.print(results_table(results))
    for note in NOTES:
        console.print(f"  {note}")
    engine, total = results.engine, results.total
    console.print(
        f"\n{total.prompts} prompts answered in {results.serving_seconds:.1f} s by one server. "
        f"Of its {engine.steps} batches, {engine.mixed_steps} mixed several models, "
        f"up to {engine.max_models_in_step} at once."
    )
    console.print(f"All numbers: {results.directory}/results.json\n", soft_wrap=True)


def results_table(results: Results) -> Table:
    base, total = results.base, results.total
    table = Table(title="Fine-tunes of one base, served together as deltas", title_justify="left")
    for column in ("model", "kind", "codecs"):
        table.add_column(column)
    for column in NUMBERS:
        table.add_column(column, justify="right", no_wrap=True)
    for row in results.models:
        table.add_row(*_cells(row))
    table.add_section()
    blank = [""] * (len(NUMBERS) - 1)
    table.add_row("base", "base", "", *blank, f"{base.tokens_per_second:.0f}")
    table.add_row("all", "", "", *blank, f"{total.tokens_per_second:.0f}")
    return table


def _cells(row: ModelRow) -> list[str]:
    scores = (row.base_score, row.fine_tune_score, row.served_score, row.kept)
    return [
        row.name,
        row.kind,
        ", ".join(row.codecs),
        f"{row.resident_ratio:.2f}x",
        f"{row.disk_ratio:.2f}x",
        *(f"{score:.1%}" for score in scores),
        f"{row.tokens_per_second:.0f}",
    ]


def shell_command(words: Sequence[str]) -> str:
    """One option a line, ready to be pasted into a shell."""
    lines = [""]
    for word in words:
        if word.startswith("--"):
            lines.append("   ")
        lines[-1] += f" {shlex.quote(word)}"
    return " \\\n".join(lines).lstrip()


def curl_command(url: str, model: str, prompt: str) -> str:
    """A chat request that answers `prompt`."""
    messages = [{"role": "user", "content": prompt}]
    body = json.dumps({"model": model, "temperature": 0, "max_tokens": 32, "messages": messages})
    return (
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"    -d {shlex.quote(body)}"
    )
