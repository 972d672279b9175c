"""A process of ``transformers`` for one model, as ``serving`` starts one for each.

``python -m deltaserve.bench.gpu.generate BASE OUTPUT``: reads prompts as a line of JSON, loads the
model, says "ready", waits for a line, answers all prompts as one batch, and says how many tokens
that were.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from deltaserve.bench.gpu.part import DEVICE


@torch.inference_mode()
def main() -> None:
    base, output = sys.argv[1], int(sys.argv[2])
    ids = torch.tensor(json.loads(sys.stdin.readline()), device=DEVICE)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.to(DEVICE).eval()
    model.generate(ids[:1], max_new_tokens=2, min_new_tokens=2, do_sample=False)
    print("ready", flush=True)
    sys.stdin.readline()
    out = model.generate(ids, max_new_tokens=output, min_new_tokens=output, do_sample=False)
    print((out.shape[1] - ids.shape[1]) * len(out), flush=True)


if __name__ == "__main__":
    main()
