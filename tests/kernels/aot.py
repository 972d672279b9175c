"""Compile every shipped configuration for GPUs that need not be there, and look at the result.

``python -m tests.kernels.aot fast`` (or ``all``) prints one JSON object per configuration. It is
a program of its own because the tests run Triton's interpreter, which cannot be left again.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltaserve.kernels.attention import launch as attention_launch
from deltaserve.kernels.attention import triton as attention
from deltaserve.kernels.attention.batch import SPAN
from deltaserve.kernels.delta_embedding import launch as embedding_launch
from deltaserve.kernels.delta_embedding import triton as embedding
from deltaserve.kernels.delta_matmul import launch
from deltaserve.kernels.delta_matmul import triton as packed
from deltaserve.kernels.delta_matmul import triton_dense as dense
from deltaserve.kernels.delta_matmul.chunks import CHUNK_ROWS
from deltaserve.kernels.delta_matmul.layout import FIELDS, LANES, NM24_LANES, RANK_BLOCKS

CAPABILITIES = (80, 90)
# Pointers that do not point to activations.
TYPES = {
    "table_SF": "*i64",
    "slot_T": "*i64",
    "id_T": "*i64",
    "table_RB": "*i64",
    "slot_C": "*i32",
    "start_C": "*i32",
    "end_C": "*i32",
    "row_P": "*i32",
    "first_P": "*i32",
    "start_R": "*i32",
    "len_R": "*i32",
    "partial_XTN": "*fp32",
    "partial_XTR": "*fp32",
    "partial_XTHD": "*fp32",
    "weight_XTH": "*fp32",
    "scale_S": "*fp32",
    "scales": "*bf16",
    "places": "*i16",
    "scale": "fp32",
    "softcap": "fp32",
}
ACTIVATIONS = (
    *("y_TN", "x_TK", "out_NK", "out_TD", "out_THD", "q_THD"),
    *("k_cache", "v_cache", "k_TGD", "v_TGD"),
)
WORDS = {("int", 1): "*u8", ("int", 2): "*i16", ("int", 4): "*i32", ("nm24", 2): "*i16"}


@dataclass(frozen=True)
class Config:
    """A kernel with its constants. fast: part of the default run. product: multiplies tiles."""

    label: str
    kernel: Any
    constants: dict[str, Any]
    warps: int
    stages: int
    fast: bool = False
    product: bool = True


def configs() -> Iterator[Config]:
    yield from _packed()
    yield from _dense()
    yield from _embedding()
    yield from _attention()


def _packed() -> Iterator[Config]:
    for (codec, bits), tile in launch.TILES.items():
        widths = LANES[bits] if codec == "int" else (NM24_LANES,)
        most = widths[0]
        for lanes in widths:
            steps = 8 if codec == "int" else 4
            for run in (1, 2, steps):
                for indexed, split in ((False, 4), (False, 1), (True, 1)):
                    common = {"CODEC": codec, "BITS": bits, "LANES": lanes}
                    yield Config(
                        f"packed {codec} {bits} bits, {lanes} lanes, run {run}, split {split}",
                        packed.packed_matmul,
                        {
                            **common,
                            "RUN": run,
                            "INDEXED": indexed,
                            "FIELDS": FIELDS,
                            "SPLIT": split,
                            "BLOCK_M": CHUNK_ROWS,
                            "BLOCK_N": tile.block_n,
                        },
                        tile.warps,
                        tile.stages,
                        fast=split == 4 and run == 1 and lanes == most,
                    )
            constants = {**common, "BLOCK_N": tile.block_n}
            label = f"dequantise {codec} {bits} bits, {lanes} lanes"
            yield Config(label, packed.dequantise, constants, tile.warps, 3, product=False)
    add = launch.ADD_TILE
    sizes = {"INDEXED": False, "FIELDS": FIELDS, "SPLIT": 8}
    blocks = {"BLOCK_M": CHUNK_ROWS, "BLOCK_N": add.block_n}
    yield Config(
        "add partials", packed.add_partials, sizes | blocks, add.warps, 3, fast=True, product=False
    )


def _dense() -> Iterator[Config]:
    tile = launch.DENSE_TILE
    common = {"FIELDS": FIELDS, "BLOCK_M": CHUNK_ROWS}
    for block in RANK_BLOCKS:
        ranks = {**common, "SPLIT": launch.SHRINK_SPLIT, "BLOCK_R": block}
        shrink = ranks | {"BLOCK_K": launch.BLOCK_K}
        expand = ranks | {"BLOCK_N": tile.block_n}
        fast = block == RANK_BLOCKS[0]
        for name, kernel, constants in (
            ("shrink", dense.lowrank_shrink, shrink),
            ("expand", dense.lowrank_expand, expand),
        ):
            label = f"{name} {block}"
            yield Config(label, kernel, constants, tile.warps, tile.stages, fast=fast)
    rows = {**common, "BLOCK_N": tile.block_n, "BLOCK_K": launch.BLOCK_K}
    yield Config("listed rows", dense.listed_rows, rows, tile.warps, tile.stages, fast=True)


def _embedding() -> Iterator[Config]:
    for bits, widths in LANES.items():
        for lanes in widths:
            for indexed in (False, True):
                constants = {"BITS": bits, "LANES": lanes, "INDEXED": indexed, "FIELDS": FIELDS}
                yield Config(
                    f"embedding {bits} bits, {lanes} lanes, indexed {indexed}",
                    embedding.embed_packed,
                    constants,
                    warps=1,
                    stages=3,
                    fast=indexed and bits == 2 and lanes == widths[0],
                    product=False,
                )
    sizes = {"FIELDS": FIELDS, "BLOCK_D": embedding_launch.BLOCK_D}
    yield Config("embedding of rows", embedding.embed_listed, sizes, 4, 3, fast=True, product=False)


def _attention() -> Iterator[Config]:
    for dim in (64, 128, 256):
        for rows, split in (
            (attention_launch.DECODE_ROWS, True),
            (attention_launch.PREFILL_ROWS, False),
        ):
            block_l, warps = attention_launch.tile_of(rows, dim)
            for window, softcap in ((0, False), (4096, True)):
                yield Config(
                    f"attention {dim}, {rows} rows, window {window}, softcap {softcap}",
                    attention.attend,
                    {
                        "GROUP": 4,
                        "HEAD_DIM": dim,
                        "BLOCK_SIZE": 16,
                        "WINDOW": window,
                        "SOFTCAP": softcap,
                        "SPLIT": split,
                        "SPAN": SPAN,
                        "BLOCK_M": rows,
                        "BLOCK_L": block_l,
                        "BLOCK_D": dim,
                    },
                    warps,
                    attention_launch.STAGES,
                    fast=dim == 128 and not window,
                )
        sizes = {"HEAD_DIM": dim, "BLOCK_D": dim}
        yield Config("write kv", attention.scatter_kv, sizes, 1, 3, product=False)
        merge = sizes | {"WINDOW": 4096, "SPAN": SPAN}
        yield Config("merge spans", attention.merge_spans, merge, 1, 3, product=False)


def examine(config: Config, dtype: str, capability: int) -> dict[str, Any]:
    """Compile one configuration -> registers, bytes spilled, shared memory, tensor cores used."""
    signature, attributes = {}, {}
    words = WORDS.get((config.constants.get("CODEC", ""), config.constants.get("BITS", 0)), "*i32")
    for place, name in enumerate(config.kernel.arg_names):
        if name in config.constants:
            signature[name] = "constexpr"
            continue
        types = {**TYPES, "words": words, **dict.fromkeys(ACTIVATIONS, f"*{dtype}")}
        signature[name] = types.get(name, "i32")
        # What the launcher finds out by itself: aligned tensors, widths that are multiples of 16.
        if signature[name][0] == "*" or name.startswith(("stride", "num_in")):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(config.kernel, signature, constexprs=config.constants, attrs=attributes)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    if config.kernel is packed.packed_matmul:
        options |= launch.register_limit(
            divmod(capability, 10), (config.constants["BITS"], config.constants["LANES"])
        )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {
        "label": config.label,
        "dtype": dtype,
        "capability": capability,
        "product": config.product,
        "shared": compiled.metadata.shared,
        "tensor_cores": bool(re.search(r"\b(mma\.sync|wgmma)", compiled.asm["ptx"])),
        **_resources(compiled.asm["cubin"]),
    }


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread and bytes of stack (what was spilled), from the wheel's cuobjdump."""
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(found["REG"]), "spilled": int(found["STACK"]) + int(found["LOCAL"])}


def main() -> None:
    everything = sys.argv[1] == "all"
    for config in configs():
        if everything or config.fast:
            for capability in CAPABILITIES:
                for dtype in ("bf16", "fp16") if everything else ("bf16",):
                    print(json.dumps(examine(config, dtype, capability)), flush=True)


if __name__ == "__main__":
    main()
