"""A small real tokenizer, as byte-level BPE as those of Llama 3 and Qwen."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "the quick brown fox jumps over the lazy dog",
    "Hello world, hello there. How are you today?",
    "naïve café — déjà vu, 你好世界 😀 🇨🇭",
]
TEMPLATE = (
    "{% if mood is defined %}[{{ mood }}]{% endif %}{% for m in messages %}"
    "{% if m.role == 'alien' %}{{ raise_exception('no aliens') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}{% endfor %}"
    "{{ '\\n' }}{% endfor %}{% if tools %}tools: {{ tools | tojson }}{{ '\\n' }}{% endif %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def byte_level_tokenizer(added: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=alphabet, special_tokens=["<s>", "</s>", "<end>"]
    )
    backend.train_from_iterator(LINES, trainer)
    backend.add_tokens([AddedToken(word) for word in added])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
