"""Chat templates with the constructs of the open models: the ids of transformers, and losses on answers alone."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import foreign_tokenizers as foreign
import pytest
import transformers

from bardlet.data import chat_template, preferences
from bardlet.data.forms import Preference
from bardlet.errors import BardletError
from bardlet.tokenizer import Tokenizer

LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}
{% set turns = messages[1:] %}{% set before = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{% else %}{% set turns = messages %}{% set before = '' %}{% endif %}
{% for turn in turns %}
{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('the roles must alternate') }}{% endif %}
{% set text = before + turn['content'] if loop.first else turn['content'] %}
{% if turn['role'] == 'user' %}{{ bos_token + '[INST] ' + text | trim + ' [/INST]' }}
{%- else %}{{ ' ' + text | trim + ' ' + eos_token }}{% endif %}
{% endfor %}"""
LLAMA3 = """\
{{- bos_token }}
{%- if tools is not none %}{{ raise_exception('unexpected tools') }}{% endif %}
{%- if not year is defined %}{% set year = strftime_now('%Y') if strftime_now is defined else '2024' %}{% endif %}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nYear: ' + year + '\\n\\n' + system + '<|eot_id|>' }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
MISTRAL = """\
{{- bos_token }}{% set ns = namespace(users=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set ns.users = ns.users + 1 %}
        {%- if tools is not none and loop.last %}{{- '[TOOLS]' + tools | tojson }}{% endif %}
        {{- '[INST] ' + message.content + '[/INST]' }}
    {%- elif message.role == 'system' and not loop.first %}{{- raise_exception('a system message comes first') }}
    {%- elif message.role == 'system' %}{{- message.content + '\\n\\n' }}
    {%- else %}{{- ' ' + message.content + eos_token }}{% endif %}
{%- endfor %}"""
ZEPHYR = """\
{% for message in messages %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
CHATML = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
          "{{ '<|im_start|>system\nYou are a bard.<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + message['role'] "
          "+ '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
THINKING = """\
{%- macro start(role) -%}{{ '<|im_start|>' + role + '\\n' }}{%- endmacro -%}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {%- set text = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {%- set thoughts = '' %}
        {%- if '</think>' in text %}
            {%- set thoughts = text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- start(message.role) }}
        {%- if loop.index0 > ns.last %}{{- '<think>\\n' + thoughts + '\\n</think>\\n\\n' }}{% endif %}
        {{- text + '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- else %}{{- start(message.role) + text + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- start('assistant') }}{% if not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}{% endif %}"""
CASES = {"llama2": ("llama2", LLAMA2), "llama2 as Metaspace": ("mistral", LLAMA2), "llama3": ("llama3", LLAMA3),
         "mistral": ("mistral", MISTRAL), "tinyllama": ("llama2", ZEPHYR), "zephyr as Metaspace": ("always", ZEPHYR),
         "smollm2": ("smollm2", CHATML), "qwen2": ("qwen2", CHATML), "smollm3": ("qwen2", THINKING)}


def load(name: str, folder: Path) -> Tokenizer:
    kind, template = CASES[name]
    tokenizer = foreign.load(folder, kind, chat_template=template)
    assert chat_template.is_foreign(tokenizer) and chat_template.reason_against(tokenizer) is None
    return tokenizer


def conversations(number: int) -> list[list[dict[str, str]]]:
    """Return conversations whose texts begin or end with white space now and then."""
    generator = random.Random(3)
    pieces = [fragment for fragment in foreign.FRAGMENTS if "\x1c" not in fragment]

    def text() -> str:
        return "a" + "".join(generator.choices(pieces, k=generator.randrange(7))) if generator.random() < 0.5 else (
            "".join(generator.choices(pieces, k=3)) + "b ")

    return [[*([{"role": "system", "content": text()}] if n % 3 == 0 else []),
             *({"role": role, "content": text()} for _ in range(1 + n % 2) for role in ("user", "assistant"))]
            for n in range(number)]


@pytest.mark.parametrize("name", CASES)
def test_the_ids_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    tokenizer, peer = load(name, tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for messages in conversations(60):
        for prompt in (False, True):
            given = messages[:-1] if prompt else messages
            expected = peer.apply_chat_template(given, add_generation_prompt=prompt, return_dict=False,
                                                enable_thinking=False)
            assert chat_template.encode(tokenizer, given, prompt)[0].tolist() == expected, given


@pytest.mark.parametrize("name", CASES)
def test_only_answers_and_their_ends_are_learned(name: str, tmp_path: Path) -> None:
    """A token may begin with the space before an answer; the space between an answer and its end is part of it."""
    tokenizer = load(name, tmp_path)
    messages = [{"role": "user", "content": "the day"}, {"role": "assistant", "content": "the Who€ 漢 day"},
                {"role": "user", "content": "the Who"}, {"role": "assistant", "content": "the"}]
    ids, learned = chat_template.encode(tokenizer, messages)
    end = {"llama3": "<|eot_id|>", "smollm2": "<|im_end|>", "qwen2": "<|im_end|>"}.get(CASES[name][0], "</s>")
    gap = " " if CASES[name][1] == LLAMA2 else ""
    text = tokenizer.decode(ids[learned].tolist())
    assert text.replace(f"{end} the", f"{end}the").lstrip() == f"the Who€ 漢 day{gap}{end}the{gap}{end}"
    first = {**messages[1], "weight": 0}
    again, learned = chat_template.encode(tokenizer, [messages[0], first, *messages[2:]])
    assert again.tolist() == ids.tolist()
    assert tokenizer.decode(ids[learned].tolist()).lstrip() == f"the{gap}{end}"


@pytest.mark.parametrize("name", CASES)
def test_a_completion_of_a_preference_is_the_last_answer(name: str, tmp_path: Path) -> None:
    tokenizer = load(name, tmp_path)
    question = [{"role": "user", "content": "the day"}, {"role": "assistant", "content": "a day"},
                {"role": "user", "content": "Who"}]
    pair = Preference(question, "the day.", "the Who")
    for side in preferences.SIDES:
        chats = preferences.encode_side(tokenizer, [pair], side)
        text = tokenizer.decode(chats.tokens[chats.answer].tolist(), skip_special=True)
        assert text.strip() == getattr(pair, side)
        prompt = chat_template.encode(tokenizer, question, add_generation_prompt=True)[0]
        if CASES[name][1] != THINKING:
            kept = chats.tokens[~chats.answer].tolist()
            assert prompt.tolist()[: len(kept)] == kept, "every token before the completion is in the prompt"


def test_thoughts_that_a_template_moves_stay_where_it_puts_them(tmp_path: Path) -> None:
    """Earlier ones are removed; those of the last answer are learned with it."""
    tokenizer = load("smollm3", tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": role, "content": text} for role, text in (
        ("user", "the </think>"), ("assistant", "<think>\nthe day\n</think>\n\na day"), ("user", "Who"),
        ("assistant", "<think>\nWho?\n</think>\n\nthe Who"))]
    ids, learned = chat_template.encode(tokenizer, messages)
    assert ids.tolist() == peer.apply_chat_template(messages, return_dict=False)
    assert tokenizer.decode(ids[learned].tolist()) == "a day<|im_end|>Who?\n</think>\n\nthe Who<|im_end|>"
    messages[1]["content"] += "<|im_start|>"
    with pytest.raises(BardletError, match="rewrites the messages; remove special tokens"):
        chat_template.encode(tokenizer, messages)


def test_a_special_token_in_a_rewritten_message_is_refused(tmp_path: Path) -> None:
    """Here the message takes away a token of the template, and brings one of the same name."""
    template = "{% for m in messages %}{{ '' if '#' in m.content else eos_token }}{{ m.content | replace('#', '') }}"
    tokenizer = foreign.load(tmp_path, "llama2", chat_template=template + "{% endfor %}")
    assert chat_template.encode(tokenizer, [{"role": "user", "content": "a"}])[0][0] == tokenizer.eos_id
    with pytest.raises(BardletError, match="rewrites the messages"):
        chat_template.encode(tokenizer, [{"role": "user", "content": "#</s>"}])


@pytest.mark.parametrize("name", CASES)
def test_text_never_becomes_a_special_token(name: str, tmp_path: Path) -> None:
    tokenizer, generator = load(name, tmp_path), random.Random(1)
    special = [*tokenizer.special.values(), " ", "a"]
    plain = chat_template.encode(tokenizer, [{"role": "user", "content": "a"}])[0]
    count = sum(i in tokenizer.special for i in plain.tolist())
    for _ in range(200):
        content = "".join(generator.choices(special, k=5))
        ids = chat_template.encode(tokenizer, [{"role": "user", "content": content}])[0].tolist()
        assert sum(i in tokenizer.special for i in ids) == count, content


@pytest.mark.parametrize(("name", "template", "messages", "reason"), [
    ("llama2", LLAMA2, ["user", "user"], "rejects the conversation (the roles must alternate)"),
    ("mistral", MISTRAL, ["user", "system"], "rejects the conversation (a system message comes first)"),
])
def test_a_conversation_that_a_template_rejects_says_why(name: str, template: str, messages: list[str], reason: str,
                                                         tmp_path: Path) -> None:
    tokenizer = foreign.load(tmp_path, name, chat_template=template)
    with pytest.raises(BardletError) as error:
        chat_template.encode(tokenizer, [{"role": role, "content": "a"} for role in messages])
    assert str(error.value) == f"the model's chat template {reason}"


def test_bardlets_template_suits_a_base_model_whose_special_tokens_it_breaks_up(tmp_path: Path) -> None:
    """As those of Llama 3: all begin with <|. Text could become the others', in transformers."""
    tokenizer = chat_template.with_special_tokens(foreign.load(tmp_path / "base", "llama3"))
    tokenizer.chat_template = chat_template.TEMPLATE
    tokenizer.save(tmp_path / "chat")
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "chat")
    content = " ".join(["the", *tokenizer.special.values(), " Who"])
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    ids = chat_template.encode(tokenizer, messages)[0].tolist()
    assert ids == peer.apply_chat_template(messages, return_dict=False)
    assert sum(i in tokenizer.special for i in ids) == 4
    for name in ("smollm2", "llama2"):
        with pytest.raises(BardletError, match="unsafe for chat; start from a model with a chat template of its own"):
            chat_template.with_special_tokens(foreign.load(tmp_path / name, name))


def test_a_special_token_that_takes_spaces_is_refused(tmp_path: Path) -> None:
    folder = foreign.write(tmp_path, "llama2", chat_template=ZEPHYR)
    rules = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    rules["added_tokens"][2]["rstrip"] = True
    (folder / "tokenizer.json").write_text(json.dumps(rules), encoding="utf-8")
    from bardlet import tokenizer as tk

    reason: Any = chat_template.reason_against(tk.load(folder))
    assert "the special token </s> of the model's chat template takes the white space around it" in reason


def test_an_answer_ends_at_each_id_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    tokenizer = load("llama3", tmp_path)
    assert chat_template.end_ids(tokenizer) == [1, 2]
