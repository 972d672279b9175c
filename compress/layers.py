"""A Hugging Face decoder one layer at a time: activations travel, weights come and go.

B sequences of T tokens, D the hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from deltaserve.artifact.checkpoint import Checkpoint
from deltaserve.compress.activations import Activations
from deltaserve.compress.models import quiet
from deltaserve.compress.text import Sample, batches
from deltaserve.compress.weights import Table
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
# Parameter name, inputs [tokens, K] without padding.
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
    """Activations of some texts between the decoder layers of one model.

    The model class itself makes embeddings, masks and rotary angles, with recorders in
    place of its layers: whatever it hands to a layer is handed to ours. Layers are visited
    in order; a walk over a folder of an earlier one goes on where that stopped.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        texts: Sequence[Sequence[Sample]],
        embedding: Table,
        folder: Path,
        device: str,
    ) -> None:
        """texts: batches never mix them. embedding: [V, D]. folder: for activations.

        Raises CheckpointError for models without such layers.
        """
        self.device = device
        config = copy.deepcopy(checkpoint.hf_config.get_text_config())
        # Only "eager" caps attention scores, but it holds all of them in memory.
        capped = getattr(config, "attn_logit_softcapping", None)
        config._attn_implementation = "eager" if capped else "sdpa"
        # (text, ids [B, T], lengths) of each batch.
        self.batches = [
            (number, ids_BT, lengths)
            for number, samples in enumerate(texts)
            for ids_BT, lengths in batches(samples)
        ]
        # Only the rows that occur: a vocabulary can be larger than many layers.
        self._ids = torch.cat([ids_BT.flatten() for _, ids_BT, _ in self.batches]).unique()
        config.vocab_size = len(self._ids)
        shell, self._layer = _shell(config, checkpoint)
        shell.embed_tokens.weight = nn.Parameter(embedding.rows(self._ids), requires_grad=False)
        self._norm, self._config = shell.norm, config
        shell.norm = nn.Identity()
        kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
        shell.layers = nn.ModuleList(Recorder(kind) for kind in kinds)
        shell.to(device).eval()
        shapes = [tuple(ids_BT.shape) for _, ids_BT, _ in self.batches]
        self.hidden = Activations(folder, shapes, config.hidden_size)  # type: ignore[arg-type]
        self._calls: list[list[dict[str, Any]]] = []
        first = self._begin(shell)
        if self.ahead(-1):
            for _ in first:  # the calls are needed all the same
                pass
        else:
            self.hidden.write(0, first)

    def __len__(self) -> int:
        return int(self._config.num_hidden_layers)

    @staticmethod
    def prefix(layer: int) -> str:
        """What the names of a layer's parameters begin with."""
        return f"{ROOT}layers.{layer}."

    def ahead(self, layer: int) -> bool:
        """Whether an earlier walk over this folder got past the layer."""
        return any(self.hidden.has(later) for later in range(layer + 1, len(self) + 1))

    def of_text(self, text: int) -> list[int]:
        """The batches of a text."""
        return [n for n, (number, _, _) in enumerate(self.batches) if number == text]

    def groups(self, layer: int, weights: Weights) -> list[list[str]]:
        """Projections of a layer in the order of their use, those with one input together."""
        found: list[tuple[torch.Tensor, list[str]]] = []

        def see(name: str, x: torch.Tensor) -> None:
            if found and found[-1][0] is x:
                found[-1][1].append(name)
            else:
                found.append((x, [name]))

        with (
            torch.inference_mode(),
            self.loaded(layer, weights) as module,
            _watching(module, self.prefix(layer), see),
        ):
            self.run(module, layer, 0, self.hidden.read(layer, 0))
        return [names for _, names in found]

    @torch.inference_mode()
    def observe(self, layer: int, weights: Weights, watch: Watch, text: int = 0) -> None:
        """Run a layer over a text and show the inputs of its projections."""
        with self.loaded(layer, weights) as module:
            for number in self.of_text(text):
                shown = partial(_show_real, watch, self.real(number))
                with _watching(module, self.prefix(layer), shown):
                    self.run(module, layer, number, self.hidden.read(layer, number))

    @torch.inference_mode()
    def advance(self, layer: int, weights: Weights) -> None:
        """Run a layer with these weights over everything and write what goes into the next."""
        with self.loaded(layer, weights) as module:
            self.hidden.write(
                layer + 1,
                (
                    self.run(module, layer, number, self.hidden.read(layer, number))
                    for number in range(len(self.batches))
                ),
            )

    def final(self, number: int, norm: torch.Tensor) -> torch.Tensor:
        """[tokens, D] of a batch behind the last layer and the final norm, without padding."""
        hidden_BTD = self.hidden.read(len(self), number).to(self.device)
        return self.normed(hidden_BTD, norm)[self.real(number)]

    def normed(self, hidden: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """The final norm, with this weight."""
        self._norm.weight = nn.Parameter(norm.to(self.device), requires_grad=False)
        out: torch.Tensor = self._norm(hidden)
        return out

    @contextmanager
    def loaded(self, layer: int, weights: Weights) -> Iterator[nn.Module]:
        """A layer with these weights."""
        with torch.device("meta"):
            module: nn.Module = self._layer(self._config, layer)
        start = len(self.prefix(layer))
        state = {name[start:]: value.to(self.device) for name, value in weights.items()}
        module.load_state_dict(state, assign=True)
        yield module.eval().requires_grad_(False)

    def run(
        self, module: nn.Module, layer: int, number: int, hidden_BTD: torch.Tensor
    ) -> torch.Tensor:
        """What a layer makes of the activations of a batch."""
        out = module(hidden_BTD.to(self.device), **self._calls[number][layer])
        hidden: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return hidden

    def real(self, number: int) -> torch.Tensor:
        """Mask [B, T] of what is not padding."""
        _, ids_BT, lengths = self.batches[number]
        lengths_B = torch.tensor(lengths, device=self.device)
        return torch.arange(ids_BT.shape[1], device=self.device) < lengths_B[:, None]

    def _begin(self, shell: Any) -> Iterator[torch.Tensor]:
        """Embeddings of every batch, and how its layers are called."""
        for _, ids_BT, _ in self.batches:
            with torch.inference_mode():
                places_BT = torch.searchsorted(self._ids, ids_BT)
                output = shell(input_ids=places_BT.to(self.device), use_cache=False)
            self._calls.append([_plain(recorder.call) for recorder in shell.layers])
            yield output.last_hidden_state


def _plain(call: dict[str, Any]) -> dict[str, Any]:
    """Tensors that autograd may save: those made in inference mode may not be."""

    def copied(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.clone()
        return tuple(map(copied, value)) if isinstance(value, tuple) else value

    return {key: copied(value) for key, value in call.items()}


def _shell(config: Any, checkpoint: Checkpoint) -> tuple[Any, type[nn.Module]]:
    """The model without its vocabulary and layers, and the class of its layers."""
    single = copy.deepcopy(config)
    single.num_hidden_layers, single.vocab_size, single.pad_token_id = 1, 1, None
    if getattr(single, "layer_types", None):
        single.layer_types = single.layer_types[:1]
    if checkpoint.architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{checkpoint.name}: {checkpoint.architecture} cannot be run layer by layer "
            f"(can: {', '.join(ARCHITECTURES)}); compress it with --plain"
        )
    try:
        with quiet():
            shell: Any = AutoModel.from_config(single, dtype=torch.float32)
        layer = type(shell.layers[0])
        shell.rotary_emb = type(shell.rotary_emb)(config)
    except (ValueError, AttributeError, TypeError) as cause:
        raise CheckpointError(
            f"{checkpoint.name}: {checkpoint.architecture} cannot be run layer by layer: {cause}"
        ) from None
    shell.config = config
    return shell, layer


def _show_real(watch: Watch, real_BT: torch.Tensor, name: str, x_BTK: torch.Tensor) -> None:
    """Without padding."""
    watch(name, x_BTK[real_BT])


@contextmanager
def _watching(module: nn.Module, prefix: str, watch: Watch) -> Iterator[None]:
    """Show the inputs of every projection under the name of its weight."""

    def hook(weight: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _, inputs: watch(weight, inputs[0])

    with ExitStack() as hooks:
        for weight, part in projections(module, prefix):
            hooks.enter_context(part.register_forward_pre_hook(hook(weight)))
        yield


def projections(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers under the names of their weights; ``prefix``: of the module's parameters."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            yield f"{prefix}{name}.weight", part
