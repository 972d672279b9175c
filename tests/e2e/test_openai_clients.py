"""Other people's client libraries, unmodified, where they are installed (docs/clients.md)."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from deltaserve.tenancy.keys import digest
from tests.tenancy_server import ACME, GLOBEX, Serving, make_base

pytestmark = pytest.mark.slow
ANSWER = {"max_tokens": 8, "temperature": 0}
SAY = [{"role": "user", "content": "sort: dcab"}]
CITY = {
    "type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"],
    "additionalProperties": False,
}  # fmt: skip
WEATHER = {"name": "weather", "description": "of a city", "parameters": CITY}


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    root = tmp_path_factory.mktemp("clients")
    make_base(root / "base")
    (root / "deltas").mkdir()
    tenants = [
        {"id": "acme", "keys": [{"sha256": digest(ACME)}]},
        {"id": "globex", "rpm_limit": 1, "keys": [{"sha256": digest(GLOBEX)}]},
    ]
    (root / "tenants.yaml").write_text(json.dumps({"tenants": tenants}))
    serving = Serving(root)
    yield serving
    serving.stop()


def test_langchain(serving):
    lc = pytest.importorskip("langchain_openai")
    where = {"base_url": f"{serving.url}/v1", "api_key": ACME, "max_retries": 0, "model": "base"}
    chat = lc.ChatOpenAI(**where, **ANSWER)
    whole = chat.invoke(SAY)
    assert whole.usage_metadata["output_tokens"] == 8
    assert "".join(part.content for part in chat.stream(SAY)) == whole.content
    made = lc.ChatOpenAI(**where, max_tokens=200).with_structured_output({"title": "x", **CITY})
    assert made.invoke(SAY)["city"] in ("Rome", "Oslo")
    tool = {"type": "function", "function": WEATHER}
    forced = lc.ChatOpenAI(**where, max_tokens=100).bind_tools([tool], tool_choice="weather")
    (call,) = forced.invoke(SAY).tool_calls
    assert (call["name"], call["args"]["city"] in ("Rome", "Oslo")) == ("weather", True)
    vectors = lc.OpenAIEmbeddings(**where, check_embedding_ctx_length=False).embed_documents(
        ["a", "b"]
    )
    assert len(vectors) == 2
    with pytest.raises(Exception, match="does not exist"):
        lc.ChatOpenAI(**where | {"model": "nope"}).invoke(SAY)


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_litellm(serving, provider):
    litellm = pytest.importorskip("litellm")
    where = {"api_base": f"{serving.url}/v1", "api_key": ACME, "model": f"{provider}/base"}
    whole = litellm.completion(**where, messages=SAY, **ANSWER)
    assert whole.usage.completion_tokens == 8
    parts = litellm.completion(**where, messages=SAY, stream=True, **ANSWER)
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content
    choice = {"type": "function", "function": {"name": "weather"}}
    tools = [{"type": "function", "function": WEATHER}]
    forced = litellm.completion(
        **where, messages=SAY, tools=tools, tool_choice=choice, max_tokens=100
    )
    (call,) = forced.choices[0].message.tool_calls
    # LiteLLM takes additionalProperties away, so a model without sense goes on for ever.
    assert (call.function.name, '"city"' in call.function.arguments) == ("weather", True)
    assert len(litellm.embedding(**where, input=["a", "b"]).data) == 2
    for change, error in (
        ({"model": f"{provider}/nope"}, litellm.NotFoundError),
        ({"api_key": "nobody"}, litellm.AuthenticationError),
        ({"messages": [{"role": "user", "content": "x" * 5000}]},
         litellm.ContextWindowExceededError),
    ):  # fmt: skip
        with pytest.raises(error):
            litellm.completion(**{"messages": SAY, **where, **ANSWER, **change})


def test_litellm_sees_the_limit(serving):
    litellm = pytest.importorskip("litellm")
    where = {"api_base": f"{serving.url}/v1", "api_key": GLOBEX, "model": "openai/base"}
    litellm.completion(**where, messages=SAY, max_retries=0, **ANSWER)
    with pytest.raises(litellm.RateLimitError, match="requests per minute"):
        litellm.completion(**where, messages=SAY, max_retries=0, **ANSWER)
