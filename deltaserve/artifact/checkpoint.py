"""A Hugging Face checkpoint as a lazy mapping of parameter names to tensors."""

from __future__ import annotations

import json
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deltaserve.artifact.shards import ShardSet
from deltaserve.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What a hub download needs; never pickles, never other frameworks' weights.
DOWNLOAD = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja"]
# Old checkpoints store these, but models compute them from the configuration.
DERIVED = ("rotary_emb.inv_freq",)


class Checkpoint:
    """Single or sharded safetensors, memory-mapped; tensors are read when asked for.

    With tied embeddings ``lm_head.weight`` names the embedding when it is not stored.
    """

    def __init__(self, path: Path, name: str, config: dict[str, Any], shards: ShardSet) -> None:
        self.path = path
        self.name = name
        self.config = config
        self._shards = shards
        self._names = [n for n in shards.names() if not n.endswith(DERIVED)]

    @classmethod
    def open(cls, where: str | os.PathLike[str]) -> Checkpoint:
        """A local directory or a hub id. Raises CheckpointError naming what is wrong."""
        path, name = locate(where)
        config = read_json(path / "config.json", "it is not a Hugging Face model directory")
        if "quantization_config" in config:
            raise CheckpointError(
                f"{path} is quantised already; use the checkpoint in its original precision"
            )
        return cls(path, name, config, ShardSet(_weight_files(path), CheckpointError))

    def names(self) -> list[str]:
        """Stored parameters, sorted; the alias of a tied head is not among them."""
        return self._names

    def has(self, name: str) -> bool:
        return name in self._shards or self._resolve(name) in self._shards

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shards.shape(self._resolve(name))

    def dtype(self, name: str) -> torch.dtype:
        return self._shards.dtype(self._resolve(name))

    def tensor(self, name: str) -> torch.Tensor:
        """The parameter, backed by the mapped file: never write to it."""
        return self._shards.tensor(self._resolve(name))

    def file(self, name: str) -> Path:
        """The file that holds the parameter."""
        return self._shards.file(self._resolve(name))

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all stored parameters."""
        return sum(self._shards.size(name) for name in self._names)

    @cached_property
    def hf_config(self) -> PretrainedConfig:
        """The configuration as transformers understands it, defaults filled in."""
        from transformers import AutoConfig

        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(self.path, local_files_only=True)
        except (ValueError, KeyError, OSError, TypeError) as cause:
            reason = " ".join(str(cause).split())[:200]
            raise CheckpointError(f"{self.path}/config.json is not understood: {reason}") from None
        return config

    @cached_property
    def tied(self) -> bool:
        """The head shares the embedding: the configuration says so and no other head is stored."""
        if not getattr(self.hf_config.get_text_config(), "tie_word_embeddings", False):
            return False
        if HEAD not in self._shards:
            return True
        # transformers keeps a stored head that differs, whatever the configuration says.
        embedding = self.embedding
        return embedding is not None and torch.equal(self.tensor(HEAD), self.tensor(embedding))

    @cached_property
    def embedding(self) -> str | None:
        """Name of the input embedding, if the checkpoint has one of a known name."""
        return next((n for n in self._names if n.endswith(EMBEDDINGS)), None)

    @property
    def architecture(self) -> str:
        """The model class, for example ``LlamaForCausalLM``."""
        return str((self.config.get("architectures") or ["unknown"])[0])

    def _resolve(self, name: str) -> str:
        if name == HEAD and name not in self._shards and self.embedding is not None and self.tied:
            return self.embedding
        return name


def locate(where: str | os.PathLike[str]) -> tuple[Path, str]:
    """The local directory of a path or hub id, and the name to show for it."""
    path = Path(where).expanduser()
    if path.is_dir():
        return path, path.resolve().name
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the directory that holds the model")
    return _download(str(where)), str(where)


def _download(repo: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if repo.count("/") > 1 or repo.startswith((".", "/", "~")):
        raise CheckpointError(f"{repo} does not exist; give a model directory or a hub id")
    try:
        return Path(snapshot_download(repo, allow_patterns=DOWNLOAD))
    except (HFValidationError, HfHubHTTPError, OSError, ValueError) as cause:
        raise CheckpointError(
            f"{repo} is neither a local directory nor a model that the Hugging Face hub or its "
            f"cache could give ({type(cause).__name__}); check the name, or the connection"
        ) from None


def read_json(path: Path, consequence: str) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError when missing or malformed."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}: {consequence}") from None
    except (ValueError, OSError) as cause:
        raise CheckpointError(f"{path} cannot be read: {cause}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value


def _weight_files(path: Path) -> list[Path]:
    if (path / INDEX).is_file():
        return _indexed_files(path)
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if any(found for pattern in PICKLES for found in path.glob(pattern)):
        raise CheckpointError(
            f"{path} holds only pickle weights, which can run code when loaded; convert it once "
            "with transformers: model.save_pretrained(DIR, safe_serialization=True)"
        )
    raise CheckpointError(f"{path} has no {WEIGHTS} and no {INDEX}; copy or download it again")


def _indexed_files(path: Path) -> list[Path]:
    weight_map = read_json(path / INDEX, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX} has no weight_map; download it again")
    files = sorted({str(file) for file in weight_map.values()})
    for file in files:
        # An index from elsewhere must not make us read other files of this machine.
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path / INDEX} points outside its directory: {file!r}")
    return [path / file for file in files]
