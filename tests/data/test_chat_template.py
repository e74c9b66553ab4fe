"""The chat template: the same ids as in transformers, and no message can forge a special token."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch

from bardlet import tokenizer as tk
from bardlet.config.model import ModelConfig
from bardlet.data import chat_template
from bardlet.errors import BardletError
from bardlet.inference import answers
from bardlet.models.llama import Llama

TOKENIZER = tk.train_bpe(["who says what, as tokens: the user asks and the assistant answers | < > end " * 20], 330)
PIECES = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>", "<|pad|>", "<|", "|>", "<", "|", ">",
          "end", "<<|end|>|>", "<\u200b|", "\n", "  ", "é", "\u65e5\u672c", "\U0001f642", "a user asks", "{{ 1 }}",
          "{% raw %}", "\\n", "'", '"', "\t", "\r\n", "\u0301", "\ufeff"]  # fmt: skip


def conversation(random_: random.Random) -> list[dict[str, str]]:
    return [{"role": random_.choice(chat_template.ROLES),
             "content": "".join(random_.choices(PIECES, k=random_.randint(0, 9)))}
            for _ in range(random_.randint(1, 4))]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tokenizer of transformers, from the same files and with the template."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(TOKENIZER.json, encoding="utf-8")
    config = TOKENIZER.hf_config() | {"chat_template": chat_template.TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def test_ids_of_10000_messages_match_transformers_and_none_is_forged(theirs: Any) -> None:
    random_, count = random.Random(0), 0
    while count < 10_000:
        messages, prompt = conversation(random_), random_.random() < 0.5
        count += len(messages)
        ids, answer = chat_template.encode(TOKENIZER, messages, prompt)
        assert ids.tolist() == theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        assert len(answer) == len(ids)
        assert np.isin(ids, list(TOKENIZER.special)).sum() == 2 * len(messages) + prompt  # a role and an end for each


def test_answer_marks_the_assistants_content_and_its_end() -> None:
    messages = [{"role": "system", "content": "as tokens"}, {"role": "user", "content": "who"},
                {"role": "assistant", "content": "the user"}, {"role": "user", "content": "what"},
                {"role": "assistant", "content": ""}]  # fmt: skip
    ids, answer = chat_template.encode(TOKENIZER, messages)
    assert TOKENIZER.decode(ids[answer]) == "the user<|end|><|end|>"
    assert TOKENIZER.decode(ids) == ("<|system|>as tokens<|end|><|user|>who<|end|><|assistant|>the user<|end|>"
                                 "<|user|>what<|end|><|assistant|><|end|>")  # fmt: skip
    prompt, answer = chat_template.encode(TOKENIZER, messages[:2], add_generation_prompt=True)
    assert prompt.tolist() == ids[: len(prompt)].tolist() and not answer.any()


@pytest.mark.parametrize(("messages", "expected"), [
    ([], "at least one"), ([{"role": "root", "content": "x"}], "message 1: its role is 'root'"),
    (["x"], "message 1: its role is None"),
    ([{"role": "user", "content": "x"}, {"role": "user", "content": 3}], "message 2: its content is a number, not"),
])  # fmt: skip
def test_an_invalid_message_is_named(messages: Any, expected: str) -> None:
    with pytest.raises(BardletError, match=expected):
        chat_template.encode(TOKENIZER, messages)


def test_a_tokenizer_without_role_tokens_is_an_error() -> None:
    with pytest.raises(BardletError, match=r"without the token <\|system\|>"):
        chat_template.encode(tk.train_char("abc", False), [{"role": "user", "content": "abc"}])


def test_an_unknown_role_is_an_error_in_the_template_too(theirs: Any) -> None:
    from jinja2.exceptions import TemplateError

    with pytest.raises(TemplateError, match="not root"):
        theirs.apply_chat_template([{"role": "root", "content": "x"}])


def test_an_answer_does_not_depend_on_the_rest_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer may fill the window after its own prompt, whatever the other prompts and their order."""
    torch.manual_seed(0)
    config = ModelConfig(model="qwen3", vocab_size=TOKENIZER.vocab_size, block_size=24, n_layer=1, n_head=2,
                         n_kv_head=1, n_embd=16, head_dim=8, n_inner=24, activation="silu")  # fmt: skip
    model = Llama(config).eval()
    prompts = [chat_template.encode(TOKENIZER, [{"role": "user", "content": "who " * n}], add_generation_prompt=True)[0]
               for n in (9, 1, 5, 2, 3)]
    alone = [answers.generate_answers(model, TOKENIZER, [ids], temperature=1.0, seed=i)[0]
             for i, ids in enumerate(prompts)]
    assert answers.generate_answers(model, TOKENIZER, prompts, temperature=1.0, seed=0) == alone
    monkeypatch.setattr(answers, "ROWS", 2)
    assert answers.generate_answers(model, TOKENIZER, prompts, temperature=1.0, seed=0) == alone
    assert not any(ended for _, ended in alone), "the end of the window stops each of them"
