"""Fields of OpenAI's API and of vLLM's that are not supported, and the values with which they are
accepted all the same, because they have no effect and many clients always send them."""

from __future__ import annotations

from typing import Any

GENERATION: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),  # there are no functions to call
    "functions": ([],),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "mm_processor_kwargs": (),
    "parallel_tool_calls": (True, False),  # there are no tools
    "prediction": (),
    "prompt_cache_retention": (),
    "reasoning_effort": ("none",),
    "request_id": (),
    "return_tokens_as_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),  # there are no tools
    "tools": ([],),
    "top_logprobs": (0,),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
INSTEAD = {
    "best_of": "ask for n answers and choose by their logprobs",
    "bad_words": "use logit_bias with the ids of the tokens",
    "chat_template": "it is the model's own; chat_template_kwargs are its parameters",
    "function_call": "use tool_choice",
    "functions": "use tools",
    "request_id": "the header x-request-id of the answer names the request",
    "suffix": "the models continue text, they do not fill gaps; leave it out",
}
MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "reasoning": (),
    "reasoning_content": (),
    "refusal": (),
}
STRUCTURED_OUTPUTS: dict[str, tuple[Any, ...]] = {
    "disable_additional_properties": (False,),
    "disable_any_whitespace": (False,),
    "disable_fallback": (True, False),  # there is nothing to fall back to
    "structural_tag": (),
    "whitespace_pattern": (),
}
STREAM_OPTIONS: dict[str, tuple[Any, ...]] = {"include_obfuscation": (False,)}
