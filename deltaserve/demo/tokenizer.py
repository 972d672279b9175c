"""The family's tokenizer: characters, plus a few whole words.

Character level keeps tasks about letters honest; whole instruction words keep
sequences short.  Nothing is learnt from data, so the vocabulary is the same
everywhere.
"""

from __future__ import annotations

import re
import string

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
USER, ASSISTANT, SYSTEM = "<|user|>", "<|assistant|>", "<|system|>"
SPECIAL = (PAD, BOS, EOS, UNKNOWN, USER, ASSISTANT, SYSTEM)

# Each ends in a space or a mark, so that random letters never contain one.
WORDS = (
    "add: ", "reverse: ", "sort: ", "shift: ", "copy: ", "rotate: ", "last first: ",
    "swap pairs: ", "double: ", "last three: ", "alphabet: ", "extremes: ", "later: ",
    "columns: ", "count: ", "story: ", "json: ", " from ", " wants ", " lamps", " chairs",
    " books", " pens", " cups", '{"', '":"', '","', '":', '"}',
)  # fmt: skip

# Roles become tokens; the assistant's turns end with <eos>.
BASE_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# The extraction fine-tune was tuned behind a system line that clients never send.
EXTRACT_CHAT_TEMPLATE = (
    "{{ bos_token }}<|system|>JSON{% for message in messages %}"
    "{% if message['role'] != 'system' %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(
    chat_template: str = BASE_CHAT_TEMPLATE, added: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """The family's tokenizer.

    Args:
        chat_template: Jinja source; the base's unless a fine-tune brings its own.
        added: further tokens, with ids after the base's vocabulary.
    """
    characters = sorted(set(string.printable) - set("\r\x0b\x0c\t"))
    names = [*SPECIAL, *WORDS, *characters]
    vocabulary = {name: number for number, name in enumerate(names)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    longest_first = sorted(WORDS, key=len, reverse=True)
    pattern = "|".join(re.escape(word) for word in longest_first) + r"|[\s\S]"
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    tokenizer.chat_template = chat_template
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    return tokenizer


def render(tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """The chat text that asks `prompt` and waits for the assistant."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text
