"""Driving the engine step by step, and the Hugging Face model that it must agree with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from deltaserve.config import DeltaSource, EngineConfig
from deltaserve.engine.core import Engine
from deltaserve.engine.scheduler import StepPlan
from deltaserve.engine.types import EngineRequest, SamplingParams

BASE = "base"


@dataclass
class Trace:
    """What an engine generated, and the logits from which each token was drawn."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    logits: dict[str, list[torch.Tensor]] = field(default_factory=dict)


def make_engine(base: Path, deltas: dict[str, Path], **knobs: object) -> Engine:
    return Engine(engine_config(base, deltas, **knobs))


def engine_config(base: Path, deltas: dict[str, Path], **knobs: object) -> EngineConfig:
    sources = tuple(DeltaSource(name, str(path)) for name, path in deltas.items())
    options = {"kv_cache_memory_bytes": 1 << 22, "served_model_name": BASE, **knobs}
    return EngineConfig(base=str(base), deltas=sources, **options)  # type: ignore[arg-type]


def run(engine: Engine, requests: list[EngineRequest]) -> Trace:
    """Add all requests, step until done."""
    trace = Trace({r.request_id: [] for r in requests}, {r.request_id: [] for r in requests})
    _record_logits(engine, trace)
    for request in requests:
        engine.check(request)
        engine.add(request)
    while engine.has_work():
        for event in engine.step():
            trace.tokens[event.request_id] += event.token_ids
    del engine.runner.execute  # the recording one; the class's own is back
    return trace


def _record_logits(engine: Engine, trace: Trace) -> None:
    execute = engine.runner.execute

    def recording(plan: StepPlan, vocab_sizes: dict[int, int]) -> object:
        drawing = [row.seq for row in plan.rows if row.samples]
        if not drawing:
            return execute(plan, vocab_sizes)
        with torch.inference_mode():
            inputs = engine.runner.prepare(plan)
            hidden = engine.runner.forward(inputs)[inputs.last_S]
            logits = engine.runner.logits(hidden, inputs.routing)
        for seq, row in zip(drawing, logits, strict=True):
            trace.logits[seq.request.request_id].append(row[: vocab_sizes[seq.slot]].clone())
        return execute(plan, vocab_sizes)

    engine.runner.execute = recording  # type: ignore[method-assign,assignment]


def greedy(request_id: str, model: str, prompt: list[int], max_tokens: int) -> EngineRequest:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return EngineRequest(request_id, model, tuple(prompt), params)


def prompts(count: int, *, vocab: int, seed: int = 0, longest: int = 30) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]


@torch.inference_mode()
def reference(path: Path, prompt: list[int], max_tokens: int) -> tuple[list[int], torch.Tensor]:
    """transformers.generate of a checkpoint: greedy tokens, and the logits of each."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=max_tokens,
        min_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)
