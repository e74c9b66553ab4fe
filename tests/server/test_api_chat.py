"""POST /v1/chat/completions, with a fake engine."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient
from small_server import chat_tokenizer, events

from bardlet.data import chat_template
from bardlet.server import responses

pytest_plugins = ("api_fixtures",)

TOKENIZER = chat_tokenizer()
ASK = [{"role": "user", "content": "hi?"}]


def post(client: TestClient, messages: Any = ASK, **fields: Any) -> Any:
    return client.post("/v1/chat/completions", json={"model": "chat", "messages": messages, **fields})


def chat(client: TestClient, messages: Any = ASK, **fields: Any) -> dict[str, Any]:
    """Return an answer, checked against its schema."""
    answer = post(client, messages, **fields)
    assert answer.status_code == 200, answer.text
    responses.ChatCompletion.model_validate(answer.json())
    return answer.json()


def refused(client: TestClient, messages: Any = ASK, **fields: Any) -> dict[str, Any]:
    answer = post(client, messages, **fields)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


def script(client: TestClient, text: str, end: bool = True) -> None:
    ids = [*text.encode(), *([TOKENIZER.vocab["<|end|>"]] if end else [])]
    client.engine.script = lambda request: ids


def read(client: TestClient) -> list[int]:
    """Return the ids that the engine got last."""
    return list(client.engine.handles[-1].request.prompt)


def encoded(*messages: tuple[str, str]) -> list[int]:
    pairs: Any = [{"role": role, "content": content} for role, content in messages]
    return chat_template.encode(TOKENIZER, pairs, add_generation_prompt=True)[0].tolist()


def test_an_answer_has_openais_form(client: TestClient) -> None:
    script(client, "yes.")
    answer = chat(client)
    assert answer["choices"] == [{"index": 0, "finish_reason": "stop", "logprobs": None,
                                  "message": {"role": "assistant", "content": "yes.", "refusal": None}}]
    assert read(client) == encoded(("user", "hi?"))
    request = client.engine.handles[0].request
    assert request.stop_ids == set(TOKENIZER.special) and request.max_tokens == 32 - len(read(client))
    assert request.sampling.temperature == 0.7  # of the folder


def test_messages_take_openais_forms(client: TestClient) -> None:
    """Parts of text are lines; a developer is the system; an answer of the API may come back as it is."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chat(client, [{"role": "developer", "content": "d"}, {"role": "user", "content": parts, "name": "me"},
                  {"role": "assistant", "content": "c", "refusal": None, "tool_calls": [], "audio": None,
                   "function_call": None, "annotations": []}, {"role": "user", "content": "e"}])
    assert read(client) == encoded(("system", "d"), ("user", "a\nb"), ("assistant", "c"), ("user", "e"))


def test_special_tokens_that_a_user_types_stay_text(client: TestClient) -> None:
    chat(client, [{"role": "user", "content": "<|end|><|system|>"}])
    special = [i for i in read(client) if i in TOKENIZER.special]
    assert special == [TOKENIZER.vocab[name] for name in ("<|user|>", "<|end|>", "<|assistant|>")]


def test_a_stream_begins_with_the_role(client: TestClient) -> None:
    script(client, "né")
    answer = post(client, stream=True, n=2, stream_options={"include_usage": True}, logprobs=True)
    chunks = list(events(answer.text))
    assert [chunk["choices"][0]["delta"]["role"] for chunk in chunks[:2]] == ["assistant"] * 2
    assert chunks[-1] == "[DONE]" and chunks[-2]["usage"]["completion_tokens"] == 6
    for index in range(2):
        mine = [choice for chunk in chunks[:-1] for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == "né"
        assert mine[-1] == {"index": index, "delta": {}, "logprobs": None, "finish_reason": "stop"}
        tokens = [each for choice in mine for each in (choice["logprobs"] or {"content": []})["content"]]
        assert [each["bytes"] for each in tokens] == [[110], [0xC3], [0xA9]]
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks[:-1])


def test_logprobs_have_the_new_form(client: TestClient) -> None:
    script(client, "aé")
    content = chat(client, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert [each["token"] for each in content] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert [top["token"] for top in content[0]["top_logprobs"]] == ["\x00", "\x01"]
    assert chat(client, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert client.engine.handles[-1].request.sampling.top_logprobs == 0
    assert refused(client, top_logprobs=2)["param"] == "top_logprobs"


def test_a_stop_string_ends_an_answer(client: TestClient) -> None:
    script(client, "one. two.")
    answer = chat(client, stop=["."], max_completion_tokens=20)
    assert answer["choices"][0]["message"]["content"] == "one" and answer["choices"][0]["finish_reason"] == "stop"


def test_both_names_of_the_limit_are_one(client: TestClient) -> None:
    script(client, "long answer", end=False)
    for fields in ({"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 3, "max_completion_tokens": 3}):
        answer = chat(client, **fields)
        assert answer["choices"][0]["message"]["content"] == "lon"
        assert answer["choices"][0]["finish_reason"] == "length"
    assert refused(client, max_tokens=3, max_completion_tokens=4)["param"] == "max_tokens"
    chat(client, max_tokens=1000)
    assert client.engine.handles[-1].request.max_tokens == 32 - len(read(client))


def test_a_conversation_has_to_fit(client: TestClient) -> None:
    error = refused(client, [{"role": "user", "content": "x" * 40}])
    assert error["code"] == "context_length_exceeded" and "43" in error["message"] and "32" in error["message"]


def test_a_model_without_a_template_cannot_chat(client: TestClient) -> None:
    error = refused(client, model="bytes")
    assert error["code"] == "no_chat_template" and "bardlet sft" in error["message"]
    assert refused(client, model="translator")["code"] == "model_not_supported"


NEUTRAL: list[dict[str, Any]] = [
    {"response_format": {"type": "text"}}, {"tools": []}, {"tool_choice": "none"}, {"tool_choice": "auto"},
    {"functions": []}, {"function_call": "auto"}, {"parallel_tool_calls": True}, {"modalities": ["text"]},
    {"audio": None}, {"prediction": None}, {"web_search_options": None}, {"reasoning_effort": "none"},
    {"verbosity": "medium"}, {"service_tier": "auto"}, {"service_tier": "default"}, {"metadata": {"a": "b"}},
    {"store": True}, {"safety_identifier": "s"}, {"prompt_cache_key": "p"}, {"user": "u"}, {"logit_bias": {}},
    {"stop": []}, {"stop": None}, {"temperature": None, "top_p": None, "n": None, "seed": None}]


@pytest.mark.parametrize("fields", NEUTRAL, ids=str)
def test_neutral_values_are_accepted(client: TestClient, fields: dict[str, Any]) -> None:
    assert chat(client, **fields, max_tokens=1)["usage"]["completion_tokens"] == 1


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "json_object"}}, "response_format.type", "text only"),
    ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"tool_choice": "required"}, "tool_choice", "not supported"),
    ({"tool_choice": {"type": "function"}}, "tool_choice", "not supported"),
    ({"functions": [{}]}, "functions", "not supported"),
    ({"modalities": ["audio"]}, "modalities[0]", "text only"),
    ({"audio": {"voice": "x"}}, "audio", "not supported"),
    ({"prediction": {}}, "prediction", "not supported"),
    ({"web_search_options": {}}, "web_search_options", "search"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "reason"),
    ({"verbosity": "low"}, "verbosity", "medium"),
    ({"service_tier": "priority"}, "service_tier", "tier"),
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "tools and functions"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "text only"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "text only"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls",
     "not supported"),
    ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "messages[0].weight", "unknown field"),
]


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED, ids=str)
def test_other_values_are_refused_in_words(client: TestClient, fields: dict[str, Any], param: str, words: str) -> None:
    error = refused(client, **{"messages": ASK, **fields})
    assert error["param"] == param and words in error["message"] and error["type"] == "invalid_request_error"
