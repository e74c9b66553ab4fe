"""Fine-tuning by TRL and by bardlet, in turn on one machine: speed, and agreement of the losses.

    python benchmarks/vs_trl.py sft BASE CONVERSATIONS --peer-python PATH [--records 768] [--lora 16] [--save]
    python benchmarks/vs_trl.py dpo SFT PREFERENCES --peer-python PATH [--records 384] [--repeats 3] [--save]
    python benchmarks/vs_trl.py grpo SFT CONVERSATIONS --peer-python PATH [--records 64] [--repeats 3] [--save]
    python benchmarks/vs_trl.py parity SFT --peer-python PATH

PATH is the Python of an environment with TRL (`pip install trl peft`); it need not contain bardlet. BASE and SFT are
folders with a model that transformers can load. The files are those of `bardlet sft` and `bardlet dpo`.
The benchmark uses the first records that fit into the window, so that neither side truncates. Each side tokenizes them
itself, with the same chat template; the token ids must be equal.

Each side reads all records once as a warm-up (compilation, memory), and then --passes times with a clock, so both
compute the same tokens. Each runs in its own process, in turn; the figures are medians over the repeats. Not timed:
reading, tokenization, the reference's log-probabilities (both compute them once, before training), evaluation and
saving. Weights, window, global batch, precision and threads are the same. The loss is on the answers only. Tokens are
predicted tokens: all but the first of a conversation, without padding; in `dpo`, of both conversations of a pair.

In `grpo` both sides sample --group completions per prompt at temperature 1, and make one update per --rows completions,
without a KL term. The learning rate is tiny, so that the model and the lengths of the completions do not change. The
time includes sampling, and a reward that takes no time to compute. The figure to compare is completions per second.

bardlet runs with its defaults (Muon, compiled), with AdamW, and both without compilation. TRL runs with AdamW, its
default optimizer, without gradient checkpointing (on by default, which is slower), and with several ways to compute the
batch: all rows at once; a few at a time, with gradient accumulation; `packing`, which concatenates the rows computed at
once into one; for `grpo` also with more completions sampled at once. The ratios are to the fastest. --peer-compile also
compiles the fastest.

With --lora, both train factors of that rank for all matrices of the blocks, with the same scale. TRL's sides keep the
frozen weights in fp32 or, where training is in bf16, in bf16. The loss of a pass is the mean over its steps; AdamW has
the same settings on both sides. Peak memory is that of the process, which differs before training, too.

Floor: tokens per second of a program that computes only the matrix products of this model, at the rate of a large
product on this machine. These are three times the products of the forward pass (in `grpo` four times, for sampling),
with the head on answer tokens only.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from safetensors.torch import save_file

from bardlet.config.finetuning import EXACT, DPOConfig, FineTuneConfig, GRPOConfig, SFTConfig
from bardlet.data import batch as data_batch
from bardlet.data import chat_template, prompts
from bardlet.data import preferences as data_preferences
from bardlet.data import records as examples
from bardlet.data.forms import Question
from bardlet.data.packing import ChatBatches, TokenizedChats
from bardlet.planning import compilation
from bardlet.run import hf
from bardlet.runtime import distributed
from bardlet.stages import dpo, rl, sft, stage_of
from bardlet.stages.rewards import Completion
from bardlet.tokenizer import Tokenizer
from bardlet.training import logprobs, losses
from bardlet.training.trainer import fit

Record = dict[str, Any]
OURS: dict[str, dict[str, Any]] = {
    "bardlet": {"compile": "on"}, "bardlet, eager": {"compile": "off"},
    "bardlet AdamW": {"compile": "on", "optimizer": "adamw"},
    "bardlet AdamW, eager": {"compile": "off", "optimizer": "adamw"}}  # fmt: skip
GRPO_SETTINGS = ("group", "answer_tokens")
TINY_LR = 1e-8
"""Learning rate of `grpo`: the completions do not change."""
CONFIGS: dict[str, type[FineTuneConfig]] = {"sft": SFTConfig, "dpo": DPOConfig, "grpo": GRPOConfig}
FASTEST = {"sft": "TRL packed, 1 at a time", "dpo": "TRL, 4 at a time", "grpo": "TRL"}
"""The side that --peer-compile compiles: the fastest uncompiled one when this was written."""
COUNTS = ("tokens", "answer_tokens", "conversations", "positions")


def peers(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the settings of TRL's sides, by name. All have the same global batch if --rows is a multiple of 4."""
    stage, rows = args.command, args.rows

    def at_once(number: int, **extra: Any) -> dict[str, Any]:
        return {"per_device_train_batch_size": number, "gradient_accumulation_steps": rows // number, **extra}

    few = min(4, rows)
    if stage == "sft":
        sides = {"TRL padded": at_once(rows), "TRL padded, 4 at a time": at_once(few),
                 "TRL packed": at_once(rows, packing=True), "TRL packed, 1 at a time": at_once(1, packing=True)}
    elif stage == "dpo":
        common = {"precompute_ref_log_probs": True, "beta": DPOConfig.beta}
        sides = {"TRL": at_once(rows, **common), "TRL, 4 at a time": at_once(few, **common)}
    else:
        common = {"num_generations": args.group, "max_completion_length": args.answer_tokens, "beta": 0.0}
        sides = {"TRL": at_once(rows, **common), "TRL, a group at a time": at_once(args.group, **common),
                 "TRL, 4 batches at once": at_once(rows, steps_per_generation=4, **common)}
    fastest = FASTEST[stage]
    if stage == "sft" and args.lora:
        del sides["TRL padded"]
        sides |= {f"TRL packed, {few} at a time": at_once(few, packing=True)}
    if args.lora and args.dtype == "bf16":
        sides |= {f"{name}, bf16 weights": {**side, "model_init_kwargs": {"dtype": "bfloat16"}}
                  for name, side in sides.items()}
        fastest += ", bf16 weights"
    compiled = {f"{fastest}, compiled": {**sides[fastest], "torch_compile": True}} if args.peer_compile else {}
    return {**sides, **compiled}


def main() -> None:
    """Run the command line; see the top of this file."""
    if sys.argv[1:2] == ["ours"]:  # one side, in its own process
        job = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
        Path(sys.argv[3]).write_text(json.dumps(ours(job)), encoding="utf-8")
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for stage, records, rows in (("sft", 768, 32), ("dpo", 384, 32), ("grpo", 64, 64)):
        command = commands.add_parser(stage, help=f"compare the speed of {stage.upper()}")
        command.add_argument("model", type=Path)
        command.add_argument("data", type=Path)
        command.add_argument("--records", type=int, default=records, help="records, from the start of the file")
        command.add_argument("--passes", type=int, default=1, help="timed passes, after the warm-up")
        command.add_argument("--repeats", type=int, default=3)
        command.add_argument("--rows", type=int, default=rows, help="rows, pairs or completions per global batch")
        command.add_argument("--block-size", type=int, default=256)
        command.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
        command.add_argument("--lora", type=int, metavar="RANK", help="train LoRA factors of this rank")
        command.add_argument("--lr", type=float, help="learning rate of AdamW; default: bardlet's")
        command.add_argument("--peer-compile", action="store_true", help="also run TRL compiled")
        command.add_argument("--only", nargs="+", help="names of sides to run; default: all")
        command.add_argument("--save", action="store_true", help="append a line of results")
        if stage == "grpo":
            command.add_argument("--group", type=int, default=8, help="completions per prompt")
            command.add_argument("--answer-tokens", type=int, default=64, help="maximum tokens per completion")
    parity_ = commands.add_parser("parity", help="compare the losses of the same numbers")
    parity_.add_argument("model", type=Path)
    for command in commands.choices.values():
        command.add_argument("--peer-python", required=True, help="the Python of an environment with TRL")
        command.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        (parity if args.command == "parity" else speed)(args, Path(scratch))


def run_job(command: list[str], job: Record, scratch: Path) -> Record:
    """Run a job in another process, and return its answer. Exit with its output if it fails."""
    question, answer = scratch / "job.json", scratch / "answer.json"
    question.write_text(json.dumps(job), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1",
                   "HF_HOME": str(scratch / "cache")}
    done = subprocess.run([*command, str(question), str(answer)], env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}")
    return dict(json.loads(answer.read_text(encoding="utf-8")))


def peer(args: argparse.Namespace) -> list[str]:
    """Return the command that runs TRL's side."""
    return [args.peer_python, str(record.HERE / "trl_peer.py")]


# ---------------------------------------------------------------- speed


def speed(args: argparse.Namespace, scratch: Path) -> None:
    """Run all sides in turn, print the table, and append a line of results."""
    model, tokenizer = hf.read_folder(args.model)
    records = list(itertools.islice(fitting(args, tokenizer), args.records))
    (scratch / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records), encoding="utf-8")
    rows = [row for example in records for row in conversations(tokenizer, example)]
    job = {"stage": args.command, "model": str(args.model.resolve()), "records": str(scratch / "records.jsonl"),
           "chat_template": tokenizer.chat_template or chat_template.TEMPLATE, "scratch": str(scratch / "run"),
           "block_size": args.block_size, "rows": args.rows, "lora": args.lora,
           "dtype": args.dtype, "threads": args.threads, "passes": 1 + args.passes,
           **{name: getattr(args, name) for name in GRPO_SETTINGS if hasattr(args, name)}}
    own = [sys.executable, str(Path(__file__).resolve()), "ours"]
    config = CONFIGS[args.command]
    lr = TINY_LR if args.command == "grpo" else args.lr or config.lr
    optimizer = {"learning_rate": lr}
    if args.lora:
        optimizer |= {"adam_beta2": config.beta2, "lr_scheduler_type": "constant"}
        job["ours"] = {"lr": lr, "schedule": "constant", "warmup_steps": 0}
    ours = {**OURS, **{f"{name}, 1 at a time": {**OURS[name], "batch_size": 1, "grad_accum": args.rows}
                       for name in ("bardlet AdamW", "bardlet AdamW, eager")}}
    sides = {**{name: (own, settings) for name, settings in (ours if args.lora else OURS).items()},
             **{name: (peer(args), {**settings, **optimizer}) for name, settings in peers(args).items()}}
    if unknown := set(args.only or ()) - set(sides):
        sys.exit(f"--only {', '.join(sorted(unknown))}: no such side; choose from {'; '.join(sides)}")
    runs: dict[str, list[Record]] = {name: [] for name in args.only or sides}
    versions: Record = {}
    for _ in range(args.repeats):
        for name in runs:
            command, settings = sides[name]
            answer = run_job(command, {**job, "task": "train", "settings": settings}, scratch)
            assert answer["digest"] == digest(rows), f"{name} does not train on the same tokens"
            runs[name].append({**rates(answer["passes"][1:]), "losses": answer["losses"], "peak_gb": answer["peak_gb"]})
            versions |= answer.get("versions", {})
            print(json.dumps({name: runs[name][-1]}), flush=True)
    lengths = [len(ids) for ids, _ in rows]
    answer_tokens = sum(int(learned[1:].sum()) for _, learned in rows)
    if args.command == "grpo":  # the length of the first side's completions
        first = next(iter(runs.values()))[0]
        length = round(first["answer_tokens"] / first["conversations"])
        lengths, answer_tokens = [n + length for n in lengths] * args.group, length * args.group * len(lengths)
    limit = floor(model, lengths, answer_tokens, args.dtype) * (6 / 8 if args.command == "grpo" else 1)
    report(args, runs, {"floor": round(limit), "records": len(records),
                        "parameters": sum(p.numel() for p in model.parameters()), "versions": versions})


def fitting(args: argparse.Namespace, tokenizer: Tokenizer) -> Iterator[Record]:
    """Yield the training records that fit into the window, in TRL's format."""
    data = examples.Examples(args.data.name, (args.data,))
    records: Iterator[Record]
    max_tokens = args.block_size - getattr(args, "answer_tokens", 0)
    if args.command == "grpo":
        records = ({"prompt": question.prompt} for question in data.questions()[0])
    elif args.command == "sft":
        records = ({"prompt": list(chat[:-1]), "completion": [chat[-1]]} for chat in data.conversations()[0])
    else:
        records = ({"prompt": pair.prompt, **{side: [{"role": "assistant", "content": getattr(pair, side)}]
                                              for side in data_preferences.SIDES}} for pair in data.preferences()[0])
    return (row for row in records if all(len(ids) <= max_tokens for ids, _ in conversations(tokenizer, row)))


def conversations(tokenizer: Tokenizer, example: Record) -> list[tuple[Any, Any]]:
    """Return (ids, mask of learned ids) for a record: of its conversation, of both in a pair, or of its prompt."""
    completions = [example[name] for name in ("completion", *data_preferences.SIDES) if name in example]
    prompt = chat_template.encode(tokenizer, example["prompt"], add_generation_prompt=True)
    rows = [chat_template.encode(tokenizer, [*example["prompt"], *messages]) for messages in completions] or [prompt]
    for _, learned in rows:
        learned[: len(prompt[0])] = False  # earlier answers are part of the prompt
        if chat_template.is_foreign(tokenizer) and learned.any():
            learned[np.flatnonzero(learned)[-1] :] = True  # TRL also learns what a template writes after the end
    return rows


def digest(rows: list[tuple[Any, Any]]) -> str:
    """Return the sha256 (hex) of conversations, independent of their order; the same as in `trl_peer.py`."""
    lines = sorted(json.dumps([ids.tolist(), ids[learned].tolist()]) for ids, learned in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def ours(job: Record) -> Record:
    """Run bardlet's side; return (seconds, *count) of each pass, and a digest of the training data."""
    name, run = job["stage"], Path(job["scratch"])
    run.mkdir(exist_ok=True)
    records = [json.loads(line) for line in Path(job["records"]).read_text(encoding="utf-8").splitlines()]
    grpo = {name: job[name] for name in GRPO_SETTINGS if name in job}
    if grpo:
        grpo |= {"reward": EXACT, "rollout": job["rows"], "beta": 0.0, "lr": TINY_LR, "muon_lr": TINY_LR}
    config = CONFIGS[name](**{
        "init": job["model"], "block_size": job["block_size"], "batch_size": job["rows"], "steps": 1,
        "dtype": job["dtype"], "device": "cpu", "threads": job["threads"], "keep": "last", "eval_every": 0,
        "save_every": 0, "log_every": 10**6, "lora": job["lora"], **job.get("ours", {}), **grpo, **job["settings"]})
    with distributed.connect("cpu") as dist:
        stage = stage_of(config)(config, dist)
        model, tokenizer = stage.read_base(None)
        rows = [row for example in records for row in conversations(tokenizer, example)]
        if isinstance(stage, sft.SFT):
            chats = TokenizedChats.of(rows, tokenizer.dtype)
            stage.data = sft.ChatDataset(chats, chats.part(slice(1)), tokenizer, leaked=0.0)
        elif isinstance(stage, rl.RL):
            questions = prompts.Prompts([Question(row["prompt"], "") for row in records], [ids for ids, _ in rows])
            stage.data = prompts.PromptDataset(questions, questions, tokenizer)
        else:
            chosen, rejected = (TokenizedChats.of(rows[side::2], tokenizer.dtype) for side in range(2))
            pairs = data_preferences.TokenizedPreferences(chosen, rejected)
            reference = dpo.reference(model, pairs, stage.config, dist)
            dataset = data_preferences.PreferenceDataset(pairs, pairs.part(slice(1)), tokenizer)
            stage.data = dpo.DPODataset(dataset, reference, reference[:1], "")
        stage.record = stage.record_class(text="records")
        trainer = stage.build_trainer(run, model)
        if isinstance(state := trainer.objective.stage_state, rl.Rollouts):
            state.actor = replace(state.actor, reward=share_of_e)
        batches = trainer.record.batches
        trainer.state.steps = job["passes"] * batches
        trainer.config = replace(trainer.config, steps=trainer.state.steps)
        compilation.choose_compile(trainer)
        counted, passes, step_losses = [0] * len(COUNTS), list[list[float]](), list[float]()
        next_batch, pad = trainer.objective.batch, int(tokenizer.pad_id or 0)

        def counting(step: int) -> data_batch.Batch:
            batch = next_batch(step)
            counted[:] = [a + b for a, b in zip(counted, count(batch, pad), strict=True)]
            return batch

        def watch(line: Record) -> None:
            step_losses.append(line["train_loss"])
            if line["step"] % batches == 0:
                passes.append([line["seconds"] - sum(seconds for seconds, *_ in passes), *counted])
                counted[:] = [0] * len(COUNTS)

        trainer.objective = replace(trainer.objective, batch=counting)
        fit(trainer, watch=watch)
    size = len(step_losses) // job["passes"]
    means = [round(statistics.fmean(step_losses[n * size : (n + 1) * size]), 4) for n in range(job["passes"])]
    return {"passes": passes, "digest": digest(rows), "losses": means, "versions": {},
            "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)}  # Linux counts in KiB


def share_of_e(questions: Any, answers: Sequence[Completion]) -> np.ndarray:
    """Return a reward that takes no time to compute; the same as in `trl_peer.py`."""
    return np.array([answer.text.count("e") / max(1, len(answer.text)) for answer in answers], np.float32)


def count(batch: data_batch.Batch, pad: int) -> tuple[int, int, int, int]:
    """Return COUNTS of a batch. Every position except padding predicts a token."""
    answer = batch["target"] != losses.IGNORE
    conversations = int(batch["segment"].amax(1).sum()) if "segment" in batch else int(answer.any(-1).sum())
    predicts = answer.flip(1).cumsum(1) > 0 if "advantage" in batch else batch["idx"] != pad
    return int(predicts.sum()), int(answer.sum()), conversations, batch["idx"].numel()


def rates(passes: list[list[float]]) -> Record:
    """Return each of COUNTS per second."""
    seconds, *counted = (sum(column) for column in zip(*passes, strict=True))
    return {"seconds": round(seconds, 6)} | {name: round(n / seconds, 3)
                                             for name, n in zip(COUNTS, counted, strict=True)}


def floor(model: Any, lengths: list[int], answer_tokens: int, dtype: str) -> float:
    """Return the tokens per second if only the matrix products took time, at the rate of one large product.

    A training step takes 6 operations per weight and token (2 in the forward pass, 4 in the backward pass). Attention
    in a conversation of n tokens takes 6 n C per token and layer: two products, each over n / 2 tokens on average.
    """
    c = model.config
    head = c.vocab_size * c.n_embd
    # matrices of the blocks have a number in their name; embedding tables need no products
    inner = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and re.search(r"\.\d+\.", name))
    tokens = sum(n - 1 for n in lengths)
    attention = sum(6 * n * n * c.n_embd * c.n_layer for n in lengths)
    return product_speed(dtype) * tokens / (6 * inner * tokens + 6 * head * answer_tokens + attention)


def product_speed(dtype: str, n: int = 2048) -> float:
    """Return the operations per second of a product of two n x n matrices in fp32 or bf16, the fastest of five."""
    a, b = (torch.randn(n, n).to(torch.bfloat16 if dtype == "bf16" else torch.float32) for _ in range(2))
    times = []
    for _ in range(5):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2 * n**3 / min(times)


def report(args: argparse.Namespace, runs: dict[str, list[Record]], facts: Record) -> None:
    """Print medians and ratios; with --save, append them to the results."""
    medians = {name: {key: statistics.median(run[key] for run in repeats) for key in repeats[0] if key != "losses"}
               for name, repeats in runs.items()}
    unit = {"sft": "tokens", "dpo": "tokens", "grpo": "conversations"}[args.command]
    best = max((side[unit] for name, side in medians.items() if name.startswith("TRL")), default=float("nan"))
    items = {"sft": "chats/s", "dpo": "pairs/s", "grpo": "answers/s"}[args.command]
    print(f"\n{'':34} {'tokens/s':>9} {'answer tokens/s':>18} {items:>9}"
          f" {'filled':>7} {'of the floor':>13} {'vs. best TRL':>16} {'peak GB':>8}  losses of the passes")
    for name, side in medians.items():
        print(f"{name:34} {side['tokens']:9,.0f} {side['answer_tokens']:18,.0f}"
              f" {side['conversations'] / (2 if args.command == 'dpo' else 1):9.1f}"
              f" {side['tokens'] / side['positions']:7.0%} {side['tokens'] / facts['floor']:13.1%}"
              f" {side[unit] / best:16.2f} {side['peak_gb']:8.2f}  {runs[name][0]['losses']}")
    print(f"floor: {facts['floor']:,} tokens/s")
    if args.save:
        settings = {name: getattr(args, name) for name in ("rows", "block_size", "dtype", "passes", "repeats", "lora")}
        record.append("vs_trl", {"kind": args.command, **settings, **facts, "medians": medians, "runs": runs})


# ---------------------------------------------------------------- parity

BETA, CLIP, PAD = 0.1, 0.2, 1


def parity(args: argparse.Namespace, scratch: Path) -> None:
    """Compare the losses of random batches and the norms of their gradients; exit if they differ by more than 1e-5."""
    model, _ = hf.read_folder(args.model)
    tensors = random_tensors(model, min(256, model.config.block_size))
    save_file(tensors, scratch / "tensors.safetensors")
    job = {"task": "parity", "model": str(args.model.resolve()), "tensors": str(scratch / "tensors.safetensors"),
           "chat_template": chat_template.TEMPLATE, "scratch": str(scratch / "run"),
           "block_size": model.config.block_size, "dtype": "fp32", "threads": args.threads, "beta": BETA, "clip": CLIP}
    answer = run_job(peer(args), job, scratch)
    worst = 0.0
    print(f"{'':16} {'bardlet':>12} {'TRL':>12} {'rel. diff':>9} {'gradients':>12} {'TRL':>12} {'rel. diff':>9}")
    for name, ours in our_losses(model, tensors).items():
        theirs = answer["losses"][name]
        difference = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
        print(f"{name:16} {ours[0]:12.7f} {theirs[0]:12.7f} {difference[0]:9.1e}"
              f" {ours[1]:12.7f} {theirs[1]:12.7f} {difference[1]:9.1e}")
        worst = max(worst, *difference)
    print(f"TRL {answer['versions']['trl']}, transformers {answer['versions']['transformers']}; not compared, as TRL "
          "has no function of tensors for them: advantages (GAE), whiten, clipped_value_loss")
    if worst > 1e-5:
        sys.exit(f"relative difference {worst:.1e}: must be at most 1e-5")


def random_tensors(model: Any, length: int, pairs: int = 4) -> dict[str, torch.Tensor]:
    """Return random conversations (2 x `pairs` rows: all chosen, then all rejected), and random log-probabilities."""
    torch.manual_seed(0)
    rows, position = 2 * pairs, torch.arange(length)[None]
    ends = torch.randint(length // 4, length + 1, (rows, 1))
    ids = torch.randint(8, model.config.vocab_size, (rows, length)).where(position < ends, PAD)
    labels = ids.where((position >= ends - 16) & (position < ends), losses.IGNORE)
    with torch.no_grad():  # short answers and a similar reference, so that DPO's loss is no difference of large numbers
        reference = logprobs.pair_log_probability(model, as_pairs(ids, labels)) + 10 * torch.randn(pairs, 2)
    A, T = 8, 32
    logp = -torch.rand(A, T)
    return {"ids": ids, "labels": labels, "mask": (position < ends).long(), "reference": reference,
            "logp": logp, "old": logp + 0.3 * torch.randn(A, T), "reference_logp": logp + 0.3 * torch.randn(A, T),
            "advantage": torch.randn(A),
            "answered": (torch.arange(T)[None] < torch.randint(1, T + 1, (A, 1))).long(),
            "reward": 3 * torch.randn(rows)}  # fmt: skip


def as_pairs(ids: torch.Tensor, labels: torch.Tensor) -> data_batch.Batch:
    """Return rows, all chosen before all rejected, as a batch of pairs."""
    ids, labels = (torch.stack(x.chunk(2), 1) for x in (ids, labels))
    return {"idx": ids[..., :-1], "target": labels[..., 1:]}


def our_losses(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """Return (mean loss, norm of its gradient) for each loss that both bardlet and TRL have."""
    ids, labels, mask = tensors["ids"], tensors["labels"], tensors["mask"] == 1
    targets = int((labels != losses.IGNORE).sum())
    padded = {"idx": ids[:, :-1], "target": labels[:, 1:]}
    chats = TokenizedChats.of([(i[m].numpy(), (w[m] != losses.IGNORE).numpy())
                               for i, w, m in zip(ids, labels, mask, strict=True)], "int64")
    packed = ChatBatches(chats, ids.shape[1], len(ids), 0, PAD).batch(0)

    def of_model(value: torch.Tensor) -> tuple[float, float]:
        model.zero_grad()
        value.backward()
        return value.item(), torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()

    def of_logp(loss: Any) -> tuple[float, float]:
        logp = tensors["logp"].clone().requires_grad_()
        value = loss(logp, tensors["answered"] == 1) / tensors["answered"].sum()
        value.backward()
        return value.item(), logp.grad.norm().item()

    chosen, rejected = logprobs.pair_log_probability(model, as_pairs(ids, labels)).unbind(1)
    dpo_loss = losses.dpo_loss(chosen, rejected, *tensors["reference"].unbind(1), BETA) / len(chosen)
    old, reference, advantage = tensors["old"], tensors["reference_logp"], tensors["advantage"]
    return {
        "SFT": of_model(losses.completion_loss(model, padded) / targets),
        "SFT, packed": of_model(losses.completion_loss(model, packed) / targets),
        "DPO": of_model(dpo_loss),
        "reward model": reward(tensors),
        "KTO": kto(tensors),
        "GRPO": of_logp(lambda logp, m: losses.grpo_loss(logp, old, reference, advantage, m, CLIP, BETA)),
        "clipped policy": of_logp(lambda logp, m: losses.clipped_policy_loss(logp, old, advantage[:, None], m, CLIP)),
        "KL estimate": of_logp(lambda logp, m: losses.kl_estimate(logp, reference)[m].sum()),
    }


def reward(tensors: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Return the mean loss of a reward model with given rewards, and the norm of its gradient."""
    reward_N = tensors["reward"].clone().requires_grad_()
    chosen, rejected = reward_N.chunk(2)
    value = losses.bradley_terry_loss(chosen, rejected) / len(chosen)
    value.backward()
    assert reward_N.grad is not None
    return value.item(), reward_N.grad.norm().item()


def kto(tensors: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Return the KTO loss of given log-probabilities in float64, and the norm of its gradient."""
    logp, mask = tensors["logp"].double().requires_grad_(), tensors["answered"].double()
    reference_B = (tensors["reference_logp"].double() * mask).sum(1)
    kl = ((tensors["old"].double() * mask).sum(1) - reference_B).mean()
    liked_B = torch.arange(len(logp)) % 2 == 0
    value = losses.kto_loss((logp * mask).sum(1) - reference_B, kl, liked_B, BETA, 1.3, 0.7) / len(logp)
    value.backward()
    assert logp.grad is not None
    return value.item(), logp.grad.norm().item()


if __name__ == "__main__":
    main()
