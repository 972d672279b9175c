"""Real text to feed pipelines with: the functions of Python's standard library.

A conversation asks for a function by its signature and documentation; the answer is its source.
Lengths are as skewed as those of real tuning data, and every machine that has Python has it.
"""

from __future__ import annotations

import ast
import json
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCABULARY = 4096
SPECIAL = ("<pad>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Corpus:
    """Files of one folder. chats: {"id", "messages"}; pairs: {"prompt", "chosen", "rejected"};
    parquet: {"text"}, zstd; tokenizer: a directory with a chat template."""

    chats: Path
    pairs: Path
    parquet: Path
    tokenizer: Path
    rows: int


def functions() -> Iterator[tuple[str, str]]:
    """Of every documented function: what it is asked for with, and its source."""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = file.read_text(encoding="utf-8", errors="replace")
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (wanted := ast.get_docstring(node)):
                source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
                yield f"Write {node.name} of the module {file.stem}. {wanted}", source


def existing(folder: Path, rows: int = 4000) -> Corpus:
    """What ``write`` left in a folder."""
    names = ("chats.jsonl", "pairs.jsonl", "texts.parquet", "tokenizer")
    chats, pairs, parquet, tokenizer = (folder / name for name in names)
    return Corpus(chats, pairs, parquet, tokenizer, rows)


def write(folder: Path, rows: int = 4000, seed: int = 0) -> Corpus:
    """``rows`` conversations in a seeded order (again from the start when there are fewer)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = list(functions())
    random.Random(seed).shuffle(found)
    chosen = [found[at % len(found)] for at in range(rows)]
    corpus = existing(folder, rows)
    with open(corpus.chats, "w") as chats, open(corpus.pairs, "w") as pairs:
        for at, (asked, source) in enumerate(chosen):
            messages = [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": source},
            ]
            chats.write(json.dumps({"id": f"f{at}", "messages": messages}) + "\n")
            pair = {"prompt": asked, "chosen": source, "rejected": chosen[at - 1][1]}
            pairs.write(json.dumps(pair) + "\n")
    table = pa.table({"text": [source for _, source in chosen]})
    pq.write_table(table, corpus.parquet, compression="zstd", row_group_size=100)
    _train([f"{asked} {source}" for asked, source in found[:400]]).save_pretrained(corpus.tokenizer)
    return corpus


def _train(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|end|>", chat_template=TEMPLATE
    )
