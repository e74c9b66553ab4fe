"""Tokenize and write with transformers: python run_transformers.py FOLDER < {texts, prompts, ...} > {...}

For every version of transformers that loads the folder; `answer` is the same without a process.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import transformers


def answer(folder: str, request: dict[str, Any]) -> dict[str, Any]:
    """Return ids, completions one text at a time and padded, conversations by the template, and scores."""
    config = transformers.AutoConfig.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    answers: dict[str, Any] = {"version": transformers.__version__,
                               "ids": [tokenizer(text)["input_ids"] for text in request["texts"]]}
    if config.architectures[0].endswith("SequenceClassification"):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)

        @torch.inference_mode()
        def scores(texts: list[str]) -> list[float]:
            return model(**tokenizer(texts, return_tensors="pt", padding=True)).logits[:, 0].tolist()

        return {**answers, "scores": [scores([text])[0] for text in request["texts"]],
                "padded": scores(request["texts"])}
    translates = config.is_encoder_decoder
    if translates:  # a source ends with the end token
        assert all(ids[-1] == config.eos_token_id for ids in answers["ids"])
        answers["ids"] = [ids[:-1] for ids in answers["ids"]]
    kind = transformers.AutoModelForSeq2SeqLM if translates else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32)
    if request["chats"]:
        answers["chat_ids"] = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
                               for chat in request["chats"]]
    options = {"max_new_tokens": request["tokens"], "do_sample": False, "temperature": None, "top_k": None}

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        first = 1 if translates else batch["input_ids"].shape[1]  # a translation begins with the start token
        rows = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)[:, first:].tolist()
        # after its end token, a row is padded until the last one ends
        ends = [next((n + 1 for n, token in enumerate(row) if token in request["stop"]), len(row)) for row in rows]
        assert max(ends) == len(rows[0]), "it went on after every row had ended"
        return [row[:end] for row, end in zip(rows, ends, strict=True)]

    return {**answers, "completions": [generate([prompt])[0] for prompt in request["prompts"]],
            "padded": generate(request["prompts"])}


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    print(json.dumps(answer(sys.argv[1], json.load(sys.stdin))))
