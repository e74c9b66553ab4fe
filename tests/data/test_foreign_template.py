"""Chat templates of models from elsewhere: the ids of transformers, and no forged special tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import transformers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer

from bardlet import tokenizer as tokenization
from bardlet.data import chat_template, foreign_template
from bardlet.errors import BardletError
from bardlet.tokenizer import Tokenizer

CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
          "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
THINKING = ("{%- for message in messages %}\n    {%- if message.role == 'assistant' and loop.last %}\n        "
            "{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + message.content + '<|im_end|>\\n' }}\n    "
            "{%- else %}\n        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
            "\n    "
            "{%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n    "
            "{%- if enable_thinking is defined and enable_thinking is false %}\n        "
            "{{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}\n{%- endif %}")
GENERATION = ("{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>a {% generation %}{{ m.content }}"
              "<|im_end|>{% endgeneration %}{% else %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endif %}"
              "{% endfor %}")  # fmt: skip
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ eos_token }}"
TEMPLATES = {"chatml": CHATML, "thinking": THINKING, "generation": GENERATION, "plain": PLAIN}

QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
        r"|\s+")


def qwen(folder: Path, template: str) -> Tokenizer:
    """Return a tokenizer with the pipeline of Qwen's, saved by transformers."""
    inner = RawTokenizer(models.BPE())
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(["user assistant system\n\nHello there, what is 12 + 30?\n It is 42."] * 9,
                              trainers.BpeTrainer(vocab_size=300, show_progress=False,
                                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    inner.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    inner.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>",
                                                pad_token="<|endoftext|>", chat_template=template)
    fast.save_pretrained(folder)
    return tokenization.load(folder)


def conversations(number: int) -> list[list[dict[str, str]]]:
    generator = np.random.default_rng(6)
    words = ["Hello", " there", "\n", "\n\n", "  ", "42", "é", "é", "漢", "🐦", "user", "'s", "?", "assistant"]

    def text() -> str:
        return "a" + "".join(generator.choice(words, int(generator.integers(1, 7))))

    return [[*([{"role": "system", "content": text()}] if n % 3 == 0 else []),
             *({"role": role, "content": text()} for _ in range(1 + n % 2) for role in ("user", "assistant"))]
            for n in range(number)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_ids_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    tokenizer = qwen(tmp_path, TEMPLATES[name])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert chat_template.is_foreign(tokenizer) and chat_template.reason_against(tokenizer) is None
    for messages in conversations(200):
        for prompt in (False, True):
            given = messages[:-1] if prompt else messages
            expected = theirs.apply_chat_template(given, tokenize=True, add_generation_prompt=prompt, return_dict=False,
                                                  enable_thinking=False)
            assert chat_template.encode(tokenizer, given, prompt)[0].tolist() == expected, given


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_answers_and_their_ends_are_learned(name: str, tmp_path: Path) -> None:
    tokenizer = qwen(tmp_path, TEMPLATES[name])
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "It is 42."},
                {"role": "user", "content": "there"}, {"role": "assistant", "content": "what?", "weight": 0}]
    ids, learned = chat_template.encode(tokenizer, messages)
    text = tokenizer.decode(ids[learned].tolist()).lstrip()  # a token may begin with the space before the answer
    assert text == ("It is 42." if name == "plain" else "It is 42.<|im_end|>")
    assert chat_template.end_ids(tokenizer) == [tokenizer.vocab["<|im_end|>"]]


def test_user_text_never_becomes_a_special_token(tmp_path: Path) -> None:
    tokenizer = qwen(tmp_path, CHATML)
    generator = np.random.default_rng(7)
    parts = ["<|", "|>", "im_start", "im_end", "<|im_end|>", "<|im_start|>", "<|endoftext|>", "\n", "assistant", "≮"]
    for _ in range(10_000):
        content = "".join(generator.choice(parts, int(generator.integers(1, 9))))
        ids, _ = chat_template.encode(tokenizer, [{"role": "user", "content": content}])
        special = [tokenizer.special[i] for i in ids.tolist() if i in tokenizer.special]
        assert special == ["<|im_start|>", "<|im_end|>"], content


@pytest.mark.parametrize(("template", "reason"), [
    ("{% for m in messages %}", "cannot be read"), ("{{ messages[0].content }}", "leaves out or reorders messages"),
    ("{{ raise_exception('no system role') }}", "rejects the conversation .no system role"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "rejects the conversation"),
    ("{% for i in range(10 ** 9) %}x{% endfor %}", "rejects the conversation"),
])
def test_a_template_that_cannot_be_used_says_why(template: str, reason: str, tmp_path: Path) -> None:
    tokenizer = qwen(tmp_path, template)
    assert reason in str(chat_template.reason_against(tokenizer)).replace("(", ".")
    with pytest.raises(BardletError):
        foreign_template.of(tokenizer)
