"""POST /v1/completions, with a fake engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from small_server import BPE, BYTES, events

from bardlet.api.models import load
from bardlet.inference import generate
from bardlet.inference.sampling import row_seeds
from bardlet.server import responses

pytest_plugins = ("api_fixtures",)


def complete(client: TestClient, **fields: Any) -> dict[str, Any]:
    """Return a completion, checked against its schema."""
    answer = client.post("/v1/completions", json={"model": "bytes", **fields})
    assert answer.status_code == 200, answer.text
    responses.Completion.model_validate(answer.json())
    return answer.json()


def stream(client: TestClient, **fields: Any) -> list[Any]:
    """Return the events of a stream."""
    answer = client.post("/v1/completions", json={"model": "bytes", "stream": True, **fields})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    return list(events(answer.text))


def refused(client: TestClient, status: int, **fields: Any) -> dict[str, Any]:
    """Return the error of a request."""
    answer = client.post("/v1/completions", json={"model": "bytes", **fields})
    assert answer.status_code == status, answer.text
    responses.Error.model_validate(answer.json())
    return answer.json()["error"]


def script(client: TestClient, text: str | bytes, stop: bool = False) -> None:
    """Let the engine write a text, byte by byte."""
    ids = list(text.encode() if isinstance(text, str) else text) + [BYTES.eos_id] * stop
    client.engine.script = lambda request: ids


def test_a_completion_has_openais_form(client: TestClient) -> None:
    """And its defaults: 16 tokens, temperature and top_k of the model's folder."""
    answer = complete(client, prompt="ab")
    assert answer["choices"] == [{"index": 0, "text": "hi" * 8, "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 16, "total_tokens": 18,
                               "prompt_tokens_details": {"cached_tokens": 0}}
    [handle] = client.engine.handles
    sampling = handle.request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.8, 50, None)
    assert handle.request.prompt == [97, 98] and handle.request.stop_ids == {BYTES.eos_id}
    assert sampling.top_logprobs is None


def test_the_fields_of_a_request_reach_the_engine(client: TestClient) -> None:
    complete(client, prompt="a", temperature=1, top_k=-1, top_p=0.5, presence_penalty=-2, frequency_penalty=1.5,
             logit_bias={"104": -100}, max_tokens=3, seed=5, user="u", stream_options={"include_usage": True})
    request = client.engine.handles[0].request
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (1.0, None, 0.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-2, 1.5)
    assert sampling.logit_bias == {104: -100} and request.max_tokens == 3 and request.seed == row_seeds(5, 1)[0]


def test_choices_have_the_seeds_of_sample(client: TestClient) -> None:
    """Of `bardlet sample --num 3 --seed 7`, for each prompt."""
    answer = complete(client, prompt=["a", "b"], n=3, seed=7, max_tokens=1)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert [handle.request.seed for handle in client.engine.handles] == 2 * row_seeds(7, 3)
    assert [handle.request.prompt for handle in client.engine.handles] == [[97]] * 3 + [[98]] * 3
    assert answer["usage"]["prompt_tokens"] == 2
    complete(client, prompt=["a", "a"], max_tokens=1)
    assert len({handle.request.seed for handle in client.engine.handles[-2:]}) == 2


def test_texts_are_those_of_sample(client: TestClient, root: Path) -> None:
    """The ids of `bardlet sample`, with the seeds that the engine got, make the same texts."""
    model = load(root / "bytes")
    known: dict[int, list[int]] = {}

    def written(request: Any) -> list[int]:
        if request.seed not in known:
            options = {"temperature": request.sampling.temperature, "top_k": request.sampling.top_k}
            known[request.seed] = generate.generate(
                model.module, [list(request.prompt)], request.max_tokens, seed=[request.seed],
                stop_ids=tuple(request.stop_ids), **options)[0] + [BYTES.eos_id]
        return known[request.seed]

    client.engine.script = written
    for n, prompt in ((1, "ab"), (3, "é")):
        known.clear()
        texts, _ = model.complete([prompt] * n, 40, seed=11)
        answer = complete(client, prompt=prompt, n=n, seed=11, max_tokens=40)
        assert [choice["text"] for choice in answer["choices"]] == texts


@pytest.mark.parametrize(("prompt", "ids"), [
    ("", [BYTES.eos_id]), (None, [BYTES.eos_id]), ([1, 2], [1, 2]), ([[1, 2]], [1, 2]), (["a"], [97])])
def test_prompts_come_in_four_forms(client: TestClient, prompt: Any, ids: list[int]) -> None:
    complete(client, prompt=prompt, max_tokens=1)
    assert client.engine.handles[0].request.prompt == ids


def test_an_unseen_character_is_named(client: TestClient) -> None:
    error = refused(client, 400, model="letters", prompt="abc#")
    assert '"#"' in error["message"] and error["param"] == "prompt"


def test_ids_outside_the_vocabulary_are_refused(client: TestClient) -> None:
    assert refused(client, 400, prompt=[[1], [270]])["param"] == "prompt"
    assert "269" in refused(client, 400, logit_bias={"270": 1})["message"]
    complete(client, prompt=[269], max_tokens=1)


def test_ids_that_pad_the_vocabulary_have_no_text(client: TestClient) -> None:
    client.engine.script = lambda request: [104, 265, 105]
    answer = complete(client, max_tokens=3, logprobs=0)
    assert answer["choices"][0]["text"] == "hi"
    assert answer["choices"][0]["logprobs"]["tokens"] == ["h", "token_id:265", "i"]


def test_a_stop_string_ends_the_text(client: TestClient) -> None:
    """Also across tokens; nothing of it or after it is sent."""
    script(client, "one two\n\nthree")
    answer = complete(client, stop=["\n\n", "zzz"], max_tokens=50)
    assert answer["choices"][0]["text"] == "one two" and answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 9
    chunks = stream(client, stop="\n\n", max_tokens=50)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == "one two"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"


def test_a_document_ends_with_the_separator(client: TestClient) -> None:
    script(client, "end", stop=True)
    answer = complete(client, max_tokens=50)
    assert answer["choices"][0]["text"] == "end" and answer["choices"][0]["finish_reason"] == "stop"


def test_characters_are_never_cut(client: TestClient) -> None:
    """The prompt may end inside one, and the last one may be incomplete."""
    script(client, "é€")
    chunks = stream(client, max_tokens=4)
    texts = [chunk["choices"][0]["text"] for chunk in chunks[:-1]]
    assert "".join(texts) == "é\ufffd"
    script(client, b"\xa9!")
    assert complete(client, prompt=[0xC3], max_tokens=2)["choices"][0]["text"] == "é!"


def test_a_stream_has_openais_form(client: TestClient) -> None:
    script(client, "a\u2028b\x00\x85")
    chunks = stream(client, max_tokens=8, n=2, stream_options={"include_usage": True, "include_obfuscation": False})
    assert chunks[-1] == "[DONE]"
    usage = chunks[-2]
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 16
    assert all(chunk["usage"] is None for chunk in chunks[:-2])
    assert len({chunk["id"] for chunk in chunks[:-1]}) == 1
    for index in range(2):
        mine = [choice for chunk in chunks[:-2] for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(choice["text"] for choice in mine) == "a\u2028b\x00\x85"
        assert [choice["finish_reason"] for choice in mine][-1] == "length"
    assert "usage" not in stream(client, max_tokens=1)[0]


def test_logprobs_have_the_old_form(client: TestClient) -> None:
    script(client, "aé")
    answer = complete(client, max_tokens=3, logprobs=1)
    table = answer["choices"][0]["logprobs"]
    assert table["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9"] and table["text_offset"] == [0, 1, 1]
    assert table["token_logprobs"][0] == pytest.approx(-0.597)
    assert set(table["top_logprobs"][0]) == {"a", "\x00"}
    assert complete(client, max_tokens=3, logprobs=0)["choices"][0]["logprobs"]["top_logprobs"] is None
    client.engine.infinite = True
    assert complete(client, max_tokens=1, logprobs=0)["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


def test_streamed_logprobs_are_those_of_the_whole(client: TestClient) -> None:
    """Also of a text that is held back, and cut."""
    script(client, "ab--é-+cd")
    fields: dict[str, Any] = {"max_tokens": 30, "logprobs": 2, "stop": ["-+"], "echo": True, "prompt": "xy"}
    whole = complete(client, **fields)["choices"][0]
    parts = [chunk["choices"][0] for chunk in stream(client, **fields)[:-1]]
    assert whole["text"] == "xyab--é" == "".join(part["text"] for part in parts)
    for name, values in whole["logprobs"].items():
        assert [value for part in parts for value in part["logprobs"][name]] == values
    assert whole["logprobs"]["text_offset"] == [0, 1, 2, 3, 4, 5, 6, 6]


def test_echo_returns_the_prompt(client: TestClient) -> None:
    assert complete(client, prompt="ab", echo=True, max_tokens=2)["choices"][0]["text"] == "abhi"
    assert complete(client, prompt=[97, 98], echo=True, max_tokens=2)["choices"][0]["text"] == "abhi"
    chunks = stream(client, prompt=["ab", "c"], echo=True, max_tokens=2)
    texts = ["", ""]
    for chunk in chunks[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == ["abhi", "chi"]


def test_echo_with_logprobs_scores_the_prompt(client: TestClient) -> None:
    """Without new tokens, too; the token that the server puts before a prompt has no text."""
    choice = complete(client, prompt="ab", echo=True, max_tokens=0, logprobs=1)["choices"][0]
    assert choice["text"] == "ab" and choice["finish_reason"] == "length"
    table = choice["logprobs"]
    assert table["tokens"] == ["a", "b"] and table["token_logprobs"][0] is None and table["token_logprobs"][1] < 0
    assert table["top_logprobs"][0] is None and table["text_offset"] == [0, 1]
    assert client.engine.handles[0].request.prompt_logprobs
    choice = complete(client, prompt="", echo=True, max_tokens=1, logprobs=0)["choices"][0]
    assert choice["text"] == "h" and choice["logprobs"]["tokens"] == ["<|endoftext|>", "h"]
    assert choice["logprobs"]["text_offset"] == [0, 0]


def test_log_probabilities_have_limits(client: TestClient) -> None:
    error = refused(client, 400, prompt="x" * 33, echo=True, logprobs=1)
    assert error["code"] == "context_length_exceeded" and "33" in error["message"]
    assert refused(client, 400, prompt="x", logprobs=1, max_tokens=60_000, n=2)["param"] == "max_tokens"
    complete(client, prompt="x" * 33, echo=True)


def test_no_tokens_need_no_engine(client: TestClient) -> None:
    assert complete(client, prompt="ab", max_tokens=0)["choices"][0]["text"] == ""
    assert complete(client, prompt="ab", max_tokens=0, echo=True)["choices"][0]["text"] == "ab"
    chunks = stream(client, prompt="ab", max_tokens=0, echo=True)
    assert [chunk["choices"][0]["text"] for chunk in chunks[:-1]] == ["ab", ""]
    assert not client.engine.handles


def test_a_busy_server_says_when_to_come_back(client: TestClient) -> None:
    client.engine.busy = True
    for streams in (False, True):
        answer = client.post("/v1/completions", json={"model": "bytes", "stream": streams})
        assert answer.status_code == 429 and answer.headers["retry-after"] == "3"
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"


def test_the_error_of_a_sequence_is_that_of_its_request(client: TestClient) -> None:
    client.engine.error = "the logits are not finite"
    error = refused(client, 500, n=2)
    assert error["message"] == "the logits are not finite" and error["code"] == "generation_failed"
    refused(client, 500, stream=True)  # not yet begun
    client.engine.after = 2
    first, *_, last = stream(client, prompt="ab", echo=True)
    assert first["choices"][0]["text"] == "ab" and last["error"]["code"] == "generation_failed"


def test_a_deadline_is_an_error(client: TestClient) -> None:
    client.engine.late = True
    assert refused(client, 504)["code"] == "timeout"
    client.engine.after = 2
    assert stream(client, prompt="ab", echo=True)[-1]["error"]["code"] == "timeout"
    assert client.engine.handles[0].request.deadline is not None


def test_too_many_choices_are_refused(client: TestClient) -> None:
    """Otherwise they would wait for places that the queue never has."""
    assert refused(client, 400, prompt=["a"] * 3, n=50)["param"] == "n"
    assert not client.engine.handles


def test_best_of_is_one_or_n(client: TestClient) -> None:
    complete(client, n=2, best_of=2)
    complete(client, n=2, best_of=1)
    assert refused(client, 400, n=2, best_of=3)["param"] == "best_of"


def test_a_translator_continues_no_text(client: TestClient) -> None:
    error = refused(client, 400, model="translator", prompt="a")
    assert error["param"] == "model" and "/translate" in error["message"]


def test_names_with_slashes_are_names(client: TestClient) -> None:
    client.engine.script = lambda request: BPE.encode("the little").tolist()
    assert complete(client, model="bpe", prompt="x")["choices"][0]["text"].startswith("the little")


def test_echo_is_limited(client: TestClient) -> None:
    """An answer repeats each prompt n times: a small request must not make a large answer."""
    body = {"model": "bytes", "prompt": "a" * 20_000, "echo": True, "max_tokens": 0}
    assert client.post("/v1/completions", json={**body, "n": 2}).status_code == 200
    refused = client.post("/v1/completions", json={**body, "n": 100})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "echo"


def test_only_the_end_of_a_long_prompt_goes_to_the_engine(client: TestClient) -> None:
    reply = client.post("/v1/completions", json={"model": "bytes", "prompt": "a" * 5000, "max_tokens": 1})
    assert reply.json()["usage"]["prompt_tokens"] == 5000
    assert 0 < len(client.engine.handles[-1].request.prompt) < 5000


