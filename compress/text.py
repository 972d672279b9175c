"""Text to calibrate and verify on, as token ids.

B sequences of T token ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from deltaserve.artifact.quality import TextRef

SAMPLED = "sampled from the fine-tune"
BATCH = 16
# Tokens of a batch, padding included: what a layer makes of them must fit beside its weights.
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Sample:
    """One sequence of token ids; the first ``prompt`` of them ask, the rest answers."""

    tokens: tuple[int, ...]
    prompt: int


@dataclass(frozen=True)
class FileRef:
    """digest: "sha256:..." of a file's bytes; size: how many they are."""

    digest: str
    size: int


@dataclass(frozen=True)
class Text:
    """Sequences and where they came from. file: None if the fine-tune wrote them."""

    samples: tuple[Sample, ...]
    source: str
    seed: int
    file: FileRef | None = None

    def ref(self) -> TextRef:
        """What a manifest says about this text."""
        lines = "".join(f"{' '.join(map(str, s.tokens))}\n" for s in self.samples)
        digest = "sha256:" + hashlib.sha256(lines.encode()).hexdigest()
        tokens = sum(len(s.tokens) for s in self.samples)
        ref = TextRef(self.source, digest, len(self.samples), tokens, self.seed)
        if self.file is None:
            return ref
        return replace(ref, file_digest=self.file.digest, file_bytes=self.file.size)

    def split(self, held_out: int) -> tuple[Text, Text]:
        """The text without every ``held_out``-th sequence, and those; one sequence is both."""
        if len(self.samples) < held_out:
            return self, self
        kept = tuple(s for i, s in enumerate(self.samples, 1) if i % held_out)
        held = self.samples[held_out - 1 :: held_out]
        return replace(self, samples=kept), replace(self, samples=held)


def batches(
    samples: Sequence[Sample], size: int = BATCH
) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Token ids [B, T], padded on the right with 0, and their lengths; short ones together.

    The order is that of ``sorted(samples, key=length)``.

    Under causal attention what stands to the right of a token does not change it.
    """
    ordered = sorted(samples, key=lambda s: len(s.tokens))
    while ordered:
        count = 1
        while count < min(size, len(ordered)) and (
            (count + 1) * len(ordered[count].tokens) <= BATCH_TOKENS
        ):
            count += 1
        some, ordered = ordered[:count], ordered[count:]
        lengths = [len(s.tokens) for s in some]
        ids_BT = torch.zeros(len(some), max(lengths), dtype=torch.long)
        for row, sample in enumerate(some):
            ids_BT[row, : lengths[row]] = torch.tensor(sample.tokens)
        yield ids_BT, lengths
