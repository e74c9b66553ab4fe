"""Any gpt2 or qwen3 base can be taught to answer: tokens are added, and the embedding grows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from bardlet import tokenizer as tokenization
from bardlet.cli import main
from bardlet.config.model import ModelConfig
from bardlet.data import chat_template
from bardlet.inference.chat_session import ChatSession
from bardlet.models import build
from bardlet.models.base import LanguageModel, with_vocabulary
from bardlet.run import hf

TEXT = "".join(f"The {color} door has number {n}.\n" for n in range(40) for color in ("red", "blue", "old")) * 4
FINE = ["--dtype", "fp32", "--compile", "off", "--batch-size", "8", "--steps", "60", "--lr", "5e-3", "--muon-lr",
        "5e-2"]  # fmt: skip
TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--block-size", "64", "--dtype", "fp32", "--compile",
        "off", "--steps", "20"]  # fmt: skip


def foreign_gpt2(folder: Path) -> Path:
    """Write a folder as transformers writes GPT-2: one special token, no pad token, no chat template."""
    inner = RawTokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>").save_pretrained(folder)
    config = transformers.GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions with an emoji and "<|end|>", which the base text does not have."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n % 10}? 🐦 <|end|>", "answer": f"It is {n % 10}."}) + "\n"
                            for n in range(60)), encoding="utf-8")  # fmt: skip
    return path


@pytest.mark.parametrize("kind", ["char", "byte", "gpt2"])
def test_a_base_without_chat_tokens_learns_to_answer(kind: str, chats: Path, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    if kind == "gpt2":
        base = foreign_gpt2(tmp_path / "base")
    else:
        base = tmp_path / "base"
        (tmp_path / "text.txt").write_text(TEXT)
        assert main(["train", str(tmp_path / "text.txt"), *TINY, "--tokenizer", kind, "--out", str(base)]) == 0
    before, known = hf.read_folder(base)
    out = tmp_path / "run"
    assert main(["sft", str(base), str(chats), *FINE, "--out", str(out), "--debug"]) == 0
    told = re.search(r"adding (\d) special tokens for chat(?: and (\d+) new characters of the conversations)? to its "
                     r"vocabulary of (\d+)", capsys.readouterr().err)
    model, tokenizer = hf.read_folder(out)
    assert told and int(told[1]) == len(tokenizer.special) - len(known.special) and bool(told[2]) == (kind == "char")
    assert int(told[1]) + int(told[2] or 0) + int(told[3]) == tokenizer.vocab_size
    assert tokenizer.encode("The red door").tolist() == known.encode("The red door").tolist()  # ids do not change
    assert model.config.vocab_size == tokenizer.vocab_size > before.config.vocab_size
    assert not chat_template.is_missing(tokenizer)
    messages = [{"role": "user", "content": "3? 🐦 <|end|>"}, {"role": "assistant", "content": "It is 3."}]
    ids, _ = chat_template.encode(tokenizer, messages)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs.apply_chat_template(messages, tokenize=True, return_dict=False) == ids.tolist()
    answer = "".join(ChatSession(model, tokenizer, tokens=16, temperature=0).ask("3? 🐦 <|end|>"))
    assert answer.strip() and "<|" not in answer
    if kind != "gpt2":  # sixty steps teach a model that has read text
        assert answer.strip().startswith("It is")
    dpo = json.dumps({"prompt": "{n}?", "chosen": "It is.", "rejected": "No."})
    (tmp_path / "pairs.jsonl").write_text("".join(dpo.replace("{n}", str(n)) + "\n" for n in range(30)))
    assert main(["dpo", str(out), str(tmp_path / "pairs.jsonl"), *FINE[:6], "--steps", "2", "--out",
                 str(tmp_path / "dpo"), "--debug"]) == 0  # fmt: skip


def test_other_stages_and_lora_say_what_to_do(chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = foreign_gpt2(tmp_path / "base")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 30)
    assert main(["dpo", str(base), str(pairs), *FINE]) == 1
    assert "run `bardlet sft` on the base model first" in capsys.readouterr().err
    assert main(["sft", str(base), str(chats), *FINE, "--lora", "4"]) == 1
    assert "LoRA trains no embeddings" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_grown_model_gives_the_same_logits_for_the_old_tokens(family: str, tied: bool) -> None:
    torch.manual_seed(1)
    config = ModelConfig(family, 20, 16, n_layer=2, n_head=2, n_kv_head=2, n_embd=16, head_dim=8, n_inner=32,
                         tie_embeddings=tied)
    model = build(config).eval()
    grown = with_vocabulary(model, 26, seed=3)
    assert isinstance(grown, LanguageModel) and grown.config.vocab_size == 26 and not grown.training
    idx = torch.randint(20, (2, 9))
    torch.testing.assert_close(grown(idx)[..., :20], model(idx), rtol=0, atol=1e-6)
    assert len({tuple(row.tolist()) for row in grown.head[20:]}) == 6
    again = with_vocabulary(model, 26, seed=3)
    assert torch.equal(grown.head, again.head)


def test_user_text_never_becomes_a_special_token() -> None:
    """10,000 messages of pieces of special tokens; each conversation has exactly the template's own."""
    generator = np.random.default_rng(5)
    parts = ["<|", "|>", "<", "|", "user", "assistant", "end", "<|end|>", "<|user|>", "<|endoftext|>", " ", "a"]
    bases = (tokenization.train_char("".join(parts), separator=False), tokenization.train_byte(separator=True),
             tokenization.train_bpe(["<|end|> user assistant a " * 9], 270))
    tokenizers = [chat_template.with_special_tokens(base) for base in bases]
    for number in range(10_000):
        tokenizer = tokenizers[number % 3]
        content = "".join(generator.choice(parts, int(generator.integers(1, 9))))
        ids, _ = chat_template.encode(tokenizer, [{"role": "user", "content": content}])
        special = [i for i in ids.tolist() if i in tokenizer.special]
        assert special == [tokenizer.vocab["<|user|>"], tokenizer.vocab["<|end|>"]], content


def test_a_base_with_its_own_template_keeps_it(chats: Path, tmp_path: Path) -> None:
    """A model of Qwen's kind: sft, dpo and chat use its special tokens, and its vocabulary does not grow."""
    base = tmp_path / "base"
    template = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
                "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    inner = RawTokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    inner.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                         chat_template=template).save_pretrained(base)
    config = transformers.Qwen3Config(vocab_size=310, max_position_embeddings=64, hidden_size=32, intermediate_size=64,
                                      num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
                                      tie_word_embeddings=True)  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(config).save_pretrained(base)
    out = tmp_path / "run"
    assert main(["sft", str(base), str(chats), *FINE, "--out", str(out), "--debug"]) == 0
    model, tokenizer = hf.read_folder(out)
    assert tokenizer.chat_template == template and model.config.vocab_size == 310
    messages = [{"role": "user", "content": "3? 🐦 <|end|>"}]
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert chat_template.encode(tokenizer, messages, add_generation_prompt=True)[0].tolist() == ids
    session = ChatSession(model, tokenizer, tokens=16, temperature=0)
    answer = "".join(session.ask("3? 🐦 <|end|>"))
    assert session.uses_template and answer.startswith("It is") and "<|" not in answer
    generated = transformers.AutoModelForCausalLM.from_pretrained(out).generate(
        torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :].tolist()
    assert theirs.decode(generated, skip_special_tokens=True).strip() == answer.strip()
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"{n}?", "chosen": "It is.", "rejected": "No."}) + "\n"
                             for n in range(30)))
    assert main(["dpo", str(out), str(pairs), *FINE[:6], "--steps", "2", "--out", str(tmp_path / "dpo")]) == 0
