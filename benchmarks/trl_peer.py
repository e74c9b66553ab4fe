"""What `vs_trl.py` has TRL do, in an environment of TRL's own: nothing of bardlet is imported here.

    python benchmarks/trl_peer.py JOB.json ANSWER.json

JOB.json says what to do (`train` or `parity`) and with what; numbers go back as JSON.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
import trl
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

Job = dict[str, Any]
QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "eval_strategy": "no",
         "logging_strategy": "no", "dataloader_num_workers": 0, "dataloader_pin_memory": False,
         "gradient_checkpointing": False}
"""Training arguments of every job: the processor alone, and nothing but training."""
KINDS = {"sft": (trl.SFTConfig, trl.SFTTrainer, ["prompt", "completion"]),
         "dpo": (trl.DPOConfig, trl.DPOTrainer, ["prompt", "chosen", "rejected"]),
         "grpo": (trl.GRPOConfig, trl.GRPOTrainer, ["prompt"])}
FOUR = (0, 0, 0, 0)


def main() -> None:
    """Do the job of the first file, leave the answer in the second."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    transformers.logging.set_verbosity_error()
    answer = {"train": train, "parity": parity}[job["what"]](job)
    answer["versions"] = {made.__name__: made.__version__ for made in (trl, transformers, accelerate, torch)}
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


def trainer(job: Job, stage: str, records: list[dict[str, Any]], **settings: Any) -> Any:
    """TRL's trainer of a stage, which counts what goes through its model."""
    config, kind, columns = KINDS[stage]

    class Counting(kind):  # type: ignore[misc, valid-type]
        counted = FOUR

        def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            if stage != "grpo":
                self.counted = tuple(a + b for a, b in zip(self.counted, count(inputs), strict=True))
            return super().training_step(model, inputs, *rest, **named)

        def _compute_loss(self, model: Any, inputs: Any, *rest: Any) -> Any:
            if stage == "grpo":  # where the answers are written
                self.counted = tuple(a + b for a, b in zip(self.counted, count_answers(inputs), strict=True))
            return super()._compute_loss(model, inputs, *rest)

    how = {**QUIET, "output_dir": job["scratch"], "bf16": job["dtype"] == "bf16", "weight_decay": 0.1,
           "max_grad_norm": 1.0, **({} if stage == "grpo" else {"max_length": job["block_size"]}), **settings}
    data, tokenizer = Dataset.from_list(records).select_columns(columns), words(job)
    more = {}
    if stage == "grpo":
        more, tokenizer.eos_token = {"reward_funcs": share_of_e}, "<|end|>"  # at which an answer ends
    return Counting(model=job["model"], args=config(**how), train_dataset=data, processing_class=tokenizer, **more)


def share_of_e(completions: list[Any], **_: Any) -> list[float]:
    """A reward that costs nothing; `vs_trl.py` has the same."""
    texts = [one[0]["content"] for one in completions]
    return [text.count("e") / max(1, len(text)) for text in texts]


def words(job: Job) -> Any:
    """The model's tokenizer, with the job's chat template."""
    made = transformers.AutoTokenizer.from_pretrained(job["model"])
    made.chat_template = job["chat_template"]
    return made


# ---------------------------------------------------------------- speed


def count(inputs: dict[str, torch.Tensor]) -> tuple[int, int, int, int]:
    """(tokens that are predicted, those of them in answers, conversations, positions computed) of a micro-batch."""
    ids = inputs["input_ids"]
    if "attention_mask" in inputs:
        conversations, read = len(ids), int(inputs["attention_mask"].sum())
    else:  # rows laid end to end: a conversation begins where the position is 0
        conversations, read = int((inputs["position_ids"] == 0).sum()), ids.numel()
    answers = inputs["completion_mask"] == 1 if "completion_mask" in inputs else inputs["labels"] != -100
    return read - conversations, int(answers.sum()), conversations, ids.numel()


def count_answers(inputs: dict[str, torch.Tensor]) -> tuple[int, int, int, int]:
    """The same of a micro-batch of questions and the answers that were written to them."""
    asked, written = inputs["prompt_mask"], inputs["completion_mask"]
    read, answers = int(asked.sum() + written.sum()) - len(asked), int(written.sum())
    return read, answers, len(asked), asked.numel() + written.numel()


class Watch(TrainerCallback):
    """Of each pass over the data: seconds, and what was computed in it."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.passes, self.begun = trainer, list[list[float]](), 0.0

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.begun = time.perf_counter()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.passes.append([time.perf_counter() - self.begun, *self.trainer.counted])
        self.trainer.counted = FOUR


def train(job: Job) -> dict[str, Any]:
    """Train for the job's passes: (seconds, *count) of each, and a digest of what was learned from."""
    records = [json.loads(line) for line in Path(job["records"]).read_text(encoding="utf-8").splitlines()]
    made = trainer(job, job["stage"], records, num_train_epochs=job["passes"], **job["settings"])
    watch = Watch(made)
    made.add_callback(watch)
    known = digest(learned(made.train_dataset, made.processing_class))
    made.train()
    return {"passes": watch.passes, "learned": known}


def learned(data: Any, tokenizer: Any) -> list[list[list[int]]]:
    """Of each conversation [ids, those that are learned], from what a trainer has prepared."""
    made = []
    for row in data:
        if "prompt" in row and "input_ids" not in row and "prompt_ids" not in row:  # GRPO's: questions as words
            ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)
            made.append([ids if isinstance(ids, list) else ids["input_ids"], []])
            continue
        if "chosen_ids" in row:
            made += [[row["prompt_ids"] + row[side], row[side]] for side in ("chosen_ids", "rejected_ids")]
            continue
        first = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            ids, labels = (row[name][first : first + length] for name in ("input_ids", "labels"))
            made.append([ids, [label for label in labels if label != -100]])
            first += length
    return made


def digest(conversations: list[list[list[int]]]) -> str:
    """sha256 (hex) of conversations, in whatever order they are; `vs_trl.py` has the same."""
    return hashlib.sha256("\n".join(sorted(map(json.dumps, conversations))).encode()).hexdigest()


# ---------------------------------------------------------------- parity


def parity(job: Job) -> dict[str, Any]:
    """Losses of the job's tensors, and norms of their gradients, by TRL's trainers."""
    given = load_file(job["tensors"])
    question, answer = ([{"role": role, "content": "."}] for role in ("user", "assistant"))
    made = trainer(job, "sft", [{"prompt": question, "completion": answer}])
    ids, labels, mask = given["ids"], given["labels"], given["mask"]
    found = {"SFT": loss_and_norm(made, {"input_ids": ids, "labels": labels, "attention_mask": mask})}
    rows = [{"input_ids": i[m == 1].tolist(), "labels": w[m == 1].tolist()}
            for i, w, m in zip(ids, labels, mask, strict=True)]
    made = trainer(job, "sft", [{"prompt": question, "completion": answer}], packing=True)
    found["SFT, packed"] = loss_and_norm(made, made.data_collator(rows))
    made = trainer(job, "dpo", [{"prompt": question, "chosen": answer, "rejected": answer}], beta=job["beta"],
                   precompute_ref_log_probs=True)
    chosen, rejected = given["reference"].unbind(1)
    pairs = {"input_ids": ids, "attention_mask": mask, "completion_mask": (labels != -100).long(),
             "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    return {"found": {**found, "DPO": loss_and_norm(made, pairs), **grpo(job, given)}}


def loss_and_norm(made: Any, inputs: dict[str, torch.Tensor]) -> tuple[float, float]:
    """The loss that a trainer takes of a batch, a mean, and the norm of its gradient."""
    made.model.zero_grad()
    value = made.compute_loss(made.model, dict(inputs))
    value.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in made.model.parameters() if p.grad is not None])
    return value.item(), norm.item()


def grpo(job: Job, given: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """GRPO's loss of log probabilities that are given, and the norm of its gradient by them.

    TRL has no function of tensors for it, and none for PPO: the trainer's own method is asked, with the log
    probabilities in the place of those that it would compute.
    """
    # bnpo: the mean over all tokens; the correction of the divergence (its default) came after Shao et al. 2024
    config = trl.GRPOConfig(**QUIET, output_dir=job["scratch"], bf16=False, loss_type="bnpo", epsilon=job["clip"],
                            use_bias_correction_kl=False)
    made = trl.GRPOTrainer(model=job["model"], reward_funcs=lambda completions, **_: [0.0] * len(completions),
                           args=config, processing_class=words(job),
                           train_dataset=Dataset.from_list([{"prompt": "."}] * 8))  # fmt: skip
    made.current_gradient_accumulation_steps = 1
    A, T = given["logp"].shape
    nothing = torch.zeros((A, 1), dtype=torch.long)
    parts = {"GRPO": (job["beta"], given["advantage"]), "clipped policy": (0.0, given["advantage"]),
             "divergence": (1.0, torch.zeros(A))}  # beta, advantage
    found = {}
    for name, (beta, advantage) in parts.items():
        logp = given["logp"].clone().requires_grad_()
        made.beta = beta
        made._get_per_token_logps_and_entropies = lambda *_, logp=logp, **__: (logp, torch.zeros(A, T), None)
        value = made._compute_loss(made.model, {
            "prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": torch.zeros((A, T), dtype=torch.long),
            "completion_mask": given["answered"], "advantages": advantage, "old_per_token_logps": given["old"],
            "ref_per_token_logps": given["reference_logp"]})  # fmt: skip
        value.backward()
        found[name] = (value.item(), logp.grad.norm().item())
    return found


if __name__ == "__main__":
    main()
