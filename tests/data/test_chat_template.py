"""The chat template: the same ids as transformers, and nothing that a person writes is a token of it."""

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
from bardlet.models.qwen3 import Qwen3

WORDS = tk.train_bpe(["who says what, as tokens: the user asks and the assistant answers | < > end " * 20], 330)
PIECES = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>", "<|pad|>", "<|", "|>", "<", "|", ">",
          "end", "<<|end|>|>", "<\u200b|", "\n", "  ", "é", "\u65e5\u672c", "\U0001f642", "a user asks", "{{ 1 }}",
          "{% raw %}", "\\n", "'", '"', "\t", "\r\n", "\u0301", "\ufeff"]  # fmt: skip


def conversation(random_: random.Random) -> list[dict[str, str]]:
    return [{"role": random_.choice(chat_template.ROLES),
             "content": "".join(random_.choices(PIECES, k=random_.randint(0, 9)))}
            for _ in range(random_.randint(1, 4))]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' tokenizer, from the same files and with the template."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(WORDS.json, encoding="utf-8")
    config = WORDS.hf_config() | {"chat_template": chat_template.TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def test_ten_thousand_messages_have_transformers_ids_and_no_forged_token(theirs: Any) -> None:
    random_, said = random.Random(0), 0
    while said < 10_000:
        messages, ask = conversation(random_), random_.random() < 0.5
        said += len(messages)
        ids, answer = chat_template.encode(WORDS, messages, ask)
        assert ids.tolist() == theirs.apply_chat_template(messages, add_generation_prompt=ask, return_dict=False)
        assert len(answer) == len(ids)
        assert np.isin(ids, list(WORDS.special)).sum() == 2 * len(messages) + ask  # a role and an end for each


def test_what_the_assistant_wrote_is_learned_with_its_end() -> None:
    messages = [{"role": "system", "content": "as tokens"}, {"role": "user", "content": "who"},
                {"role": "assistant", "content": "the user"}, {"role": "user", "content": "what"},
                {"role": "assistant", "content": ""}]  # fmt: skip
    ids, answer = chat_template.encode(WORDS, messages)
    assert WORDS.decode(ids[answer]) == "the user<|end|><|end|>"
    assert WORDS.decode(ids) == ("<|system|>as tokens<|end|><|user|>who<|end|><|assistant|>the user<|end|>"
                                 "<|user|>what<|end|><|assistant|><|end|>")  # fmt: skip
    asked, learned = chat_template.encode(WORDS, messages[:2], ask=True)
    assert asked.tolist() == ids[: len(asked)].tolist() and not learned.any()


@pytest.mark.parametrize(("messages", "what"), [
    ([], "at least one"), ([{"role": "root", "content": "x"}], "message 1: its role is 'root'"),
    (["x"], "message 1: its role is None"),
    ([{"role": "user", "content": "x"}, {"role": "user", "content": 3}], "message 2: its content is a number, not"),
])  # fmt: skip
def test_what_is_no_message_is_named(messages: Any, what: str) -> None:
    with pytest.raises(BardletError, match=what):
        chat_template.encode(WORDS, messages)


def test_a_tokenizer_without_roles_is_named() -> None:
    with pytest.raises(BardletError, match=r"no token <\|system\|>"):
        chat_template.encode(tk.train_char("abc", False), [{"role": "user", "content": "abc"}])


def test_a_role_that_is_none_is_an_error_in_the_template_too(theirs: Any) -> None:
    from jinja2.exceptions import TemplateError

    with pytest.raises(TemplateError, match="not root"):
        theirs.apply_chat_template([{"role": "root", "content": "x"}])


def test_an_answer_does_not_depend_on_those_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question has the room that it leaves in the window, whatever is asked beside it, and in whichever order."""
    torch.manual_seed(0)
    config = ModelConfig(model="qwen3", vocab_size=WORDS.vocab_size, block_size=24, n_layer=1, n_head=2, n_kv_head=1,
                         n_embd=16, head_dim=8, n_inner=24, activation="silu")  # fmt: skip
    model = Qwen3(config).eval()
    asked = [chat_template.encode(WORDS, [{"role": "user", "content": "who " * n}], ask=True)[0]
             for n in (9, 1, 5, 2, 3)]
    alone = [answers.generate_answers(model, WORDS, [ids], temperature=1.0, seed=i)[0] for i, ids in enumerate(asked)]
    assert answers.generate_answers(model, WORDS, asked, temperature=1.0, seed=0) == alone
    monkeypatch.setattr(answers, "ROWS", 2)
    assert answers.generate_answers(model, WORDS, asked, temperature=1.0, seed=0) == alone
    assert not any(ended for _, ended in alone), "it has no time to end: the room is what ends these"
