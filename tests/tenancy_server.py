"""``deltaserve serve`` in a process of its own, with tenants, an administrator and a tiny base."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deltaserve.demo.tokenizer import build_tokenizer
from tests.families import COMMON

ADMIN, ACME, GLOBEX = "admin-secret", "sk-acme", "sk-globex"
PROMPT = "reverse: abc"


def make_base(folder: Path, seed: int = 0) -> None:
    """A Llama with random weights, and the demo's tokenizer."""
    tokenizer = build_tokenizer()
    config = AutoConfig.for_model("llama", **{**COMMON, "vocab_size": len(tokenizer)})
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Serving:
    """Serves ``base`` with ``tenants.yaml`` and what is below ``deltas``, all in one folder."""

    def __init__(self, files: Path) -> None:
        self.files, self.log = files, files / "server.log"
        self.start()

    def start(self, engine: str = "--no-engine-process") -> None:
        command = [sys.executable, "-m", "deltaserve", "serve", str(self.files / "base")]
        command += ["--port", "0", "--device", "cpu", "--kv-cache-memory-bytes", str(1 << 24)]
        command += ["--tenants", str(self.files / "tenants.yaml")]
        command += ["--state-dir", str(self.files / "state")]
        command += ["--delta-root", str(self.files / "deltas"), engine]
        environment = {**os.environ, "DELTASERVE_ADMIN_KEY": ADMIN}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if ready := re.match(r"DeltaServe ready at (http://\S+)", line):
                self.url = ready[1]
                return
        raise AssertionError(f"it ended with {self.process.wait()}: {self.log.read_text()}")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            assert self.process.wait(30) == 0

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def admin(self, method: str, path: str, status: int = 200, **more: object) -> dict:
        headers = {"authorization": f"Bearer {ADMIN}"}
        answer = httpx.request(method, self.url + path, headers=headers, timeout=60, **more)
        assert answer.status_code == status, answer.text
        return answer.json()

    def client(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def answer(self, key: str, model: str) -> str:
        with self.client(key) as client:
            return (
                client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0)
                .choices[0]
                .text
            )
