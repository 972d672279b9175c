"""Which format a model writes its calls in: as the operator says, or as its template shows."""

from __future__ import annotations

from typing import Literal

from deltaserve.server.tools.events import ToolParser
from deltaserve.server.tools.hermes import HermesParser
from deltaserve.server.tools.llama import TAG, LlamaParser
from deltaserve.server.tools.mistral import MistralParser

Format = Literal["hermes", "llama3_json", "mistral"]

PARSERS: dict[str, type[HermesParser] | type[LlamaParser] | type[MistralParser]] = {
    "hermes": HermesParser,
    "llama3_json": LlamaParser,
    "mistral": MistralParser,
}


def format_of(template: str | None) -> str | None:
    """By what only templates of that family contain; None for any other."""
    if template is None or "tools" not in template:
        return None
    if HermesParser.marker in template:
        return "hermes"
    if MistralParser.marker in template:
        return "mistral"
    llama = TAG in template or ("<|start_header_id|>" in template and '"parameters"' in template)
    return "llama3_json" if llama else None


def make_parser(name: str) -> ToolParser:
    return PARSERS[name]()
