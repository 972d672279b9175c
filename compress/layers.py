"""A Hugging Face decoder one layer at a time: activations travel, weights come and go.

B sequences of T tokens, D the hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.compress.models import quiet
from deltaserve.compress.text import Sample, batches
from deltaserve.errors import CheckpointError

ROOT = "model."
# Decoders of layers that take and give [B, T, D] and call their projections as modules.
ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Phi3ForCausalLM",
)
# Parameter name -> float32 values.
Weights = Mapping[str, torch.Tensor]
# Module path, inputs [tokens, K] without padding.
Watch = Callable[[str, torch.Tensor], None]


class Recorder(nn.Module):
    """Stands where a decoder layer would be: keeps how it is called, passes activations on."""

    def __init__(self, attention_type: str | None) -> None:
        super().__init__()
        self.attention_type = attention_type
        self.call: dict[str, Any] = {}

    def forward(self, hidden_BTD: torch.Tensor, *_: Any, **call: Any) -> torch.Tensor:
        self.call = call
        return hidden_BTD


class LayerWalk:
    """Activations of some text between two decoder layers.

    The model class itself makes embeddings, masks and rotary angles, with recorders in
    place of its layers: whatever it hands to a layer is handed to ours.
    """

    def __init__(
        self, checkpoint: Checkpoint, samples: tuple[Sample, ...], embedding: torch.Tensor,
        device: str,
    ) -> None:  # fmt: skip
        """embedding: [V, D] float32. Raises CheckpointError for models without such layers."""
        self._device = device
        config = copy.deepcopy(checkpoint.hf_config.get_text_config())
        config._attn_implementation = "eager"  # the one that every family has in full
        config.vocab_size = len(embedding)
        shell, self._layer = _shell(config, checkpoint)
        shell.embed_tokens.weight = nn.Parameter(embedding, requires_grad=False)
        self._norm = shell.norm
        shell.norm = nn.Identity()
        kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
        shell.layers = nn.ModuleList(Recorder(kind) for kind in kinds)
        shell.to(device).eval()
        self._config = config
        self._lengths: list[list[int]] = []
        self._calls: list[list[dict[str, Any]]] = []
        self._hidden: list[torch.Tensor] = []
        with torch.inference_mode():
            for ids_BT, lengths in batches(samples):
                output = shell(input_ids=ids_BT.to(device), use_cache=False)
                self._hidden.append(output.last_hidden_state)
                self._lengths.append(lengths)
                self._calls.append([recorder.call for recorder in shell.layers])

    def __len__(self) -> int:
        return int(self._config.num_hidden_layers)

    @staticmethod
    def prefix(layer: int) -> str:
        """What the names of a layer's parameters begin with."""
        return f"{ROOT}layers.{layer}."

    @torch.inference_mode()
    def observe(self, layer: int, weights: Weights, watch: Watch) -> None:
        """Run a layer and show the inputs of its projections; activations stay before it."""
        with self._loaded(layer, weights) as module:
            for number in range(len(self._hidden)):
                with _watching(module, self._real(number), self.prefix(layer), watch):
                    self._run(module, layer, number)

    @torch.inference_mode()
    def disturbance(self, layer: int, weights: Weights, changed: Weights) -> float:
        """Squared change of a layer's output with other weights, relative to its size.

        Measured on the first batch.
        """
        outputs = []
        for state in (weights, changed):
            with self._loaded(layer, state) as module:
                outputs.append(self._run(module, layer, 0)[self._real(0)].double())
        wrong, size = (outputs[1] - outputs[0]).square().sum(), outputs[0].square().sum()
        return float(wrong / size) if size else 0.0

    @torch.inference_mode()
    def advance(self, layer: int, weights: Weights) -> None:
        """Run a layer with these weights and go on behind it."""
        with self._loaded(layer, weights) as module:
            for number in range(len(self._hidden)):
                self._hidden[number] = self._run(module, layer, number)

    @torch.inference_mode()
    def observe_head(self, norm: torch.Tensor, watch: Watch) -> None:
        """Show the inputs of the head, behind the final norm with this weight."""
        self._norm.weight = nn.Parameter(norm, requires_grad=False)
        self._norm.to(self._device)
        for number, hidden_BTD in enumerate(self._hidden):
            watch("lm_head", self._norm(hidden_BTD)[self._real(number)])

    @contextmanager
    def _loaded(self, layer: int, weights: Weights) -> Iterator[nn.Module]:
        with torch.device("meta"):
            module: nn.Module = self._layer(self._config, layer)
        start = len(self.prefix(layer))
        state = {name[start:]: value.to(self._device) for name, value in weights.items()}
        module.load_state_dict(state, assign=True)
        yield module.eval()

    def _run(self, module: nn.Module, layer: int, number: int) -> torch.Tensor:
        out = module(self._hidden[number], **self._calls[number][layer])
        hidden_BTD: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return hidden_BTD

    def _real(self, number: int) -> torch.Tensor:
        """Mask [B, T] of what is not padding."""
        lengths_B = torch.tensor(self._lengths[number], device=self._device)
        width = self._hidden[number].shape[1]
        return torch.arange(width, device=self._device) < lengths_B[:, None]


def _shell(config: Any, checkpoint: Checkpoint) -> tuple[Any, type[nn.Module]]:
    """The model without its vocabulary and layers, and the class of its layers."""
    single = copy.deepcopy(config)
    single.num_hidden_layers, single.vocab_size, single.pad_token_id = 1, 1, None
    if getattr(single, "layer_types", None):
        single.layer_types = single.layer_types[:1]
    try:
        with quiet():
            shell: Any = AutoModel.from_config(single, dtype=torch.float32)
        layer = type(shell.layers[0])
        shell.rotary_emb = type(shell.rotary_emb)(config)
    except (ValueError, AttributeError, TypeError) as cause:
        raise CheckpointError(
            f"{checkpoint.name}: {checkpoint.architecture} cannot be calibrated: {cause}"
        ) from None
    shell.config = config
    return shell, layer


@contextmanager
def _watching(
    module: nn.Module, real_BT: torch.Tensor, prefix: str, watch: Watch
) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _, inputs: watch(prefix + name, inputs[0][real_BT])

    handles = [
        part.register_forward_pre_hook(hook(name))
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
