"""A fine-tune's own files lie over the base's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_tokenizer import byte_level_tokenizer

from deltaserve.engine.types import ModelInfo
from deltaserve.errors import CheckpointError
from deltaserve.server.messages import ChatPrompt
from deltaserve.server.tokenizers import ModelTokenizer, Tokenizers

CHAT = ChatPrompt.model_validate({"messages": [{"role": "user", "content": "x"}]})


def load(base: Path, own: Path) -> ModelTokenizer:
    models = [ModelInfo("base", str(base), None, None), ModelInfo("own", str(own), "base", "d")]
    return Tokenizers(models).of(models[1])


@pytest.fixture
def dirs(tmp_path: Path) -> tuple[Path, Path]:
    base, own = tmp_path / "base", tmp_path / "own"
    own.mkdir()
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "base"
    tokenizer.save_pretrained(base)
    (base / "config.json").write_text('{"model_type": "llama", "eos_token_id": 7}')
    return base, own


def said(tokenizer: ModelTokenizer) -> str:
    return tokenizer.decode(tokenizer.encode_chat(CHAT))


def test_nothing_of_its_own(dirs):
    own = load(*dirs)
    assert said(own) == "base"
    assert own.eos_ids == {1, 7}  # the tokenizer's, and config.json's for want of better


def test_its_own_template(dirs):
    (dirs[1] / "chat_template.jinja").write_text("own")
    assert said(load(*dirs)) == "own"


def test_a_template_in_the_older_place_wins_over_the_bases_file(dirs):
    config = json.loads((dirs[0] / "tokenizer_config.json").read_text())
    (dirs[1] / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "older"}))
    assert (dirs[0] / "chat_template.jinja").is_file()
    assert said(load(*dirs)) == "older"


def test_its_own_end(dirs):
    (dirs[0] / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert load(*dirs).eos_ids == {1, 5, 6}
    (dirs[1] / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert load(*dirs).eos_ids == {1, 9}
    (dirs[1] / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    assert 2 in load(*dirs).eos_ids


def test_saved_truncation_does_not_cut_prompts(dirs):
    backend = byte_level_tokenizer().backend_tokenizer
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(dirs[1] / "tokenizer.json"))
    assert len(load(*dirs).encode("x" * 20)) == 20


def test_no_tokenizer(dirs, tmp_path):
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        load(tmp_path / "own", dirs[1])


def test_a_damaged_file(dirs):
    (dirs[1] / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load(*dirs)
    (dirs[1] / "generation_config.json").write_text("{}")
    (dirs[1] / "tokenizer.json").write_text('{"version"')
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        load(*dirs)
