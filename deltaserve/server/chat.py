"""The assistant's turns in OpenAI's shape: text, and calls of tools."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from typing import Any

from deltaserve.engine.types import FinishReason
from deltaserve.server.generate import Piece
from deltaserve.server.logprobs import answer_ids, of_chat, of_prompt
from deltaserve.server.protocol import ChatRequest
from deltaserve.server.tokenizers import ModelTokenizer
from deltaserve.server.tools.events import Argued, Called, Event, Said, ToolParser, join

CALL_ID_LENGTH = 9
"""Letters and digits; Mistral's templates take no other length."""
ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


class Turn:
    """One choice while it is written. num_calls: those that were begun."""

    def __init__(self, parser: ToolParser | None, *, several: bool) -> None:
        self.num_calls = 0
        self._parser = parser
        self._several = several

    def take(self, piece: Piece) -> list[Event]:
        if self._parser is None:
            return [Said(piece.text)] if piece.text else []
        found = self._parser.push(piece.text)
        if piece.finish_reason is not None:
            found += self._parser.finish()
        return [event for event in join(found) if self._wanted(event)]

    def reason(self, piece: Piece) -> str | None:
        called = self.num_calls and piece.finish_reason is FinishReason.STOP
        return "tool_calls" if called else piece.finish_reason

    def _wanted(self, event: Event) -> bool:
        if isinstance(event, Called):
            self.num_calls += 1
        return isinstance(event, Said) or self._several or self.num_calls == 1


class ChatShape:
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(
        self,
        body: ChatRequest,
        prompt: list[int],
        tokenizer: ModelTokenizer,
        make_parser: Callable[[], ToolParser] | None,
    ) -> None:
        self._body = body
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._make_parser = make_parser
        self._turns: dict[int, Turn] = {}

    def whole(self, piece: Piece) -> dict[str, Any]:
        turn = self._turn(piece)
        events = turn.take(piece)
        said = "".join(event.text for event in events if isinstance(event, Said))
        message: dict[str, Any] = {"role": "assistant", "content": said, "refusal": None}
        if turn.num_calls:
            message |= {"content": said or None, "tool_calls": _calls(events)}
        return {
            "index": piece.index,
            "message": message,
            "logprobs": None,
            "finish_reason": turn.reason(piece),
            **self._tokens(piece),
        }

    def around(self, pieces: list[Piece]) -> dict[str, Any]:
        said: dict[str, Any] = {}
        if self._body.return_token_ids:
            said["prompt_token_ids"] = self._prompt
        if self._body.prompt_logprobs is not None:
            found = pieces[0].prompt_logprobs or ()
            said["prompt_logprobs"] = of_prompt(found, self._body.prompt_logprobs, self._tokenizer)
        return said

    def parts(self, piece: Piece, first: bool) -> Iterator[dict[str, Any]]:
        """The role comes before the text, the reason after it, each in a chunk of its own."""
        turn = self._turn(piece)
        if first:
            yield _part(piece.index, {"role": "assistant", "content": ""})
        begun = turn.num_calls
        deltas = list(_deltas(turn.take(piece), begun))
        if piece.tokens and not deltas:
            deltas = [{"content": ""}]
        for number, delta in enumerate(deltas):
            tokens = {} if number else self._tokens(piece)
            yield _part(piece.index, delta) | tokens
        if piece.finish_reason is not None:
            yield _part(piece.index, {}, turn.reason(piece))

    def _turn(self, piece: Piece) -> Turn:
        if piece.index not in self._turns:
            parser = self._make_parser() if self._make_parser else None
            self._turns[piece.index] = Turn(parser, several=self._body.several_calls)
        return self._turns[piece.index]

    def _tokens(self, piece: Piece) -> dict[str, Any]:
        """What a choice says of its tokens."""
        said: dict[str, Any] = {}
        if self._body.num_logprobs is not None:
            said["logprobs"] = of_chat(piece.tokens, self._body.num_logprobs, self._tokenizer)
        if self._body.return_token_ids:
            said["token_ids"] = answer_ids(piece.tokens)
        return said


def _calls(events: list[Event]) -> list[dict[str, Any]]:
    """All calls of an answer."""
    calls: list[dict[str, Any]] = []
    for event in events:
        if isinstance(event, Called):
            calls.append(_new_call(event.name))
        elif isinstance(event, Argued):
            calls[-1]["function"]["arguments"] += event.text
    return calls


def _deltas(events: list[Event], num_calls: int) -> Iterator[dict[str, Any]]:
    """``num_calls``: begun before these events."""
    for event in events:
        match event:
            case Said(text):
                yield {"content": text}
            case Called(name):
                yield {"tool_calls": [{"index": num_calls, **_new_call(name)}]}
                num_calls += 1
            case Argued(text):
                more = {"index": num_calls - 1, "function": {"arguments": text}}
                yield {"tool_calls": [more]}


def _new_call(name: str) -> dict[str, Any]:
    call_id = "".join(secrets.choice(ALPHABET) for _ in range(CALL_ID_LENGTH))
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}


def _part(index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
