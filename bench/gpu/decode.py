"""A decode step of an 8B model against the bytes it reads: ``python -m
deltaserve.bench.gpu.decode``.

Llama 3.1 8B's shape with random weights, 64 rows over 1, 8 and 32 tenants with synthetic deltas:
the engine's own runner, with captured steps, from the plan to the tokens on the host. The floor is
what must be read, once each: the base's projections, norms and head, the distinct deltas, and the
rows' keys and values, at the bandwidth of a plain copy measured in the same run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from deltaserve.bench.gpu.part import DEVICE, Clock, Part, copy_bandwidth, device_name, free_bytes
from deltaserve.bench.gpu.shapes import DTYPE, random_model
from deltaserve.engine.graphs import SETTLE_STEPS
from deltaserve.engine.layers import DeltaLinear
from deltaserve.engine.model import KVCache, make_delta_aware, plug_in
from deltaserve.engine.pieces import Piece
from deltaserve.engine.projections import part_of
from deltaserve.engine.routing import StepContext
from deltaserve.engine.runner import Runner, capture_decoding
from deltaserve.engine.scheduler import Row, StepPlan
from deltaserve.engine.sequence import Sequence
from deltaserve.engine.types import EngineRequest, SamplingParams
from deltaserve.kernels.attention.batch import span_of
from deltaserve.kernels.delta_matmul import LaidOut
from deltaserve.kernels.delta_matmul.synthetic import random_operand

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "int 1 bit, row": ("int", {"bits": 1, "scale_axis": "row"}),
    "int 2 bit, group 128": ("int", {"bits": 2, "group_size": 128}),
    "2:4 4 bit, group 128": ("nm24", {"bits": 4, "group_size": 128}),
    "LoRA 16": ("lowrank", {"rank": 16}),
}
TENANTS = (1, 8, 32)
ROWS = 64
CONTEXT = 256
BLOCK_SIZE = 16
WARM_UP = SETTLE_STEPS + 4
STEPS = 30
# Kept free of deltas: what a step takes beside its operands.
SPARE_BYTES = 4 << 30


@dataclass(frozen=True)
class Bench:
    """The runner, its projections, and the bytes that a step without deltas reads."""

    runner: Runner
    layers: list[DeltaLinear]
    base_bytes: int
    kv_bytes: int
    vocab_size: int
    rows: int
    context: int


def prepare(size: str, rows: int, context: int) -> Bench:
    dtype = DTYPE if DEVICE == "cuda" else torch.float32  # the interpreter's bfloat16 is wrong
    model = random_model(size, dtype)
    config: Any = model.config
    embedding: Any = model.get_input_embeddings()
    base_bytes = int(sum(p.nbytes for p in model.parameters()) - embedding.weight.nbytes)
    step = StepContext()
    modules = make_delta_aware(plug_in(model, DEVICE), "LlamaForCausalLM", step)
    blocks = rows * -(-context // BLOCK_SIZE)
    kv = KVCache(config, (blocks + 1) * BLOCK_SIZE, dtype, DEVICE)
    runner = Runner(model, step, kv, block_size=BLOCK_SIZE, device=DEVICE, span=span_of(context))
    if DEVICE == "cuda":
        capture_decoding(runner, config, rows, context)
    else:  # the same buffers and launches
        runner.use_graphs(lambda work: work, max_rows=rows, max_model_len=context)
    layers = {part_of(module)[0] for module in modules.values()}
    projections = [layer for layer in layers if type(layer) is DeltaLinear]
    kv_bytes = rows * context * KVCache.bytes_per_token(config, dtype)
    return Bench(runner, projections, base_bytes, kv_bytes, config.vocab_size, rows, context)


def attach(bench: Bench, codec: str, params: dict[str, Any], slots: int) -> int:
    """Deltas in the first slots -> bytes of one. Values repeat, memory does not."""
    made: dict[tuple[int, int], LaidOut] = {}
    size = 0
    for layer in bench.layers:
        base_NK = layer.grouped.base_NK
        shape = base_NK.shape[0], base_NK.shape[1]
        if shape not in made:
            outputs, inputs = shape
            enc = random_operand(codec, params, outputs, inputs, base_NK.dtype, DEVICE)
            operand = layer.grouped.prepare(enc)
            assert operand is not None, f"no kernel for {codec} {params}"
            made[shape] = operand
        size += sum(part.nbytes for part in made[shape].parts)
        for slot in range(1, slots + 1):
            own = made[shape].moved(torch.clone)
            layer.attach(slot, "weight", (Piece(0, own),))
    return size


def detach(bench: Bench, slots: int) -> None:
    for layer in bench.layers:
        for slot in range(1, slots + 1):
            layer.detach(slot)


def plan(bench: Bench, tenants: int) -> StepPlan:
    """Each row decodes its last token of ``context``; rows of one tenant are neighbours. Without
    tenants all run the base."""
    params = SamplingParams(max_tokens=1, temperature=0.0)
    per_row = -(-bench.context // BLOCK_SIZE)
    rows = []
    for i in range(bench.rows):
        slot = 1 + i * tenants // bench.rows if tenants else 0
        prompt = tuple((i * 7 + j * 3) % bench.vocab_size for j in range(bench.context))
        seq = Sequence(EngineRequest(f"r{i}", "m", prompt, params), slot, seed=i)
        seq.blocks = list(range(i * per_row, (i + 1) * per_row))
        rows.append(Row(seq, bench.context - 1, 1))
    return StepPlan(tuple(rows))


def milliseconds(bench: Bench, tenants: int, steps: int, warm_up: int = WARM_UP) -> float:
    """Median of whole steps, tokens on the host included."""
    step, vocab = plan(bench, tenants), dict.fromkeys(range(tenants + 1), bench.vocab_size)
    times = []
    for number in range(warm_up + steps):
        start = time.perf_counter()
        bench.runner.execute(step, vocab)
        if number >= warm_up:
            times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def measure(part: Part, bench: Bench, bandwidth: float) -> Iterator[dict[str, Any]]:
    steps, warm_up = (1, SETTLE_STEPS) if part.smoke else (STEPS, WARM_UP)
    base_ms = milliseconds(bench, 0, steps, warm_up)
    yield case(bench, bandwidth, "base alone", 0, 0, base_ms)
    for label, (codec, params) in list(FORMATS.items())[:: 3 if part.smoke else 1]:
        if not part.has_time(label, 12):
            continue
        size = attach(bench, codec, params, 1)
        detach(bench, 1)
        slots = 2 if part.smoke else min(32, max(0, free_bytes() - SPARE_BYTES) // size)
        attach(bench, codec, params, slots)
        for tenants in (1, 2) if part.smoke else TENANTS:
            if tenants > slots:
                part.leave_out(f"{label}, {tenants} tenants", f"memory holds {slots}")
                continue
            found = milliseconds(bench, tenants, steps, warm_up)
            yield case(bench, bandwidth, label, tenants, size, found)
        if DEVICE == "cuda" and slots >= 8:
            yield case(bench, bandwidth, label, 8, size, launched(bench, 8, steps), captured=False)
        detach(bench, slots)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def launched(bench: Bench, tenants: int, steps: int) -> float:
    """Without captured steps, for comparison."""
    graphs, bench.runner.graphs = bench.runner.graphs, None
    found = milliseconds(bench, tenants, steps // 3, 2)
    bench.runner.graphs = graphs
    return found


def case(
    bench: Bench,
    bandwidth: float,
    label: str,
    tenants: int,
    delta_bytes: int,
    step_ms: float,
    *,
    captured: bool = True,
) -> dict[str, Any]:
    read = bench.base_bytes + bench.kv_bytes + tenants * delta_bytes
    floor_ms = read / bandwidth * 1e3
    return {
        "format": label,
        "tenants": tenants,
        "rows": bench.rows,
        "context": bench.context,
        "captured": captured and bench.runner.graphs is not None,
        "bytes": read,
        "step_ms": step_ms,
        "floor_ms": floor_ms,
        "of_floor": step_ms / floor_ms,
        "tokens_per_second": bench.rows / step_ms * 1e3,
    }


@torch.inference_mode()
def main() -> None:
    part = Part.of_arguments("decode", __doc__)
    bandwidth = copy_bandwidth(Clock())
    part.note("copy_bytes_per_second", bandwidth)
    size, rows, context = ("tiny", 4, 32) if part.smoke else ("8b", ROWS, CONTEXT)
    bench = prepare(size, rows, context)
    print(f"{device_name()}: {size}, {rows} rows of {context} tokens")
    print(f"{'format':<22}{'tenants':>8}{'GB':>8}{'step ms':>10}{'floor ms':>10}{'ratio':>8}")
    for found in measure(part, bench, bandwidth):
        part.add("rows", found)
        print(
            f"{found['format']:<22}{found['tenants']:>8}{found['bytes'] / 1e9:>8.2f}"
            f"{found['step_ms']:>10.2f}{found['floor_ms']:>10.2f}{found['of_floor']:>8.2f}"
            + ("" if found["captured"] else "   launched one by one"),
            flush=True,
        )


if __name__ == "__main__":
    main()
