"""Use a model folder in tools of Hugging Face: python run_hugging_face.py TOOL FOLDER < {...} > {...}

Knows nothing of bardlet: a tool has the folder, and what a user would write for it.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from typing import Any

import torch
import transformers

GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None}


def pipeline(folder: str, request: dict[str, Any]) -> dict[str, Any]:
    """Continue texts, or answer conversations, in batches of four."""
    pipe = transformers.pipeline("text-generation", folder, dtype=torch.float32, device="cpu")
    chats = not isinstance(request["inputs"][0], str)  # a conversation comes back with the answer as its last message
    rows = pipe(request["inputs"], batch_size=4, return_full_text=chats, max_new_tokens=request["tokens"], **GREEDY)
    texts = [row[0]["generated_text"] for row in rows]
    return {"completions": [text[-1]["content"] for text in texts] if chats else texts}


def trainer(folder: str, request: dict[str, Any]) -> dict[str, Any]:
    """Train all weights for a few steps, and save."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return train(folder, model, request)


def peft(folder: str, request: dict[str, Any]) -> dict[str, Any]:
    """Train a LoRA adapter for a few steps, merge it, and save."""
    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return train(folder, get_peft_model(model, lora), request)


def train(folder: str, model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Train on texts, and save; return the loss on all texts before and after, and logits of the saved model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(text, truncation=True) for text in request["texts"]]
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    batch = collate(rows[:8])
    padded = batch["attention_mask"] == 0
    assert padded.any() and (batch["labels"][padded] == -100).all()
    assert (batch["labels"][~padded] == batch["input_ids"][~padded]).all()

    @torch.inference_mode()
    def loss() -> float:
        return float(model.eval()(**collate(rows)).loss)

    before = loss()
    arguments = transformers.TrainingArguments(
        request["out"] + "-trainer", max_steps=request["steps"], per_device_train_batch_size=8, logging_steps=1,
        learning_rate=request["lr"], use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True)
    transformers.set_seed(0)
    run = transformers.Trainer(model, arguments, data_collator=collate, train_dataset=rows, processing_class=tokenizer)
    run.train()
    steps = sum("loss" in row for row in run.state.log_history)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    model.save_pretrained(request["out"])
    tokenizer.save_pretrained(request["out"])
    after = loss()
    with torch.inference_mode():
        logits = [model(input_ids=torch.tensor([ids])).logits[0].tolist() for ids in request["ids"]]
    return {"steps": steps, "losses": [before, after], "logits": logits}


def lm_eval(folder: str, request: dict[str, Any]) -> dict[str, Any]:
    """Score pairs and whole texts, and continue texts up to a line break."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=4)
    options = {"until": ["\n"], "max_gen_toks": request["tokens"], "do_sample": False}

    def ask(kind: str, rows: list[tuple[Any, ...]]) -> Any:
        return getattr(model, kind)([Instance(kind, {}, row, n) for n, row in enumerate(rows)])

    return {"pairs": ask("loglikelihood", [tuple(pair) for pair in request["pairs"]]),
            "rolling": ask("loglikelihood_rolling", [(text,) for text in request["texts"]]),
            "completions": ask("generate_until", [(text, options) for text in request["contexts"]])}


TOOLS = {"pipeline": pipeline, "trainer": trainer, "peft": peft, "lm_eval": lm_eval}

if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    answer = TOOLS[sys.argv[1]](sys.argv[2], json.load(sys.stdin))
    package = "transformers" if sys.argv[1] in ("pipeline", "trainer") else sys.argv[1]
    print(json.dumps({"version": importlib.metadata.version(package), "transformers": transformers.__version__,
                      **answer}))
