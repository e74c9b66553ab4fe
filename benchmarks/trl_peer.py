"""TRL's side of `vs_trl.py`. It runs in TRL's own environment and does not import bardlet.

    python benchmarks/trl_peer.py JOB.json ANSWER.json

JOB.json has the task (`train` or `parity`) and its settings; ANSWER.json gets the figures.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from types import MethodType, SimpleNamespace
from typing import Any

import accelerate
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

Job = dict[str, Any]
QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "eval_strategy": "no",
         "logging_steps": 1, "dataloader_num_workers": 0, "dataloader_pin_memory": False,
         "gradient_checkpointing": False}
"""Training arguments of all jobs: CPU only, no evaluation or saving."""
KINDS = {"sft": (trl.SFTConfig, trl.SFTTrainer, ["prompt", "completion"]),
         "dpo": (trl.DPOConfig, trl.DPOTrainer, ["prompt", "chosen", "rejected"]),
         "grpo": (trl.GRPOConfig, trl.GRPOTrainer, ["prompt"])}
ZEROS = (0, 0, 0, 0)


def main() -> None:
    """Run the job in the first file, and write the answer to the second."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    transformers.logging.set_verbosity_error()
    answer = {"train": train, "parity": parity}[job["task"]](job)
    answer["versions"] = {package.__name__: package.__version__ for package in (trl, transformers, accelerate, torch)}
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


def trainer(job: Job, stage: str, records: list[dict[str, Any]], **settings: Any) -> Any:
    """Return TRL's trainer for a stage; it counts the tokens that its model processes."""
    config, trainer_class, columns = KINDS[stage]

    class Counting(trainer_class):  # type: ignore[misc, valid-type]
        counted = ZEROS

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if stage != "grpo":
                self.counted = tuple(a + b for a, b in zip(self.counted, count(inputs), strict=True))
            return super().training_step(model, inputs, *args, **kwargs)

        def _compute_loss(self, model: Any, inputs: Any, *args: Any) -> Any:
            if stage == "grpo":  # here the inputs contain the completions
                self.counted = tuple(a + b for a, b in zip(self.counted, count_answers(inputs), strict=True))
            return super()._compute_loss(model, inputs, *args)

    options = {**QUIET, "output_dir": job["scratch"], "bf16": job["dtype"] == "bf16", "weight_decay": 0.1,
               "max_grad_norm": 1.0, **({} if stage == "grpo" else {"max_length": job["block_size"]}), **settings}
    data, tokenizer = Dataset.from_list(records).select_columns(columns), read_tokenizer(job)
    extra: dict[str, Any] = {}
    if job.get("lora"):  # the scale is ALPHA / rank, as in bardlet's models/lora.py
        extra["peft_config"] = LoraConfig(r=job["lora"], lora_alpha=32, target_modules="all-linear",
                                          task_type="CAUSAL_LM")
    if stage == "grpo":
        extra["reward_funcs"], tokenizer.eos_token = share_of_e, "<|end|>"  # the end token of an answer
    return Counting(model=job["model"], args=config(**options), train_dataset=data, processing_class=tokenizer, **extra)


def share_of_e(completions: list[Any], **_: Any) -> list[float]:
    """Return a reward that takes no time to compute; the same as in `vs_trl.py`."""
    texts = [completion[0]["content"] for completion in completions]
    return [text.count("e") / max(1, len(text)) for text in texts]


def read_tokenizer(job: Job) -> Any:
    """Return the model's tokenizer, with the job's chat template."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
    tokenizer.chat_template = job["chat_template"]
    return tokenizer


# ---------------------------------------------------------------- speed


def count(inputs: dict[str, torch.Tensor]) -> tuple[int, int, int, int]:
    """Count (predicted tokens, answer tokens, conversations, computed positions) of a micro-batch."""
    ids = inputs["input_ids"]
    if "attention_mask" in inputs:
        conversations, tokens = len(ids), int(inputs["attention_mask"].sum())
    else:  # packed rows: a conversation begins where the position is 0
        conversations, tokens = int((inputs["position_ids"] == 0).sum()), ids.numel()
    answers = inputs["completion_mask"] == 1 if "completion_mask" in inputs else inputs["labels"] != -100
    return tokens - conversations, int(answers.sum()), conversations, ids.numel()


def count_answers(inputs: dict[str, torch.Tensor]) -> tuple[int, int, int, int]:
    """Count the same for a micro-batch of GRPO, with prompts and completions."""
    prompts, completions = inputs["prompt_mask"], inputs["completion_mask"]
    predicted, answers = int(prompts.sum() + completions.sum()) - len(prompts), int(completions.sum())
    return predicted, answers, len(prompts), prompts.numel() + completions.numel()


class Watch(TrainerCallback):
    """Records (seconds, *count) of each epoch in `passes`, and the loss of each step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.passes, self.started = trainer, list[list[float]](), 0.0
        self.losses: list[float] = []

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        if "loss" in logs:  # not the summary at the end
            self.losses.append(float(logs["loss"]))

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.passes.append([time.perf_counter() - self.started, *self.trainer.counted])
        self.trainer.counted = ZEROS


def train(job: Job) -> dict[str, Any]:
    """Train for the job's epochs; return (seconds, *count) and loss of each, and a digest of the training data."""
    records = [json.loads(line) for line in Path(job["records"]).read_text(encoding="utf-8").splitlines()]
    trl_trainer = trainer(job, job["stage"], records, num_train_epochs=job["passes"], **job["settings"])
    watch = Watch(trl_trainer)
    trl_trainer.add_callback(watch)
    data_digest = digest(training_data(trl_trainer.train_dataset, trl_trainer.processing_class))
    trl_trainer.train()
    size = len(watch.losses) // job["passes"]
    losses = [round(fmean(watch.losses[n * size : (n + 1) * size]), 4) for n in range(job["passes"])]
    return {"passes": watch.passes, "digest": data_digest, "losses": losses,
            "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)}


def training_data(data: Any, tokenizer: Any) -> list[list[list[int]]]:
    """Return [ids, ids that count in the loss] of each conversation in a trainer's prepared dataset."""
    conversations = []
    for row in data:
        if "prompt" in row and "input_ids" not in row and "prompt_ids" not in row:  # GRPO: prompts as text
            ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)
            conversations.append([ids if isinstance(ids, list) else ids["input_ids"], []])
            continue
        if "chosen_ids" in row:
            conversations += [[row["prompt_ids"] + row[side], row[side]] for side in ("chosen_ids", "rejected_ids")]
            continue
        first = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            ids, labels = (row[name][first : first + length] for name in ("input_ids", "labels"))
            conversations.append([ids, [label for label in labels if label != -100]])
            first += length
    return conversations


def digest(conversations: list[list[list[int]]]) -> str:
    """Return the sha256 (hex) of conversations, independent of their order; the same as in `vs_trl.py`."""
    return hashlib.sha256("\n".join(sorted(map(json.dumps, conversations))).encode()).hexdigest()


# ---------------------------------------------------------------- parity


def parity(job: Job) -> dict[str, Any]:
    """Return the losses of the job's tensors and the norms of their gradients, by TRL's trainers."""
    tensors = load_file(job["tensors"])
    question, answer = ([{"role": role, "content": "."}] for role in ("user", "assistant"))
    sft = trainer(job, "sft", [{"prompt": question, "completion": answer}])
    ids, labels, mask = tensors["ids"], tensors["labels"], tensors["mask"]
    losses = {"SFT": loss_and_norm(sft, {"input_ids": ids, "labels": labels, "attention_mask": mask})}
    rows = [{"input_ids": i[m == 1].tolist(), "labels": w[m == 1].tolist()}
            for i, w, m in zip(ids, labels, mask, strict=True)]
    packed = trainer(job, "sft", [{"prompt": question, "completion": answer}], packing=True)
    losses["SFT, packed"] = loss_and_norm(packed, packed.data_collator(rows))
    dpo = trainer(job, "dpo", [{"prompt": question, "chosen": answer, "rejected": answer}], beta=job["beta"],
                  precompute_ref_log_probs=True)
    chosen, rejected = tensors["reference"].unbind(1)
    pairs = {"input_ids": ids, "attention_mask": mask, "completion_mask": (labels != -100).long(),
             "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    return {"losses": {**losses, "DPO": loss_and_norm(dpo, pairs), "reward model": reward(tensors),
                       "KTO": kto(job, tensors), **grpo(job, tensors)}}


def loss_and_norm(trl_trainer: Any, inputs: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Return a trainer's mean loss of a batch and the norm of its gradient."""
    model = trl_trainer.model
    model.zero_grad()
    value = trl_trainer.compute_loss(model, dict(inputs))
    value.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return value.item(), norm.item()


def grpo(job: Job, tensors: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """Return the GRPO loss of given log-probabilities, and the norm of its gradient with respect to them.

    TRL has no loss function of tensors for GRPO or PPO. So this calls the trainer's method, with its own computation of
    the log-probabilities replaced.
    """
    # bnpo: the mean over all tokens. TRL's bias correction of the KL, on by default, is newer than Shao et al. 2024
    config = trl.GRPOConfig(**QUIET, output_dir=job["scratch"], bf16=False, loss_type="bnpo", epsilon=job["clip"],
                            use_bias_correction_kl=False)
    trl_trainer = trl.GRPOTrainer(model=job["model"], reward_funcs=lambda completions, **_: [0.0] * len(completions),
                                  args=config, processing_class=read_tokenizer(job),
                                  train_dataset=Dataset.from_list([{"prompt": "."}] * 8))  # fmt: skip
    trl_trainer.current_gradient_accumulation_steps = 1
    A, T = tensors["logp"].shape
    prompt = torch.zeros((A, 1), dtype=torch.long)  # masked
    parts = {"GRPO": (job["beta"], tensors["advantage"]), "clipped policy": (0.0, tensors["advantage"]),
             "KL estimate": (1.0, torch.zeros(A))}  # beta, advantage
    losses = {}
    for name, (beta, advantage) in parts.items():
        logp = tensors["logp"].clone().requires_grad_()
        trl_trainer.beta = beta
        trl_trainer._get_per_token_logps_and_entropies = lambda *_, logp=logp, **__: (logp, torch.zeros(A, T), None)
        value = trl_trainer._compute_loss(trl_trainer.model, {
            "prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": torch.zeros((A, T), dtype=torch.long),
            "completion_mask": tensors["answered"], "advantages": advantage, "old_per_token_logps": tensors["old"],
            "ref_per_token_logps": tensors["reference_logp"]})  # fmt: skip
        value.backward()
        losses[name] = (value.item(), logp.grad.norm().item())
    return losses


def reward(tensors: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Return the loss of a reward model with given rewards, and the norm of its gradient; see `kto`."""
    rewards = tensors["reward"].clone().requires_grad_()
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), args=SimpleNamespace(center_rewards_coefficient=None),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x), _total_train_tokens=0,
        _metrics={"eval": defaultdict(list)})
    value = trl.RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=rewards[:, None]), {})
    value.backward()
    return value.item(), rewards.grad.norm().item()


def kto(job: Job, tensors: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Return the KTO loss of given log-probabilities in float64, and the norm of its gradient.

    The trainer's method runs on a stand-in with its settings, whose model returns the log-probabilities.
    """
    rows, logp = len(tensors["logp"]), tensors["logp"].double().requires_grad_()
    masked = tensors["answered"].double()

    def model(**_: Any) -> SimpleNamespace:
        policy = logp if torch.is_grad_enabled() else tensors["old"].double()  # mismatched completions: no gradient
        zeros = torch.zeros_like(policy)
        return SimpleNamespace(log_probs=policy * masked, entropy=zeros, mean_logits=zeros)

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), calculate_KL=True, precompute_ref_logps=True, beta=job["beta"],
        loss_type="kto", desirable_weight=1.3, undesirable_weight=0.7, aux_loss_enabled=False, args=None,
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x), _total_train_tokens=0,
        _tp_size=1, _metrics={"train": defaultdict(list)}, state=SimpleNamespace(num_input_tokens_seen=0))
    trainer._compute_kl_logps = MethodType(trl.KTOTrainer._compute_kl_logps, trainer)
    ids = torch.zeros((rows, logp.shape[1] + 1), dtype=torch.long)
    names = ("input_ids", "attention_mask", "completion_mask", "KL_input_ids", "KL_attention_mask",
             "KL_completion_mask")
    reference = (tensors["reference_logp"].double() * masked).sum(1)
    batch = {**{name: ids if name.endswith("ids") else torch.ones_like(ids) for name in names},
             "label": torch.arange(rows) % 2 == 0, "ref_logps": reference, "ref_KL_logps": reference}
    value = trl.KTOTrainer._compute_loss(trainer, model, batch, False)
    value.backward()
    return value.item(), logp.grad.norm().item()


if __name__ == "__main__":
    main()
