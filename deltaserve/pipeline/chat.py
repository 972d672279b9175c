"""Chat templates: from messages to text, and where in it the assistant speaks.

A template that marks the assistant's words with ``{% generation %}`` is asked; any other is
rendered once more for each prefix that ends with an answer, and must then only have appended.
"""

from __future__ import annotations

import re
from typing import Any

from deltaserve.errors import PipelineError
from deltaserve.pipeline.elements import field_of
from deltaserve.pipeline.rows import Row, RowError
from deltaserve.pipeline.tokenizers import tokenizer_of

Span = tuple[int, int]
MARK = re.compile(r"\{%-?\s*generation\b")


class ChatTemplate:
    """Adds "text", and "spans": [(start, end)] of the characters that the assistant wrote."""

    def __init__(self, node: Any) -> None:
        self.name = node.name or node.op
        self.tokenizer: str = node.params["tokenizer"]
        self.messages: str = node.params["messages"]
        self.tools: str | None = node.params["tools"]
        if not getattr(tokenizer_of(self.tokenizer), "chat_template", None):
            raise PipelineError(
                f"{self.name}: the tokenizer of {self.tokenizer} has no chat template: add "
                "chat_template.jinja beside it, or tokenise a text field"
            )

    def __call__(self, rows: list[Row]) -> list[Row]:
        tokenizer = tokenizer_of(self.tokenizer)
        return [Row(row.key, self._render(row, tokenizer)) for row in rows]

    def _render(self, row: Row, tokenizer: Any) -> dict[str, Any]:
        messages = field_of(row, self.messages, self.name)
        options = {"tools": field_of(row, self.tools, self.name)} if self.tools else {}
        try:
            require_messages(messages)
            text, spans = render(tokenizer, messages, options)
        except PipelineError as cause:
            raise RowError(self.name, row.key, str(cause)) from None
        except Exception as cause:  # templates are programs and raise what they like
            what = f"the chat template refuses it: {cause}"
            raise RowError(self.name, row.key, what) from None
        return {**row.value, "text": text, "spans": spans}


def require_messages(messages: Any) -> None:
    """Raises PipelineError unless these are messages with roles."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise PipelineError("messages must be a list with one or more entries")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message:
            raise PipelineError(f"message {number} needs a role and a content")


def render(
    tokenizer: Any, messages: list[dict[str, Any]], options: dict[str, Any]
) -> tuple[str, list[Span]]:
    """The text of a conversation, and where in it the assistant speaks.

    Raises PipelineError if the template rewrites earlier turns, so that this cannot be told.
    """
    if MARK.search(tokenizer.chat_template):
        return _marked(tokenizer, messages, options)
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            spans.append(_span(tokenizer, messages, number, text, options))
    return text, spans


def _marked(
    tokenizer: Any, messages: list[dict[str, Any]], options: dict[str, Any]
) -> tuple[str, list[Span]]:
    """What ``{% generation %}`` blocks say."""
    from transformers.utils import chat_template_utils

    render: Any = chat_template_utils.render_jinja_template
    texts, spans = render(
        conversations=[messages],
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        **options,
        **tokenizer.special_tokens_map,
    )
    return texts[0], [(int(start), int(end)) for start, end in spans[0]]


def _span(
    tokenizer: Any, messages: list[dict[str, Any]], number: int, text: str, options: dict[str, Any]
) -> Span:
    def rendered(count: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=prompt, **options
        )

    before = rendered(number, True) if number else rendered_alone(tokenizer, messages[0], options)
    after = text if number + 1 == len(messages) else rendered(number + 1, False)
    if not after.startswith(before) or not text.startswith(after):
        raise PipelineError(
            "the chat template rewrites earlier turns when later ones follow, so it cannot be "
            "told what the assistant wrote: mark it in the template with {% generation %}"
        )
    return len(before), len(after)


def rendered_alone(tokenizer: Any, message: dict[str, Any], options: dict[str, Any]) -> str:
    """What stands before a conversation that the assistant opens: all up to its words."""
    whole = tokenizer.apply_chat_template([message], tokenize=False, **options)
    content = str(message.get("content") or "")
    return whole[: whole.find(content)] if content in whole else ""
