"""The forms of records in use: each gives the same messages as the same content in bardlet's own form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bardlet import tokenizer as tokenization
from bardlet.data import chat_template, forms, records
from bardlet.data.forms import Fields, Unusable
from bardlet.errors import BardletError

Messages = list[dict[str, Any]]


def own(question: str, context: str, answer: str, system: str = "") -> Messages:
    """Return a conversation in bardlet's own form."""
    asked = f"{question}\n\n{context}" if context else question
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": asked},
            {"role": "assistant", "content": answer}]


CONVERSATIONS: dict[str, tuple[str, Callable[[str, str, str], Any]]] = {
    "openai": ("https://platform.openai.com/docs/guides/supervised-fine-tuning",
               lambda q, c, a: {"messages": own(q, c, a)}),
    "sharegpt": ("https://github.com/unslothai/unsloth/issues/321", lambda q, c, a: {"conversations": [
        {"from": "human", "value": own(q, c, a)[0]["content"]}, {"from": "gpt", "value": a}]}),
    "bare list": ("https://github.com/karpathy/nanochat", lambda q, c, a: own(q, c, a)),
    "prompt and completion": ("https://huggingface.co/docs/trl/dataset_formats", lambda q, c, a: {
        "prompt": own(q, c, a)[0]["content"], "completion": a}),
    "conversational prompt and completion": ("https://huggingface.co/docs/trl/dataset_formats", lambda q, c, a: {
        "prompt": own(q, c, a)[:1], "completion": own(q, c, a)[1:]}),
    "prompt and response": ("https://github.com/axolotl-ai-cloud/axolotl/issues/720", lambda q, c, a: {
        "prompt": q, "input": c, "response": a}),
    "dolly": ("https://huggingface.co/datasets/databricks/databricks-dolly-15k", lambda q, c, a: {
        "instruction": q, "context": c, "response": a}),
    "alpaca": ("https://github.com/tatsu-lab/stanford_alpaca", lambda q, c, a: {
        "instruction": q, "input": c, "output": a}),
    "question and answer": ("https://github.com/openai/grade-school-math", lambda q, c, a: {
        "question": q, "context": c, "answer": a}),
    "content parts": ("https://platform.openai.com/docs/api-reference/chat", lambda q, c, a: {"messages": [
        {"role": "user", "content": [{"type": "text", "text": own(q, c, a)[0]["content"]}]}, own(q, c, a)[1]]}),
    "roles in capitals": ("https://github.com/ProfSynapse/Synaptic-Tuner/pull/42", lambda q, c, a: {"messages": [
        {"role": "USER", "content": own(q, c, a)[0]["content"]}, {"role": "Assistant", "content": a}]}),
    "a null system": ("https://github.com/hiyouga/LLaMA-Factory", lambda q, c, a: {
        "instruction": q, "input": c, "output": a, "system": None, "history": []}),
}
"""Name: (where the form comes from, the record of a question, its context and its answer)."""

PREFERENCES: dict[str, tuple[str, Callable[[str, str, str, str], Any]]] = {
    "explicit prompt": ("https://huggingface.co/docs/trl/dataset_formats", lambda q, s, a, b: {
        "system": s, "prompt": q, "chosen": a, "rejected": b}),
    "implicit prompt": ("https://github.com/OpenRLHF/OpenRLHF/issues/909", lambda q, s, a, b: {
        "chosen": own(q, "", a, s), "rejected": own(q, "", b, s)}),
    "ultrafeedback": ("https://huggingface.co/datasets/HuggingFaceH4/ultrafeedback_binarized", lambda q, s, a, b: {
        "prompt": q, "chosen": own(q, "", a, s), "rejected": own(q, "", b, s), "messages": own(q, "", a, s),
        "score_chosen": 8.0}),
    "orca": ("https://huggingface.co/datasets/Intel/orca_dpo_pairs", lambda q, s, a, b: {
        "system": s, "question": q, "chosen": a, "rejected": b}),
    "single messages": ("https://github.com/hiyouga/LlamaFactory/issues/6509", lambda q, s, a, b: {
        "prompt": own(q, "", a, s)[:-1], "chosen": {"role": "assistant", "content": a},
        "rejected": {"role": "assistant", "content": b}}),
    "llama-factory": ("https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md", lambda q, s, a, b: {
        "conversations": [{"from": "human", "value": q}], "system": s, "chosen": {"from": "gpt", "value": a},
        "rejected": {"from": "gpt", "value": b}}),
    "alpaca pairs": ("https://github.com/huggingface/trl/issues/1858", lambda q, s, a, b: {
        "instruction": q, "input": "", "system": s, "output": [a, b]}),
    "alpaca with chosen": ("https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md", lambda q, s, a, b: {
        "instruction": q, "system": s, "chosen": a, "rejected": b}),
    "hh-rlhf": ("https://github.com/anthropics/hh-rlhf", lambda q, s, a, b: {
        "system": s, "chosen": f"\n\nHuman: {q}\n\nAssistant: {a}", "rejected": f"\n\nHuman: {q}\n\nAssistant: {b}"}),
    "hh-rlhf with a prompt": ("https://github.com/OpenRLHF/OpenRLHF/issues/308", lambda q, s, a, b: {
        "system": s, "prompt": f"\n\nHuman: {q}\n\nAssistant:", "chosen": f" {a}", "rejected": f" {b}"}),
}
"""Name: (where the form comes from, the record of a question, a system message, a chosen and a rejected answer)."""

WORDS = ["blue", "what?", "of", "Über", "<|end|>", "two lines\nhere", "漢字", "x" * 30]


def write(path: Path, values: list[Any]) -> records.Examples:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return records.find([str(path)])


def text(generator: np.random.Generator) -> str:
    return " ".join(generator.choice(WORDS, int(generator.integers(1, 6))))


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_give_the_same_ids_in_every_form(name: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    contents = [(f"{n} {text(generator)}", text(generator) if n % 2 else "", text(generator)) for n in range(200)]
    expected = write(tmp_path / "own.jsonl", [{"messages": own(*content)} for content in contents]).conversations()
    examples = write(tmp_path / "other.jsonl", [CONVERSATIONS[name][1](*content) for content in contents])
    read = examples.conversations()
    assert read == expected and len(read[1]) == 20
    assert (examples.report.total, examples.report.unusable, examples.report.notes) == (200, 0, [])
    tokenizer = tokenization.train_bpe(["blue what of two lines here " * 20], 280)
    for messages, other in zip(read[0], expected[0], strict=True):
        ids, learned = chat_template.encode(tokenizer, messages)
        assert ids.tolist() == chat_template.encode(tokenizer, other)[0].tolist() and learned.any()


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_are_the_same_in_every_form(name: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(4)
    contents = [(f"{n} {text(generator)}", "Be kind." if n % 2 else "", f"yes {text(generator)}",
                 f"no {text(generator)}") for n in range(200)]  # fmt: skip
    expected = write(tmp_path / "own.jsonl", [
        {"prompt": own(q, "", a, s)[:-1], "chosen": a, "rejected": b} for q, s, a, b in contents]).preferences()
    examples = write(tmp_path / "other.jsonl", [PREFERENCES[name][1](*content) for content in contents])
    assert examples.preferences() == expected
    assert (examples.report.unusable, examples.report.notes) == (0, [])


def test_a_prompt_of_several_turns_is_used_whole() -> None:
    turns = [{"role": "system", "content": "Add."}, {"role": "user", "content": "0 + 0?"},
             {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "go on"}]
    sides = {name: [*turns, {"role": "assistant", "content": content}]
             for name, content in (("chosen", "0"), ("rejected", "no"))}
    assert forms.preference(Fields({"prompt": "0 + 0?", **sides})).prompt == turns
    assert forms.preference(Fields({"prompt": turns, "chosen": "0", "rejected": "no"})).prompt == turns
    dialogue = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    assert [message["content"] for message in forms.preference(
        Fields({"chosen": f"{dialogue}d", "rejected": f"{dialogue}e"})).prompt] == ["a", "b", "c"]
    differing = {"chosen": sides["chosen"], "rejected": [turns[1], sides["rejected"][-1]]}
    with pytest.raises(Unusable, match="differ before their last messages"):
        forms.preference(Fields(differing))
    with pytest.raises(Unusable, match="prompt is not part of"):
        forms.preference(Fields({"prompt": "something else", **sides}))


def test_history_and_system_stand_before_any_prompt() -> None:
    for name in ("prompt", "question", "instruction", "query"):
        read = forms.conversation(Fields({name: "c", "answer": "d", "system": "s", "history": [["a", "b"]]}))
        assert [(message["role"], message["content"]) for message in read] == [
            ("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert forms.conversation(Fields({"prompt": "c", "answer": "d", "history": history}))[:2] == history
    developer = {"messages": [{"role": "developer", "content": "s"}, *own("a", "", "b")]}
    assert forms.conversation(Fields(developer))[0] == {"role": "system", "content": "s"}


def test_a_message_of_weight_0_is_not_learned() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0},
                {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]
    tokenizer = tokenization.train_bpe(["a b " * 50], 280)
    ids, learned = chat_template.encode(tokenizer, forms.conversation(Fields({"messages": messages})))
    half = len(ids) // 2
    assert not learned[:half].any() and learned[half:].sum() == 2
    with pytest.raises(Unusable, match="weight of every answer is 0"):
        forms.conversation(Fields({"messages": messages[:2]}))
    with pytest.raises(Unusable, match=r"weight is 0\.5"):
        forms.conversation(Fields({"messages": [messages[0], {**messages[1], "weight": 0.5}]}))


@pytest.mark.parametrize(("record", "reason"), [
    ({"messages": [*own("a", "", "b"), {"role": "tool", "content": "c"}]}, "calls a tool"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [{}]}]},
     "calls a tool"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{}"}]}, "calls a tool"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]}, "content is null"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "'image_url', not text"),
    ({"messages": own("a", "", " ")}, "its answer is empty"), ({"instruction": "a", "output": ""}, "answer is empty"),
    ({"instruction": "", "input": "", "output": "b"}, "its prompt is empty"), ({"prompt": "a"}, "has no answer"),
    ({"prompt": "a", "answer": None}, "has no answer"), ({"prompt": "a", "answer": 4}, '"answer" is a number'),
    ({"text": "a"}, "has no conversation"), ([{"role": "boss", "content": "a"}], "its role is 'boss'"),
])
def test_an_unusable_conversation_has_a_reason(record: Any, reason: str) -> None:
    with pytest.raises(Unusable) as error:
        forms.conversation(Fields(record))
    assert reason in str(error.value)


@pytest.mark.parametrize(("record", "reason"), [
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
    ({"prompt": "a", "chosen": "", "rejected": "b"}, "chosen completion is empty"),
    ({"prompt": "a", "chosen": "b", "rejected": " "}, "rejected completion is empty"),
    ({"chosen": "b", "rejected": "c"}, "has no prompt"), ({"prompt": "a", "chosen": "b"}, "has no rejected"),
    ({"instruction": "a", "output": "b"}, "has no chosen and rejected"),
])
def test_an_unusable_preference_has_a_reason(record: Any, reason: str) -> None:
    with pytest.raises(Unusable) as error:
        forms.preference(Fields(record))
    assert reason in str(error.value)


def test_unusable_records_are_left_out_counted_and_named(tmp_path: Path) -> None:
    values: list[Any] = [{"prompt": f"{n}?", "answer": "yes", "source": "web", "n": n} for n in range(200)]
    values[6], values[16], values[26] = ({"prompt": "x", "answer": ""} for _ in range(3))
    values[30] = {"prompt": "y"}
    examples = write(tmp_path / "a.jsonl", values)
    lines = (tmp_path / "a.jsonl").read_text().split("\n")
    lines[40] = "{broken"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    train, held_out = examples.conversations()
    assert len(train) + len(held_out) == 195 and (examples.report.total, examples.report.unusable) == (200, 5)
    left_out, unread = examples.report.notes
    assert left_out == (f"{tmp_path / 'a.jsonl'}: left out 5 of 200 records: line 7, line 17, line 27: its answer is "
                        "empty; line 31: has no answer: no assistant message; line 41: is not JSON at column 2")
    assert unread == f'{tmp_path / "a.jsonl"}: bardlet does not read the field "source"'
    examples.report.announce(max_bad=0.05)
    with pytest.raises(BardletError, match=r"line 7: its answer is empty; 5 of 200 records cannot be used, more than "
                                           r"--max-bad 0.02 allows"):  # fmt: skip
        examples.report.announce(max_bad=0.02)


def test_a_file_without_a_usable_record_says_why(tmp_path: Path) -> None:
    examples = write(tmp_path / "a.jsonl", [{"prompt": f"{n}?"} for n in range(30)])
    with pytest.raises(BardletError, match=r"line 1: has no answer.*; none of the 30 records can be used"):
        examples.conversations()
    assert len(examples.questions()[0]) == 27  # but they are prompts


@pytest.mark.parametrize(("bad", "said"), [
    (0, r"validation; provide at least 20"), (1, r"validation \(1 unusable; .*line 1: its answer is empty\); provide"),
    (18, r"validation \(18 unusable; .*line 1: its answer is empty\); provide at least 20"),
])  # fmt: skip
def test_too_few_records_say_how_many_were_left_out(bad: int, said: str, tmp_path: Path) -> None:
    values = [{"prompt": f"{n}?", "answer": "" if n < bad else "yes"} for n in range(bad + 19)]
    with pytest.raises(BardletError, match=f"a: 19 conversations are too few to hold some out for {said}"):
        write(tmp_path / "a.jsonl", values).conversations()


def test_questions_on_both_sides_of_the_split_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = [{"system": f"s{n}", "prompt": f"{n % 37}?", "answer": "yes"} for n in range(100)]
    write(tmp_path / "a.jsonl", values).conversations()
    assert "the first question of 10 of the 10 held-out records is also in the training split" in caplog.text
