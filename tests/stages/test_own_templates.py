"""Fine-tuning a model from elsewhere with its own chat template: the run keeps its template and special tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_tokenizers as foreign
import torch
import transformers
from folders import write_model

from bardlet import tokenizer as tk
from bardlet.config.model import ModelConfig
from bardlet.data import chat_template
from bardlet.models.llama import Llama
from bardlet.run import hf

TEMPLATE = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
            "{{ '[INST] ' + m.content | trim + ' [/INST]' }}"
            "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}")
FAST = ["--steps", "2", "--batch-size", "2", "--dtype", "fp32", "--compile", "off", "--lr", "1e-3", "--debug"]


def test_a_run_keeps_the_template_and_the_special_tokens(tmp_path: Path,
                                                         bardlet: Callable[..., dict[str, Any]]) -> None:
    """Of `sft`, and of `dpo` after it; transformers reads the same conversations from the run."""
    folder = write_model(tmp_path / "model", "qwen3")
    foreign.write(folder, "llama2", chat_template=TEMPLATE)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 40]}')
    tokenizer = tk.load(folder)
    model = Llama(ModelConfig("qwen3", vocab_size=tokenizer.vocab_size, block_size=96, n_layer=1, n_head=2, n_kv_head=2,
                              n_embd=16, head_dim=8, n_inner=64, activation="silu"))
    torch.manual_seed(2)
    hf.write_folder(folder, model, tokenizer)
    hf.write_weights(folder, model.hf_state_dict())
    chats, pairs = tmp_path / "chats.jsonl", tmp_path / "pairs.jsonl"
    chats.write_text("".join(json.dumps({"prompt": f" the {n}", "completion": f"Who {n}"}) + "\n" for n in range(30)))
    pairs.write_text("".join(json.dumps({"prompt": f"the {n}", "chosen": f"Who {n}", "rejected": "a day"}) + "\n"
                             for n in range(30)))
    bardlet("sft", folder, chats, *FAST, "--out", tmp_path / "sft")
    bardlet("dpo", tmp_path / "sft", pairs, *FAST, "--out", tmp_path / "dpo")
    messages = [{"role": "user", "content": " the day"}, {"role": "assistant", "content": "Who "}]
    expected = chat_template.encode(tokenizer, messages)[0].tolist()
    for run in (tmp_path / "sft", tmp_path / "dpo"):
        ours, peer = tk.load(run), transformers.AutoTokenizer.from_pretrained(run)
        assert (ours.bos, ours.eos, ours.unk, ours.stop_ids) == ("<s>", "</s>", "<unk>", (2, 40))
        assert chat_template.encode(ours, messages)[0].tolist() == expected
        assert peer.apply_chat_template(messages, return_dict=False) == expected
        assert json.loads((run / "generation_config.json").read_text())["eos_token_id"] == [2, 40]
        assert json.loads((run / "config.json").read_text())["bos_token_id"] == 1
